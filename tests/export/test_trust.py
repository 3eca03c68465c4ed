"""A .pt2 file can run code when it is opened, so it is opened only with --trust or trust=True."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import exported_models
import pytest
import small as photos_and_weights
import torch

from patchlife.cli.main import main
from patchlife.errors import ExportError
from patchlife.export import export_bundle
from patchlife.io.files import sha256_of
from patchlife.runtime import open_engine
from patchlife.runtime.engine import checksum_file

pytestmark = pytest.mark.slow  # each graph is exported by torch


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _trap(mark: Path) -> bytes:
    content = io.BytesIO()
    torch.save(Trap(mark), content)
    return content.getvalue()


def _in_the_inputs(parts: dict[str, bytes], mark: Path) -> None:
    """In the file where torch stores example inputs."""
    parts["data/sample_inputs/model.pt"] = _trap(mark)


def _in_a_weight(parts: dict[str, bytes], mark: Path) -> None:
    """In a weight, marked as pickled in the list of weights."""
    config = json.loads(parts["data/weights/model_weights_config.json"])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    parts["data/weights/model_weights_config.json"] = json.dumps(config).encode()
    parts[f"data/weights/{first['path_name']}"] = _trap(mark)


@pytest.fixture(params=[_in_the_inputs, _in_a_weight])
def trapped(request, torch_file, tmp_path) -> Path:
    """An exported file that was tampered with, with a matching checksum."""
    path, mark = tmp_path / "vit.pt2", tmp_path / "mark"
    with zipfile.ZipFile(torch_file.exported.path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    request.param(parts, mark)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(f"{root}/{name}", content)
    checksum_file(path).write_text(f"{sha256_of(path)}  {path.name}\n")
    return path


def _code_ran(path: Path) -> bool:
    return path.with_name("mark").exists()


def _assert_refused(path: Path) -> None:
    with pytest.raises(ExportError, match=r"can run any code when it is opened.*--trust, or .*trust=True"):
        open_engine(path)
    assert not _code_ran(path)


def test_nothing_runs_without_trust(trapped):
    _assert_refused(trapped)


@pytest.mark.filterwarnings("ignore")
def test_with_trust_the_code_runs(trapped):
    """Shows that the trap works; torch then fails because the file is no model."""
    with pytest.raises(ExportError, match="cannot be read by its engine"):
        open_engine(trapped, trust=True)
    assert _code_ran(trapped)


@pytest.mark.parametrize("name", ["vit.onnx", "vit.openvino.zip", "vit"])
def test_renaming_the_file_does_not_avoid_the_refusal(trapped, name):
    path = trapped.rename(trapped.with_name(name))
    checksum_file(path).write_text(f"{sha256_of(path)}  {path.name}\n")
    _assert_refused(path)


def test_the_checksum_is_verified_first(trapped):
    checksum_file(trapped).write_text("0" * 64)
    for trust in (False, True):
        with pytest.raises(ExportError, match="is damaged"):
            open_engine(trapped, trust=trust)
    assert not _code_ran(trapped)


def test_a_bundle_never_opens_a_torch_graph(trapped, tmp_path):
    """Even if its metadata names torch as the engine."""
    bundle = export_bundle(exported_models.small(), tmp_path / "bundle", (0.7,), images=exported_models.images(9)).path
    metadata = json.loads((bundle / "bundle.json").read_text())
    metadata["kind"] = "torch"
    (bundle / "bundle.json").write_text(json.dumps(metadata))
    for name in ("budget-0.7.onnx", "budget-0.7.xml"):
        shutil.copy(trapped, bundle / name)
    files = [path for path in bundle.iterdir() if path.name != "SHA256SUMS"]
    (bundle / "SHA256SUMS").write_text("".join(f"{sha256_of(path)}  {path.name}\n" for path in files))
    for trust in (False, True):
        with pytest.raises(ExportError, match="onnx or openvino graphs, got torch"):
            open_engine(bundle, trust=trust)
    assert not _code_ran(trapped)


@pytest.mark.parametrize("verb", ["predict", "eval", "draw", "info", "bench", "export"])
def test_no_command_opens_it_without_trust(trapped, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    photos_and_weights.write_photos(tmp_path / "photos" / "3", 2)
    photos = ["photos"] if verb in ("predict", "eval", "draw") else []
    assert main([verb, str(trapped), *photos]) == 2
    error = capsys.readouterr().err
    assert not _code_ran(trapped)
    assert ("open it with --trust" in error) == (verb in ("predict", "eval"))


@pytest.mark.parametrize("verb", ["predict", "eval"])
def test_trust_is_refused_for_other_models(tmp_path, capsys, verb):
    photos_and_weights.write_photos(tmp_path / "3", 1)
    assert main([verb, photos_and_weights.NAME, str(tmp_path), "--trust"]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in ("trust", ".pt2", photos_and_weights.NAME))


def test_other_formats_need_no_trust(onnx_file, openvino_file):
    for exported_model in (onnx_file, openvino_file):
        assert (
            open_engine(exported_model.exported.path).metadata.kind
            == open_engine(exported_model.exported.path, trust=True).metadata.kind
        )
