"""A .pt2 file can run code when it is opened: nothing of it runs before somebody says that it is trusted."""

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
from patchlife.runtime.engine import sum_file


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _trap(mark: Path) -> bytes:
    content = io.BytesIO()
    torch.save(Trap(mark), content)
    return content.getvalue()


def _in_the_inputs(parts: dict[str, bytes], mark: Path) -> None:
    """Where torch keeps examples of the inputs."""
    parts["data/sample_inputs/model.pt"] = _trap(mark)


def _in_a_weight(parts: dict[str, bytes], mark: Path) -> None:
    """A weight may be pickled if the list of weights says so."""
    config = json.loads(parts["data/weights/model_weights_config.json"])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    parts["data/weights/model_weights_config.json"] = json.dumps(config).encode()
    parts[f"data/weights/{first['path_name']}"] = _trap(mark)


@pytest.fixture(params=[_in_the_inputs, _in_a_weight])
def trapped(request, torch_file, tmp_path) -> Path:
    """An exported file that was tampered with, its checksum, too."""
    path, mark = tmp_path / "vit.pt2", tmp_path / "mark"
    with zipfile.ZipFile(torch_file.exported.path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    request.param(parts, mark)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(f"{root}/{name}", content)
    sum_file(path).write_text(f"{sha256_of(path)}  {path.name}\n")
    return path


def _ran(path: Path) -> bool:
    return path.with_name("mark").exists()


def _refused(path: Path) -> None:
    with pytest.raises(ExportError, match=r"can run any code when it is opened.*--trust, or .*trust=True"):
        open_engine(path)
    assert not _ran(path)


def test_nothing_runs_without_trust(trapped):
    _refused(trapped)


@pytest.mark.filterwarnings("ignore")
def test_torch_would_have_run_it(trapped):
    """What the refusal is for; torch then finds that this is no model."""
    with pytest.raises(ExportError, match="cannot be read by its engine"):
        open_engine(trapped, trust=True)
    assert _ran(trapped)


@pytest.mark.parametrize("name", ["vit.onnx", "vit.openvino.zip", "vit"])
def test_another_name_is_no_way_round(trapped, name):
    path = trapped.rename(trapped.with_name(name))
    sum_file(path).write_text(f"{sha256_of(path)}  {path.name}\n")
    _refused(path)


def test_the_sum_is_looked_at_first(trapped):
    sum_file(trapped).write_text("0" * 64)
    for trust in (False, True):
        with pytest.raises(ExportError, match="is damaged"):
            open_engine(trapped, trust=trust)
    assert not _ran(trapped)


def test_a_package_is_no_way_round(trapped, tmp_path):
    """A package's graph may be named as torch's, but is never opened as such."""
    package = export_bundle(
        exported_models.small(), tmp_path / "package", (0.7,), images=exported_models.images(9)
    ).path
    metadata = json.loads((package / "bundle.json").read_text())
    metadata["kind"] = "torch"
    (package / "bundle.json").write_text(json.dumps(metadata))
    for name in ("budget-0.7.onnx", "budget-0.7.xml"):
        shutil.copy(trapped, package / name)
    files = [path for path in package.iterdir() if path.name != "SHA256SUMS"]
    (package / "SHA256SUMS").write_text("".join(f"{sha256_of(path)}  {path.name}\n" for path in files))
    for trust in (False, True):
        with pytest.raises(ExportError, match="a package holds onnx or openvino, got torch"):
            open_engine(package, trust=trust)
    assert not _ran(trapped)


@pytest.mark.parametrize("verb", ["predict", "eval", "draw", "info", "bench", "export"])
def test_no_verb_opens_it_unasked(trapped, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    photos_and_weights.write_photos(tmp_path / "photos" / "3", 2)
    photos = ["photos"] if verb in ("predict", "eval", "draw") else []
    assert main([verb, str(trapped), *photos]) == 2
    said = capsys.readouterr().err
    assert not _ran(trapped)
    assert ("open it with --trust" in said) == (verb in ("predict", "eval"))


@pytest.mark.parametrize("verb", ["predict", "eval"])
def test_trust_is_about_exported_files(tmp_path, capsys, verb):
    photos_and_weights.write_photos(tmp_path / "3", 1)
    assert main([verb, photos_and_weights.NAME, str(tmp_path), "--trust"]) == 2
    assert f"--trust is only for exported .pt2 files, got {photos_and_weights.NAME}" in capsys.readouterr().err


def test_other_formats_need_no_trust(onnx_file, openvino_file):
    for shipped in (onnx_file, openvino_file):
        assert (
            open_engine(shipped.exported.path).metadata.kind
            == open_engine(shipped.exported.path, trust=True).metadata.kind
        )
