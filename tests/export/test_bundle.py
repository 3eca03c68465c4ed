"""Bundles: several budgets, the weights stored once, one graph per budget, written completely or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import exported_models
import numpy as np
import pytest

from patchlife.errors import ConfigError, ExportError
from patchlife.export import bundle as export_bundle_module
from patchlife.export import export_bundle
from patchlife.io.exported_files import is_exported
from patchlife.io.files import sha256_of
from patchlife.io.folders import check_sums
from patchlife.runtime import Bundle, open_engine
from patchlife.runtime.bundle import bundle_json
from patchlife.runtime.metadata import metadata_of

BUDGETS = (0.6, 1.0)


def _export_bundle(kind: str, tmp_path_factory) -> Path:
    model, folder = exported_models.small(), tmp_path_factory.mktemp(kind) / "bundle"
    exported = export_bundle(model, folder, BUDGETS, kind, images=exported_models.images(9))
    assert model.settings == exported_models.small().settings, "the model is not changed"
    assert [parity.agreement for parity in exported.parities] == [1, 1]
    return exported.path


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory) -> Path:
    return _export_bundle("onnx", tmp_path_factory)


@pytest.fixture(scope="module")
def openvino_bundle(tmp_path_factory) -> Path:
    return _export_bundle("openvino", tmp_path_factory)


@pytest.fixture(params=["onnx", "openvino"])
def bundle(request) -> Path:
    return request.getfixturevalue(f"{request.param}_bundle")


@pytest.fixture
def copied(onnx_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(onnx_bundle, tmp_path / "bundle"))


def test_each_graph_has_the_outputs_of_the_model(bundle):
    model, images = exported_models.small(), exported_models.images(4, seed=2)
    opened = Bundle(bundle, threads=1)
    assert opened.budgets == [1.0, 0.6]
    for budget in opened.budgets:
        logits, lives = model.set_budget(budget).predict(images)
        output = opened.engine(budget)(images.numpy())
        np.testing.assert_allclose(output.logits, logits.numpy(), atol=1e-4)
        np.testing.assert_array_equal(output.life, lives.life.numpy())
    assert opened.engine(0.6) is opened.engine(0.6)


def test_metadata_holds_the_first_int8_block_of_each_graph():
    metadata = metadata_of(exported_models.small(), "onnx", precision="int8-dynamic")
    _, text = bundle_json([replace(metadata, budget=1.0, int8_from=0), replace(metadata, int8_from=1)])
    assert [graph["int8_from"] for graph in json.loads(text)["graphs"]] == [0, 1]


def test_each_graph_has_its_metadata(bundle):
    opened = Bundle(bundle)
    for budget, metadata in opened.graphs_metadata.items():
        assert metadata.budget == metadata.config["budget"] == budget
        assert metadata.budgets == (1.0, 0.6)
        assert metadata.kept == exported_models.small(budget=budget).schedule().kept
        assert metadata.image_size == (48, 48)
        assert metadata.read_preprocess().size == (48, 48)


def test_weights_are_stored_once(bundle):
    model = exported_models.small()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters() if p.numel() >= 256)
    assert parameters <= (bundle / "weights.bin").stat().st_size < 2 * parameters
    if (bundle / "budget-1.onnx").exists():
        import onnx

        graphs = [onnx.load(file, load_external_data=False) for file in bundle.glob("*.onnx")]
        assert all(len(tensor.raw_data) < 1024 for graph in graphs for tensor in graph.graph.initializer)


def test_onnx_runtime_alone_loads_each_graph(onnx_bundle):
    import onnxruntime

    for budget in (1, 0.6):
        session = onnxruntime.InferenceSession(onnx_bundle / f"budget-{budget:g}.onnx")
        logits = session.run(["logits"], {"images": exported_models.images(2).numpy()})[0]
        assert logits.shape == (2, 7)


def test_openvino_alone_reads_each_graph(openvino_bundle):
    import openvino

    model = openvino.Core().read_model(openvino_bundle / "budget-0.6.xml", openvino_bundle / "weights.bin")
    assert [output.get_any_name() for output in model.outputs] == ["logits", "life"]


# ---- budgets that are not in the bundle


def test_a_budget_that_is_not_in_the_bundle_and_no_budget(bundle):
    with pytest.raises(ConfigError, match=r"holds the budgets 1, 0\.6, got 0\.5; .* --budgets 1,0\.6,0\.5"):
        open_engine(bundle, budget=0.5)
    with pytest.raises(ConfigError, match=r"holds the budgets 1, 0\.6; .*--budget"):
        open_engine(bundle)


@pytest.mark.parametrize(
    ("budgets", "format", "message"),
    [
        ((), "onnx", "at least one budget, got none"),
        ((60,), "onnx", r"did you mean 0\.6"),
        ((0.6,), "torch", r"onnx or openvino for a bundle, got torch.*CompiledBudgets"),
        ((0.1,), "onnx", "out of reach"),
    ],
)
def test_requests_that_are_refused(tmp_path, budgets, format, message):
    with pytest.raises(ConfigError, match=message):
        export_bundle(exported_models.small(), tmp_path / "bundle", budgets, format)
    assert not list(tmp_path.iterdir())


# ---- complete or absent


@pytest.mark.parametrize("name", ["budget-0.6.onnx", "weights.bin", "bundle.json"])
def test_a_flipped_bit_is_detected(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    assert is_exported(copied)
    with pytest.raises(ExportError, match=f"{name} is damaged"):
        open_engine(copied, budget=1)


def test_a_missing_file_is_detected(copied):
    (copied / "budget-1.onnx").unlink()
    with pytest.raises(ExportError, match=r"lacks 'budget-1\.onnx'"):
        open_engine(copied, budget=0.6)


def test_a_graph_without_checksum(copied):
    sums = copied / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "0.6" not in line))
    with pytest.raises(ExportError, match="not a complete bundle"):
        open_engine(copied, budget=1)


@pytest.mark.parametrize(("format", "fix"), [(99, "pip install -U patchlife"), (1, "export it again")])
def test_a_bundle_of_another_format(copied, format, fix):
    body = json.loads((copied / "bundle.json").read_text()) | {"format": format, "patchlife": "9.0"}
    (copied / "bundle.json").write_text(json.dumps(body))
    sums = [line for line in (copied / "SHA256SUMS").read_text().splitlines(True) if "bundle.json" not in line]
    (copied / "SHA256SUMS").write_text("".join([*sums, f"{sha256_of(copied / 'bundle.json')}  bundle.json\n"]))
    with pytest.raises(ExportError, match=rf"patchlife 9\.0 in format {format}, .*{fix}"):
        open_engine(copied, budget=0.6)


def test_a_graph_with_wrong_outputs_leaves_the_old_bundle(copied, monkeypatch):
    def fail(*_):
        raise ExportError("outputs differ")

    monkeypatch.setattr(export_bundle_module, "build_file", lambda *_: (copied / "budget-0.6.onnx").read_bytes())
    monkeypatch.setattr(export_bundle_module, "move_weights", lambda kind, content, weights: content)
    monkeypatch.setattr(export_bundle_module, "compare_with_model", fail)
    with pytest.raises(ExportError, match="outputs differ"):
        export_bundle(exported_models.small(), copied, (0.7,), "onnx")
    assert {path.name for path in copied.parent.iterdir()} == {"bundle"}
    assert len(check_sums(copied, ExportError)) == 4


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"is not a patchlife bundle; .*choose another --out"):
        export_bundle(exported_models.small(), tmp_path, (0.7,), "onnx")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
