"""A missing Python package is reported before a model is built, a photo is read or anything is written."""

from __future__ import annotations

import sys
from pathlib import Path

import exported_models
import pytest
import small as photos_and_weights

from patchlife import data
from patchlife.benchmarks import comparison as compare
from patchlife.cli import demo_measurements
from patchlife.cli import export as export_verb
from patchlife.cli.main import main
from patchlife.errors import MissingExtraError
from patchlife.export import export, export_bundle
from patchlife.runtime import inference
from patchlife.runtime import opening as models
from patchlife.training import target_cache as cache

READERS = (data, inference, cache, compare, demo_measurements, export_verb)
"""Modules that hold the name ``load_batches``. All are imported here, so that none is first imported while patched."""
EXTRAS = "onnx,openvino", "onnx", "openvino", "int8"
"""Extras that install lines may name; export to OpenVINO also needs ONNX's packages."""
EXPORT = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
"""Packages that export to each format needs."""
CASES = [(format, missing) for format, needed in EXPORT.items() for missing in needed]


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with two photos, in which no model may be built and no photo may be read."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the missing package must be reported first")

    photos_and_weights.write_photos(tmp_path / "photos" / "3", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "open_pipeline", fail)
    for module in READERS:
        monkeypatch.setattr(module, "load_batches", fail)
    return tmp_path


def _assert_refused(capsys, monkeypatch, desk: Path, missing: str, *words: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    before = {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()}
    assert main([*words]) == 2
    error = capsys.readouterr().err
    assert any(f"{missing}, which is not installed: pip install 'patchlife[{extra}]'" in error for extra in EXTRAS)
    assert {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()} == before
    assert {path.name for path in desk.iterdir()} == {path.relative_to(desk).parts[0] for path in before}


@pytest.mark.parametrize(("format", "missing"), CASES)
@pytest.mark.parametrize("what", [(), ("--budgets", "1.0,0.6"), ("--photos", "photos")])
def test_export(desk, monkeypatch, capsys, format, missing, what):
    _assert_refused(capsys, monkeypatch, desk, missing, "export", photos_and_weights.NAME, "--format", format, *what)


@pytest.mark.parametrize("int8", ["dynamic", "static"])
@pytest.mark.parametrize("what", [(), ("--budgets", "1.0,0.6")])
def test_export_int8(desk, monkeypatch, capsys, int8, what):
    words = ("export", photos_and_weights.NAME, "--format", "openvino", "--int8", int8, "--photos", "photos", *what)
    _assert_refused(capsys, monkeypatch, desk, "nncf", *words)


def test_static_int8_needs_photos(desk, monkeypatch, capsys):
    monkeypatch.setattr("patchlife.extras.installed", lambda package: True)  # nncf may be missing
    assert main(["export", photos_and_weights.NAME, "--format", "openvino", "--int8", "static"]) == 2
    assert "calibrated on photos, got none" in capsys.readouterr().err


def test_static_int8_is_refused_for_onnx(desk, capsys):
    words = ("--int8", "static", "--photos", "photos")
    assert main(["export", photos_and_weights.NAME, *words]) == 2
    assert "--int8 dynamic, or --format openvino" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "missing"), CASES)
@pytest.mark.parametrize("verb", ["predict", "eval"])
def test_an_engine(desk, monkeypatch, capsys, engine, missing, verb):
    words = (photos_and_weights.NAME, "photos", "--engine", engine, "--out", "out.json")
    _assert_refused(capsys, monkeypatch, desk, missing, verb, *words)


def test_an_engine_for_an_interrupted_run(desk, monkeypatch, capsys):
    """Resuming removes a half-written line; this must not happen either."""
    (desk / "out.jsonl").write_text('{"path": "photos/3/00.png", "error": "x"}\n{"pa')
    words = (photos_and_weights.NAME, "photos", "--engine", "onnx", "--out", "out.jsonl", "--resume")
    _assert_refused(capsys, monkeypatch, desk, "onnxruntime", "predict", *words)


@pytest.mark.parametrize(("engine", "missing"), CASES)
def test_bench(desk, monkeypatch, capsys, engine, missing):
    _assert_refused(capsys, monkeypatch, desk, missing, "bench", photos_and_weights.NAME, "--engine", engine)


@pytest.mark.parametrize(("kind", "missing"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_an_exported_file(desk, monkeypatch, capsys, kind, missing, request):
    path = request.getfixturevalue(f"{kind}_file").exported.path
    for verb, out in (("predict", "out.jsonl"), ("eval", "out.json")):
        _assert_refused(capsys, monkeypatch, desk, missing, verb, str(path), "photos", "--out", out)


def test_an_exported_bundle(desk, monkeypatch, capsys, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    export_bundle(exported_models.small(), path, (1.0,), images=exported_models.images(9))
    for verb, out in (("predict", "out.jsonl"), ("eval", "out.json")):
        _assert_refused(capsys, monkeypatch, desk, "onnxruntime", verb, str(path), "photos", "--out", out)


@pytest.mark.parametrize(("format", "missing"), CASES)
def test_from_python(tmp_path, monkeypatch, format, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for call in (lambda out: export(None, out, format), lambda out: export_bundle(None, out, (0.6,), format)):
        extra = "onnx,openvino" if format == "openvino" else "onnx"
        with pytest.raises(MissingExtraError, match=rf"{missing}, .*pip install 'patchlife\[{extra}\]'"):
            call(tmp_path / "folder" / "out")
    assert not list(tmp_path.iterdir())
