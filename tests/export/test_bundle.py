"""Several budgets in one package: the weights once, a graph each, whole or not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import exported_models
import numpy as np
import pytest

from patchlife.errors import ConfigError, ExportError
from patchlife.export import bundle as packaging
from patchlife.export import export_bundle
from patchlife.io.files import check_sums, is_exported
from patchlife.runtime import Bundle, open_engine
from patchlife.runtime.bundle import bundle_json
from patchlife.runtime.metadata import metadata_of

BUDGETS = (0.6, 1.0)


def _package(kind: str, tmp_path_factory) -> Path:
    model = exported_models.small()
    made = export_bundle(
        model, tmp_path_factory.mktemp(kind) / "package", BUDGETS, kind, images=exported_models.images(9)
    )
    assert model.config == exported_models.small().config, "the model is left as it was"
    assert [parity.agreement for parity in made.parities] == [1, 1]
    return made.path


@pytest.fixture(scope="module")
def onnx_package(tmp_path_factory) -> Path:
    return _package("onnx", tmp_path_factory)


@pytest.fixture(scope="module")
def openvino_package(tmp_path_factory) -> Path:
    return _package("openvino", tmp_path_factory)


@pytest.fixture(params=["onnx", "openvino"])
def package(request) -> Path:
    return request.getfixturevalue(f"{request.param}_package")


@pytest.fixture
def copied(onnx_package, tmp_path) -> Path:
    return Path(shutil.copytree(onnx_package, tmp_path / "package"))


def test_each_graph_answers_as_the_model(package):
    model, images = exported_models.small(), exported_models.images(4, seed=2)
    whole = Bundle(package, threads=1)
    assert whole.budgets == [1.0, 0.6]
    for budget in whole.budgets:
        logits, lives = model.set_budget(budget).predict(images)
        output = whole.engine(budget)(images.numpy())
        np.testing.assert_allclose(output.logits, logits.numpy(), atol=1e-4)
        np.testing.assert_array_equal(output.life, lives.life.numpy())
    assert whole.engine(0.6) is whole.engine(0.6)


def test_each_graph_says_where_int8_begins():
    metadata = metadata_of(exported_models.small(), "onnx", precision="int8-dynamic")
    _, text = bundle_json([replace(metadata, budget=1.0, int8_from=0), replace(metadata, int8_from=1)])
    assert [graph["int8_from"] for graph in json.loads(text)["graphs"]] == [0, 1]


def test_each_graph_says_what_it_is(package):
    whole = Bundle(package)
    for budget, metadata in whole.graphs_metadata.items():
        assert metadata.budget == metadata.config["budget"] == budget
        assert metadata.budgets == (1.0, 0.6)
        assert metadata.kept == exported_models.small(budget=budget).schedule().kept
        assert metadata.image_size == (48, 48)
        assert metadata.read_preprocess().size == (48, 48)


def test_the_weights_are_there_once(package):
    model = exported_models.small()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters() if p.numel() >= 256)
    assert parameters <= (package / "weights.bin").stat().st_size < 2 * parameters
    if (package / "budget-1.onnx").exists():
        import onnx

        graphs = [onnx.load(file, load_external_data=False) for file in package.glob("*.onnx")]
        assert all(len(tensor.raw_data) < 1024 for graph in graphs for tensor in graph.graph.initializer)


def test_onnx_runtime_alone_loads_each_graph(onnx_package):
    import onnxruntime

    for budget in (1, 0.6):
        session = onnxruntime.InferenceSession(onnx_package / f"budget-{budget:g}.onnx")
        logits = session.run(["logits"], {"images": exported_models.images(2).numpy()})[0]
        assert logits.shape == (2, 7)


def test_openvino_alone_reads_each_graph(openvino_package):
    import openvino

    model = openvino.Core().read_model(openvino_package / "budget-0.6.xml", openvino_package / "weights.bin")
    assert [output.get_any_name() for output in model.outputs] == ["logits", "life"]


# ---- asking for what is not there


def test_a_budget_that_is_not_there_and_none_at_all(package):
    with pytest.raises(ConfigError, match=r"holds the budgets 1, 0\.6, got 0\.5; .* --budgets 1,0\.6,0\.5"):
        open_engine(package, budget=0.5)
    with pytest.raises(ConfigError, match=r"holds the budgets 1, 0\.6; say which one with --budget"):
        open_engine(package)


@pytest.mark.parametrize(
    ("budgets", "format", "message"),
    [
        ((), "onnx", "at least one budget, got none"),
        ((60,), "onnx", r"did you mean 0\.6"),
        ((0.6,), "torch", r"torch has no package of several budgets; .*CompiledBudgets"),
        ((0.1,), "onnx", "out of reach"),
    ],
)
def test_what_cannot_be_packed(tmp_path, budgets, format, message):
    with pytest.raises(ConfigError, match=message):
        export_bundle(exported_models.small(), tmp_path / "package", budgets, format)
    assert not list(tmp_path.iterdir())


# ---- whole or not there


@pytest.mark.parametrize("name", ["budget-0.6.onnx", "weights.bin", "bundle.json"])
def test_a_flipped_bit_is_noticed(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    assert is_exported(copied)
    with pytest.raises(ExportError, match=f"{name} is damaged"):
        open_engine(copied, budget=1)


def test_a_missing_file_is_noticed(copied):
    (copied / "budget-1.onnx").unlink()
    with pytest.raises(ExportError, match=r"lacks 'budget-1\.onnx'"):
        open_engine(copied, budget=0.6)


def test_a_graph_that_no_sum_covers(copied):
    sums = copied / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "0.6" not in line))
    with pytest.raises(ExportError, match="no whole package"):
        open_engine(copied, budget=1)


def test_a_package_of_a_newer_version(copied):
    import hashlib

    body = json.loads((copied / "bundle.json").read_text()) | {"format": 99, "patchlife": "9.0"}
    (copied / "bundle.json").write_text(json.dumps(body))
    digest = hashlib.sha256((copied / "bundle.json").read_bytes()).hexdigest()
    sums = [line for line in (copied / "SHA256SUMS").read_text().splitlines(True) if "bundle.json" not in line]
    (copied / "SHA256SUMS").write_text("".join([*sums, f"{digest}  bundle.json\n"]))
    with pytest.raises(ExportError, match=r"patchlife 9\.0 in format 99"):
        open_engine(copied, budget=0.6)


def test_a_graph_that_answers_otherwise_leaves_the_old_package(copied, monkeypatch):
    def wrong(*_):
        raise ExportError("decides otherwise")

    monkeypatch.setattr(packaging, "build_file", lambda *_: (copied / "budget-0.6.onnx").read_bytes())
    monkeypatch.setattr(packaging, "without_weights", lambda kind, content, weights: content)
    monkeypatch.setattr(packaging, "compare_with_model", wrong)
    with pytest.raises(ExportError, match="decides otherwise"):
        export_bundle(exported_models.small(), copied, (0.7,), "onnx")
    assert {path.name for path in copied.parent.iterdir()} == {"package"}
    assert len(check_sums(copied, ExportError)) == 4


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not a patchlife package; it was left alone"):
        export_bundle(exported_models.small(), tmp_path, (0.7,), "onnx")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
