"""A verb names a missing optional package and the command to install it, before it reads or writes files."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from small import write_photos

from patchlife.cli.main import VERBS
from patchlife.errors import MissingExtraError

EXTRAS = ("accelerate", "matplotlib", "pyarrow", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")


@pytest.fixture
def without(monkeypatch):
    """A function that hides packages, as if they were not installed."""

    def hide(*packages: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return hide


def exported(folder: Path, kind: str) -> Path:
    """A file or folder that is recognised as an exported file or bundle, without a valid model."""
    folder.mkdir(exist_ok=True)
    if kind.endswith("bundle"):
        (folder / "bundle.json").write_text(json.dumps({"kind": kind.split()[0], "graphs": []}))
        return folder
    path = folder / "model"
    if kind == "onnx":
        path.write_bytes(b"\x08\x07")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.xml" if kind == "openvino" else "archive/data", "")
    return path


CASES = [
    ("fit no-model none", "accelerate", "patchlife fit needs accelerate", "train"),
    ("fit no-model none", "matplotlib", "patchlife fit needs matplotlib", "train"),
    ("bench no-model --data none", "matplotlib", "patchlife bench needs matplotlib", "bench"),
    ("bench --report none.json", "matplotlib", "patchlife bench needs matplotlib", "bench"),
    ("bench no-model --engine onnx", "onnxruntime", "--engine onnx needs onnxruntime", "onnx"),
    ("bench no-model --engine openvino", "onnxscript", "--engine openvino needs onnxscript", "onnx,openvino"),
    ("bench no-model --engine openvino", "openvino", "--engine openvino needs openvino", "onnx,openvino"),
    ("predict no-model none --out p.parquet", "pyarrow", "--out p.parquet needs pyarrow", "parquet"),
    ("embed no-model none", "pyarrow", "--out embeddings.parquet needs pyarrow", "parquet"),
    ("predict no-model none --ray --out parts", "ray", "--ray needs ray", "ray"),
    ("embed no-model none --ray", "ray", "--ray needs ray", "ray"),
    ("embed no-model none --ray --out v.parquet", "pyarrow", "--out v.parquet needs pyarrow", "parquet"),
    ("predict no-model none --engine onnx", "onnx", "--engine onnx needs onnx", "onnx"),
    ("predict no-model none --engine onnx", "onnxscript", "--engine onnx needs onnxscript", "onnx"),
    ("predict no-model none --engine openvino", "openvino", "--engine openvino needs openvino", "onnx,openvino"),
    ("predict {onnx} none", "onnxruntime", "running .*model needs onnxruntime", "onnx"),
    ("predict {openvino} none", "openvino", "running .*model needs openvino", "openvino"),
    ("predict {onnx bundle} none", "onnxruntime", "running .* needs onnxruntime", "onnx"),
    ("predict {openvino bundle} none", "openvino", "running .* needs openvino", "openvino"),
    ("eval no-model none --engine onnx", "onnxruntime", "--engine onnx needs onnxruntime", "onnx"),
    ("eval {onnx bundle} none", "onnxruntime", "running .* needs onnxruntime", "onnx"),
    ("serve no-model", "ray", "patchlife serve needs ray", "ray"),
    ("serve no-model", "fastapi", "patchlife serve needs fastapi", "ray"),
    ("serve {onnx} --max-batch 4", "onnxruntime", "running .*model needs onnxruntime", "onnx"),
    ("export no-model --photos none", "onnx", "export to onnx needs onnx", "onnx"),
    ("export no-model", "onnxscript", "export to onnx needs onnxscript", "onnx"),
    ("export no-model --budgets 1,0.6", "onnxruntime", "export to onnx needs onnxruntime", "onnx"),
    ("export no-model --format openvino", "openvino", "export to openvino needs openvino", "onnx,openvino"),
    ("export no-model --format openvino --int8 dynamic", "nncf", "int8 for OpenVINO needs nncf", "int8"),
]


@pytest.mark.parametrize(("line", "package", "message", "extra"), CASES)
def test_a_missing_package_is_named_before_anything_is_read_or_written(
    line, package, message, extra, patchlife, without, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    kinds = ("onnx", "openvino", "onnx bundle", "openvino bundle")
    places = {kind: exported(tmp_path / kind.replace(" ", "-"), kind) for kind in kinds}
    before = sorted(tmp_path.rglob("*"))
    without(package)
    words = re.findall(r"\{[^}]*\}|\S+", line)  # a kind in braces is replaced by the path of its file
    result = patchlife(*(places.get(word[1:-1], word) if word[0] == "{" else word for word in words))
    assert (result.code, result.out) == (2, "")
    install = re.escape(f"which is not installed: pip install 'patchlife[{extra}]'")
    assert re.search(f"patchlife: error: {message}, {install}", result.err), result.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_verbs_work_without_the_packages_that_they_do_not_need(patchlife, model, photos, without, tmp_path):
    without(*EXTRAS)
    for line in (
        ["predict", *model, *photos],
        ["embed", *model, *photos, "--out", tmp_path / "e.npy"],
        ["draw", *model, photos[0], "--out", tmp_path / "pictures", "--strip", "--sheet"],
        ["info", *model],
        ["eval", *model, numbered(tmp_path), "--budgets", 1.0, "--device", "cpu"],
        ["export", *model, "--format", "torch", "--out", tmp_path / "m.pt2"],
        ["predict", tmp_path / "m.pt2", *photos, "--trust"],
    ):
        result = patchlife(*line)
        assert result.code == 0, result.err
    assert patchlife("demo", "--out", tmp_path / "demo", "--rounds", 5).code == 0


def numbered(folder: Path) -> Path:
    write_photos(folder / "numbered" / "0", 2)
    return folder / "numbered"


def test_eval_without_matplotlib_leaves_the_plot_out(patchlife, model, without, tmp_path):
    without("matplotlib")
    out = tmp_path / "scores.json"
    result = patchlife("eval", *model, numbered(tmp_path), "--budgets", 1.0, "--out", out, "--device", "cpu")
    assert result.code == 0
    assert result.err.startswith("patchlife: the plot is left out: the trade-off plot needs matplotlib, which is not")
    assert json.loads(out.read_text())["photos"] == 2
    assert not out.with_suffix(".png").exists()


def test_fit_in_python_checks_packages_first(without, tmp_path):
    from patchlife import wrap
    from patchlife.backbones import build
    from patchlife.data import Preprocess

    fit = importlib.import_module("patchlife.training.fit").fit
    model = wrap(build("test_vit")[0])
    without("matplotlib")
    with pytest.raises(MissingExtraError, match=r"the report of a fit needs matplotlib.* 'patchlife\[train\]'"):
        fit(model, [], Preprocess(), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_every_extra_in_a_message_exists():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    named = {extra for *_, extras in CASES for extra in extras.split(",")}
    assert named <= project["optional-dependencies"].keys()
    assert {line.split()[0] for line, *_ in CASES} <= VERBS.keys()
