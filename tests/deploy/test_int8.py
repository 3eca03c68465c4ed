"""int8: blocks are rounded, the life head is not, and a file that answers otherwise too often is refused."""

from __future__ import annotations

import io
import zipfile

import deploying
import numpy as np
import pytest
import torch

from patchlife.deploy import exporting, graph
from patchlife.deploy.describe import describe
from patchlife.deploy.engines import Engine
from patchlife.deploy.exportable import exportable
from patchlife.deploy.exporting import built, export
from patchlife.deploy.parity import check_int8
from patchlife.deploy.runners import ModuleRunner, open_runner
from patchlife.errors import ExportError, MissingExtraError


def _content(kind: str, precision: str) -> tuple[bytes, Engine]:
    model = deploying.small()
    about = describe(model, kind, precision=precision)
    content = built(exportable(model), about, deploying.images(8, seed=1))
    return content, Engine(open_runner(kind, content), about)


def _close(engine: Engine) -> None:
    """Near the model on most patches and logits; random weights round badly, so no more than that."""
    images = deploying.images(16)
    logits, lives = deploying.small().predict(images)
    output = engine(images.numpy())
    assert np.corrcoef(output.logits.flatten(), logits.numpy().flatten())[0, 1] > 0.95
    assert (output.life == lives.life.numpy()).mean() > 0.85


def test_dynamic_rounds_the_blocks_and_leaves_the_decision():
    import onnx

    content, engine = _content("onnx", "int8-dynamic")
    nodes = onnx.load_from_string(content).graph.node
    rounded = [n.name for n in nodes if n.op_type == "MatMulInteger"]
    assert len(rounded) >= 10, "4 linears in each of 3 blocks; the one whose weight the head reads, too, may stay"
    heads = [n for n in nodes if n.op_type == "TopK"]
    assert heads
    assert engine.runner.description
    _close(engine)


@pytest.mark.slow
def test_static_for_onnx():
    import onnx

    content, engine = _content("onnx", "int8-static")
    assert sum(n.op_type == "QuantizeLinear" for n in onnx.load_from_string(content).graph.node) >= 10
    _close(engine)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_static_for_openvino():
    pytest.importorskip("nncf")
    content, engine = _content("openvino", "int8-static")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert b"FakeQuantize" in archive.read("model.xml")
    _close(engine)


def test_the_head_is_named_by_its_scope():
    """What int8 must leave alone, on a graph as torch's exporter writes one."""
    from onnx import TensorProto, helper

    def node(name, scopes, *inputs):
        made = helper.make_node("MatMul", inputs, [f"{name}_out"], name=name)
        made.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scopes))
        return made

    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    nodes = [
        node("head", ["", "model.head", "model.head.patch", "linear"], "x", "w"),
        node("inherit", ["", "matmul_3"], "x", "y"),
        node("qk", ["", "scaled_dot_product_attention_1"], "x", "y"),
        node("qkv", ["", "linear_4"], "x", "w"),
        node("classifier", ["", "model.backbone.vit.head", "linear"], "x", "w"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], [weight]))
    assert graph.decision_nodes(model) == ["head", "head_out", "inherit", "inherit_out"]


class Other(torch.nn.Module):
    """Names another class for every fourth image."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        logits, life = self.module(images)
        logits[::4] = -logits[::4]
        return logits, life


def test_too_little_agreement_is_refused(tmp_path, monkeypatch):
    module = exportable(deploying.small())
    runner = ModuleRunner(Other(module))
    with pytest.raises(ExportError, match=r"same class as float32 for 15 of 20 images \(75\.0 %\), at least 98 %"):
        check_int8(runner, module, deploying.images(20), 0.98)
    assert check_int8(runner, module, deploying.images(20), 0.7).agreement == 0.75
    monkeypatch.setattr(exporting, "built", lambda *_: b"")
    monkeypatch.setattr(exporting, "open_runner", lambda *_: runner)
    with pytest.raises(ExportError, match="at least 98 %"):
        export(deploying.small(), tmp_path / "a.onnx", images=deploying.images(20), int8="dynamic")
    assert not list(tmp_path.iterdir())


def test_nncf_is_asked_for_by_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nncf", None)
    with pytest.raises(MissingExtraError, match=r"nncf, .*pip install 'patchlife\[int8\]'"):
        export(deploying.small(), tmp_path / "a", "openvino", images=deploying.images(2), int8="static")
