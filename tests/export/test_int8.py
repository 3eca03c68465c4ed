"""int8: blocks are rounded, the scorer is not, and a file with too many different predictions is refused."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace

import exported_models
import families
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchlife
from patchlife.errors import ExportError, MissingExtraError
from patchlife.export import exporter, graph
from patchlife.export.exporter import build_file, export, export_graph
from patchlife.export.parity import check_int8, sample_images
from patchlife.export.per_token_int8 import SHIFT, quantised_per_token, rounded_weight
from patchlife.runtime.engine import Engine
from patchlife.runtime.metadata import metadata_of
from patchlife.runtime.sessions import ModuleSession, OnnxSession, open_session
from patchlife.runtime.tensor_module import tensor_module


def _content(kind: str, precision: str) -> tuple[bytes, Engine]:
    model = exported_models.small()
    metadata = metadata_of(model, kind, precision=precision)
    content = build_file(tensor_module(model), metadata, exported_models.images(8, seed=1))
    return content, Engine(open_session(kind, content), metadata)


def _assert_close(engine: Engine) -> None:
    """Logits correlate with the model's and most lives are equal; random weights do not allow a stricter check."""
    images = exported_models.images(16)
    logits, lives = exported_models.small().predict(images)
    output = engine(images.numpy())
    assert np.corrcoef(output.logits.flatten(), logits.numpy().flatten())[0, 1] > 0.95
    assert (output.life == lives.life.numpy()).mean() > 0.85


def test_dynamic_rounds_the_blocks_but_not_the_decision():
    import onnx

    content, engine = _content("onnx", "int8-dynamic")
    nodes = onnx.load_from_string(content).graph.node
    rounded = [n.name for n in nodes if n.op_type == "MatMulIntegerToFloat"]
    assert len(rounded) == 12, "4 linears in each of 3 blocks"
    assert any(n.op_type == "TopK" for n in nodes)
    assert engine.session.metadata_json
    _assert_close(engine)


@pytest.mark.parametrize("block", [1, 2])
def test_int8_from_a_later_block_leaves_the_first_blocks_in_float(block):
    import onnx

    model = exported_models.small(start=2, drops=(2,), budget=0.85)
    metadata = replace(metadata_of(model, "onnx", precision="int8-dynamic"), int8_from=block)
    content = build_file(tensor_module(model), metadata, exported_models.images(8, seed=1))
    names = [n.op_type for n in onnx.load_from_string(content).graph.node]
    assert names.count("MatMulIntegerToFloat") == 4 * (3 - block), "4 linears in each block left"
    decided_first = names.index("TopK") < names.index("MatMulIntegerToFloat")
    assert decided_first == (block == model.start)
    if decided_first:
        engine, images = Engine(open_session("onnx", content), metadata), exported_models.images(16)
        assert (engine(images.numpy()).life == model.predict(images)[1].life.numpy()).all()


@pytest.mark.parametrize("name", ["wide", "eva02"])
def test_every_linear_layer_after_the_first_blocks_is_rounded(name):
    """Those that the attention scorer reads, too: there the exporter keeps the weight transposed."""
    import onnx

    wide = {**exported_models.SMALL, "embed_dim": 96, "num_heads": 3}
    vit = timm.create_model("vit_tiny_patch16_224", **wide) if name == "wide" else families.built(name)
    model = patchlife.wrap(families.liven(vit).eval(), patchlife.LifeConfig(budget=0.85, start=2, drops=(2,)))
    images = sample_images(2, 3, model.backbone.image_size)
    metadata = metadata_of(model, "onnx", precision="int8-dynamic")
    module = tensor_module(model)
    graph = export_graph(module, metadata)
    for block in range(model.start + 1):
        content = build_file(module, replace(metadata, int8_from=block), images, graph)
        rounded = [n for n in onnx.load_from_string(content).graph.node if n.op_type == "MatMulIntegerToFloat"]
        left = [m for b in model.backbone.model.blocks[block:] for m in b.modules() if isinstance(m, torch.nn.Linear)]
        assert len(rounded) == len(left)


def test_outputs_do_not_depend_on_the_other_images_of_the_batch():
    _, engine = _content("onnx", "int8-dynamic")
    images = exported_models.images(6)
    images[1] *= 100
    images[2] = torch.nan
    together = engine(images.numpy()).logits
    for i in (0, 1, 3, 4, 5):
        np.testing.assert_allclose(engine(images[i : i + 1].numpy()).logits[0], together[i], rtol=1e-3, atol=1e-4)
    assert not np.isfinite(together[2]).all()


def _linear(weight: np.ndarray, bias: np.ndarray, gelu: bool):
    """A linear layer as torch's exporter writes it, optionally after a GELU."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Gelu", ["images"], ["x"], name="gelu")] if gelu else []
    nodes.append(helper.make_node("MatMul", ["x" if gelu else "images", "w"], ["y"], name="product"))
    nodes.append(helper.make_node("Add", ["y", "b"], ["z"], name="linear"))
    shapes = [["batch", "tokens", len(weight)], ["batch", "tokens", weight.shape[1]]]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(("images", "z"), shapes, strict=True)
    ]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), gelu=st.booleans(), spread=st.floats(0, 4), tokens=st.integers(1, 5))
def test_each_token_has_its_own_scale(seed, gelu, spread, tokens):
    """The error is at most half a step of each factor, however large the other tokens are."""
    draw = np.random.default_rng(seed)
    weight, bias = (draw.standard_normal(shape).astype(np.float32) for shape in ((6, 4), (4,)))
    images = (draw.standard_normal((2, tokens, 6)) * 10 ** draw.uniform(-spread, spread, (2, tokens, 1))).astype(
        np.float32
    )
    model = _linear(weight, bias, gelu)
    exact = OnnxSession(model.SerializeToString()).run(images)[0]
    rounded = OnnxSession(quantised_per_token(model, []).SerializeToString()).run(images)[0]
    x = torch.nn.functional.gelu(torch.from_numpy(images)).numpy() if gelu else images
    step = (x + SHIFT).max(-1, keepdims=True) / 255 if gelu else np.abs(x).max(-1, keepdims=True) / 127
    columns = rounded_weight(weight)[1]
    bound = 0.5 * step * (np.abs(weight).sum(0) + 3 * columns) + 0.5 * np.abs(x).sum(-1, keepdims=True) * columns
    assert (np.abs(rounded - exact) <= 1.01 * bound + 1e-4 * (1 + np.abs(exact))).all()


def test_small_integers_are_exact():
    """Whole numbers whose largest value per token, and per pair of weights, is 127 are not rounded."""
    weight = np.array([[100, -3], [27, 124], [0, 64]], np.float32)
    images = np.array([[[127, 2, -1], [0, 0, 0], [-4, 127, 9]]], np.float32)
    model = _linear(weight, np.ones(2, np.float32), False)
    result = OnnxSession(quantised_per_token(model, []).SerializeToString()).run(images)[0]
    np.testing.assert_allclose(result, images @ weight + 1, rtol=1e-6)
    assert quantised_per_token(model, ["product"]).graph.node == model.graph.node


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("precision", "mark"), [("int8-static", b"FakeQuantize"), ("int8-dynamic", b'element_type="i8"')]
)
def test_openvino(precision, mark):
    pytest.importorskip("nncf", reason="int8 for OpenVINO needs nncf (extra int8)")
    content, engine = _content("openvino", precision)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert mark in archive.read("model.xml")
    _assert_close(engine)


def test_the_scorer_and_merging_stay_in_float():
    """On a graph with the module names that torch's exporter records."""
    from onnx import TensorProto, helper

    def node(name, scopes, *inputs):
        made = helper.make_node("MatMul", inputs, [f"{name}_out"], name=name)
        made.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scopes))
        return made

    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    nodes = [
        node("scorer", ["", "model.scorer", "model.scorer.patch", "linear"], "x", "w"),
        node("merge", ["", "matmul_3"], "x", "y"),
        node("qk", ["", "scaled_dot_product_attention_1"], "x", "y"),
        node("qkv", ["", "linear_4"], "x", "w"),
        node("classifier", ["", "model.backbone.model.head", "linear"], "x", "w"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], [weight]))
    assert graph.decision_nodes(model, []) == ["scorer", "scorer_out", "merge", "merge_out"]


class EveryFourthWrong(torch.nn.Module):
    """Predicts another class for every fourth image."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        logits, life = self.module(images)
        logits[::4] = -logits[::4]
        return logits, life


def test_too_little_agreement_is_refused(tmp_path, monkeypatch):
    module = tensor_module(exported_models.small())
    session = ModuleSession(EveryFourthWrong(module))
    with pytest.raises(ExportError, match=r"for 15 of 20 images \(75\.0 %\), expected at least 98 %"):
        check_int8(session, module, exported_models.images(20), 0.98)
    assert check_int8(session, module, exported_models.images(20), 0.7).agreement == 0.75
    monkeypatch.setattr(exporter, "build_file", lambda *_: b"")
    monkeypatch.setattr(exporter, "export_graph", lambda *_: None)
    monkeypatch.setattr(exporter, "open_session", lambda *_: session)
    with pytest.raises(ExportError, match="at least 98 %"):
        export(exported_models.small(), tmp_path / "a.onnx", images=exported_models.images(20), int8="dynamic")
    assert not list(tmp_path.iterdir())


def test_too_little_agreement_leaves_one_more_block_in_float(monkeypatch):
    tried = []
    monkeypatch.setattr(exporter, "build_file", lambda module, metadata, *_: tried.append(metadata.int8_from) or b"")
    monkeypatch.setattr(exporter, "export_graph", lambda *_: None)
    model = exported_models.small(start=2, drops=(2,), budget=0.85)
    module, images = tensor_module(model), exported_models.images(20)
    metadata = metadata_of(module.model, "onnx", precision="int8-dynamic")
    monkeypatch.setattr(exporter, "open_session", lambda *_: ModuleSession(module))
    _, form, parity = exporter.build_and_compare(module, metadata, images, images)
    assert (tried, form.int8_from, parity.agreement) == ([0], 0, 1)
    monkeypatch.setattr(
        exporter, "open_session", lambda *_: ModuleSession(EveryFourthWrong(module) if len(tried) < 3 else module)
    )
    _, form, _ = exporter.build_and_compare(module, metadata, images, images)
    assert (tried, form.int8_from) == ([0, 0, 1], 1)
    monkeypatch.setattr(exporter, "open_session", lambda *_: ModuleSession(EveryFourthWrong(module)))
    with pytest.raises(ExportError, match="at least 98 %"):
        exporter.build_and_compare(module, metadata, images, images)
    assert tried[3:] == [0, 1, 2], "up to the start block"


@pytest.mark.parametrize("int8", ["dynamic", "static"])
def test_missing_nncf_names_its_extra(tmp_path, monkeypatch, int8):
    monkeypatch.setitem(__import__("sys").modules, "nncf", None)
    with pytest.raises(MissingExtraError, match=r"nncf, .*pip install 'patchlife\[int8\]'"):
        export(exported_models.small(), tmp_path / "a", "openvino", images=exported_models.images(2), int8=int8)
