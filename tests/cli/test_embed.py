"""``patchlife embed``: vectors, formats, photos that cannot be read, and runs that were interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file
from small import NAME, checkpoint, write_photos

import patchlife.runtime.inference as inference
from patchlife import LifeConfig, save, wrap
from patchlife.data import Preprocess, read_photo
from patchlife.slimming import SlimModel

COLUMNS = ["path", "embedding", "flops", "fraction_of_dense", "error", "run"]


@pytest.fixture(scope="session")
def headless_file(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("headless") / "vit.safetensors", num_classes=0)


@pytest.fixture
def headless(headless_file) -> list[object]:
    """The arguments that select a model without a classifier."""
    return [NAME, "--checkpoint", headless_file]


def vit_of(file: Path, classes: int) -> timm.models.VisionTransformer:
    vit = timm.create_model(NAME, num_classes=classes).eval()
    vit.load_state_dict(load_file(file))
    return vit


def images_of(photos: list[Path], vit: torch.nn.Module) -> torch.Tensor:
    preprocess = Preprocess.from_timm_cfg(vit.pretrained_cfg)
    return torch.stack([preprocess(read_photo(photo)) for photo in photos])


def vectors_in(file: Path) -> np.ndarray:
    if file.suffix == ".npy":
        return np.load(file)
    return np.stack(pq.read_table(file)["embedding"].to_numpy(zero_copy_only=False))


@pytest.mark.parametrize("suffix", ["parquet", "npy"])
@pytest.mark.parametrize("classes", [0, 10])
def test_budget_1_gives_what_the_classifier_of_the_dense_model_reads(
    classes, suffix, patchlife, model, headless, vit_file, headless_file, photos, tmp_path
):
    out = tmp_path / f"e.{suffix}"
    result = patchlife("embed", *(model if classes else headless), *photos, "--budget", 1, "--out", out)
    assert (result.code, result.out) == (0, "")
    vit = vit_of(vit_file if classes else headless_file, classes)
    with torch.no_grad():
        expected = vit.forward_head(vit.forward_features(images_of(photos, vit)), pre_logits=True)
        assert classes or torch.equal(expected, vit(images_of(photos, vit)))
    found = vectors_in(out)
    assert found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() < 1e-5
    assert np.abs(found - found[0]).max() > 0.1  # not the same vector for every photo


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_other_budgets_give_the_output_of_the_slimmed_model(mode, patchlife, headless, headless_file, photos, tmp_path):
    vit = vit_of(headless_file, 0)
    slim = wrap(vit, LifeConfig(budget=0.55, mode=mode))
    if mode == "adaptive":
        slim.calibrate([images_of(photos, vit)])
    save(slim, tmp_path / "adapter")
    line = ["embed", tmp_path / "adapter", *photos, "--checkpoint", headless_file, "--batch-size", 3]
    line = line if mode == "adaptive" else ["embed", *headless, *photos, "--budget", 0.55, "--batch-size", 3]
    assert patchlife(*line, "--out", tmp_path / "e.parquet").code == 0
    table = pq.read_table(tmp_path / "e.parquet")
    with torch.no_grad():
        expected, lives = slim.embedding(images_of(photos, vit))
        assert torch.allclose(expected, slim.output(images_of(photos, vit)), atol=1e-6)
    assert np.abs(vectors_in(tmp_path / "e.parquet") - expected.numpy()).max() < 1e-5
    assert table["flops"].to_pylist() == slim.flops_of(lives)
    assert max(table["fraction_of_dense"].to_pylist()) < 0.8


def test_a_table_has_a_row_for_each_photo_in_the_order_of_the_paths(patchlife, model, photos, tmp_path):
    out = tmp_path / "new" / "e.parquet"
    result = patchlife("embed", *model, photos[4], photos[0].parent, "--out", out, "--batch-size", 2)
    assert result.code == 0
    table = pq.read_table(out)
    assert table.column_names == COLUMNS
    assert str(table.schema.field("embedding").type) == "list<element: float>"
    assert table["path"].to_pylist() == [str(photos[i]) for i in (4, 0, 1, 2, 3, 5, 6)]
    assert table["error"].to_pylist() == [None] * 7
    assert "7 photos, 0 failed" in result.err
    assert f"embeddings: {out}" in result.err
    assert [path.name for path in out.parent.iterdir()] == ["e.parquet"]  # nothing is left beside it


def test_normalized_embeddings_have_length_1_and_the_same_direction(patchlife, model, photos, tmp_path):
    for name, options in (("plain", []), ("unit", ["--normalize"])):
        assert patchlife("embed", *model, *photos, "--out", tmp_path / f"{name}.npy", *options).code == 0
    plain, unit = np.load(tmp_path / "plain.npy"), np.load(tmp_path / "unit.npy")
    lengths = np.linalg.norm(plain, axis=1, keepdims=True)
    assert lengths.min() > 1.5
    assert np.abs(unit - plain / lengths).max() < 1e-6


@pytest.mark.parametrize("suffix", ["parquet", "npy"])
def test_photos_that_cannot_be_read_cost_their_own_row_only(suffix, patchlife, model, photos, tmp_path):
    assert patchlife("embed", *model, *photos, "--out", tmp_path / f"good.{suffix}").code == 0
    good = vectors_in(tmp_path / f"good.{suffix}")
    photos[0].write_bytes(b"")
    photos[4].write_bytes(photos[4].read_bytes()[:200])
    out = tmp_path / f"e.{suffix}"
    result = patchlife("embed", *model, *photos, "--out", out, "--batch-size", 3)
    assert result.code == 1
    assert "7 photos, 2 failed (the first: " in result.err
    if suffix == "npy":
        found = np.load(out)
        rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
        assert np.isnan(found[[0, 4]]).all()
        assert [list(row) for row in rows] == [
            ["path", "error", "run"] if i in (0, 4) else ["path", *COLUMNS[2:4], "run"] for i in range(7)
        ]
    else:
        rows = pq.read_table(out).to_pylist()
        assert [rows[i]["embedding"] for i in (0, 4)] == [None, None]
        assert rows[0]["flops"] is None
        found = np.stack([row["embedding"] or np.full(64, np.nan) for row in rows])
    assert [row["path"] for row in rows] == list(map(str, photos))
    assert "found an empty file" in rows[0]["error"]
    assert "found a damaged file" in rows[4]["error"]
    readable = [1, 2, 3, 5, 6]
    assert np.abs(found[readable] - good[readable]).max() < 1e-5


@pytest.mark.parametrize("suffix", ["parquet", "npy"])
def test_no_photo_can_be_read(suffix, patchlife, model, photos, tmp_path):
    for path in photos:
        path.write_bytes(b"")
    out = tmp_path / f"e.{suffix}"
    assert patchlife("embed", *model, *photos, "--out", out).code == 1
    assert len(np.load(out) if suffix == "npy" else pq.read_table(out)) == 7
    assert patchlife("embed", *model, *photos, "--out", out, "--resume").code == 1


def test_a_batch_too_large_is_halved_until_it_fits(patchlife, model, photos, tmp_path, monkeypatch):
    assert patchlife("embed", *model, *photos, "--out", tmp_path / "a.npy").code == 0
    real = SlimModel.embedding

    def small_memory(self, images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB\nand more lines")
        return real(self, images)

    monkeypatch.setattr(SlimModel, "embedding", small_memory)
    assert patchlife("embed", *model, *photos, "--out", tmp_path / "b.npy").code == 0
    assert np.abs(np.load(tmp_path / "a.npy") - np.load(tmp_path / "b.npy")).max() < 1e-5


def test_nan_in_one_photo_does_not_change_the_others(patchlife, model, photos, tmp_path, monkeypatch):
    assert patchlife("embed", *model, *photos, "--out", tmp_path / "a.npy").code == 0
    real = inference.load_batches

    def poisoned(*args, **kwargs):
        for batch in real(*args, **kwargs):
            batch.images[2] = torch.nan
            yield batch

    monkeypatch.setattr(inference, "load_batches", poisoned)
    result = patchlife("embed", *model, *photos, "--out", tmp_path / "b.npy")
    assert result.code == 1
    assert "the model's embedding is NaN or infinite" in result.err
    others = [0, 1, 3, 4, 5, 6]
    assert np.abs(np.load(tmp_path / "a.npy")[others] - np.load(tmp_path / "b.npy")[others]).max() < 1e-5


# ---- continuing a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, vit_file) -> tuple[list[str], dict[str, bytes], bytes]:
    """(command line, files of a finished run by suffix, its journal) for five photos; one cannot be read."""
    from patchlife.cli.main import main

    folder = tmp_path_factory.mktemp("finished")
    photos = write_photos(folder / "photos", 5)
    photos[1].write_bytes(b"no photo")
    line = ["embed", NAME, "--checkpoint", str(vit_file), str(photos[0].parent), "--batch-size", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # the journal is kept
        assert main([*line, "--out", str(folder / "e.parquet")]) == 1
    journal = (folder / "e.parquet.partial.jsonl").read_bytes()
    assert main([*line, "--out", str(folder / "e.npy")]) == 1
    return line, {path.suffix: path.read_bytes() for path in folder.glob("e.*") if "partial" not in path.name}, journal


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.4, 0.63, 0.99, 1.0])
def test_a_journal_cut_anywhere_is_completed(kept, finished, tmp_path, patchlife):
    line, files, journal = finished
    out = tmp_path / "e.parquet"
    (tmp_path / "e.parquet.partial.jsonl").write_bytes(journal[: int(kept * len(journal))])
    assert patchlife(*line, "--out", out, "--resume").code == 1
    assert out.read_bytes() == files[".parquet"]
    assert [path.name for path in tmp_path.iterdir()] == ["e.parquet"]


KILLED = """
import os, signal, sys
import patchlife.runtime.inference as inference
from patchlife.cli.main import main
real = inference.load_batches
def deadly(*args, **kwargs):
    for count, batch in enumerate(real(*args, **kwargs)):
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
inference.load_batches = deadly
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_after_kill_9_the_run_continues_without_repeating_a_photo(finished, tmp_path, patchlife, monkeypatch):
    line, files, _ = finished
    out = tmp_path / "e.npy"
    killed = subprocess.run([sys.executable, "-c", KILLED, *line, "--out", str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["e.npy.partial.jsonl"]
    refused = patchlife(*line, "--out", out)
    assert refused.code == 2
    assert "holds the results of an interrupted run; continue it with --resume, or delete it" in refused.err
    seen: list[int] = []
    real = inference.load_batches
    monkeypatch.setattr(
        inference, "load_batches", lambda paths, *args: real(paths, *args) if not seen.append(len(paths)) else None
    )
    assert patchlife(*line, "--out", out, "--resume").code == 1
    assert seen == [2]  # of five photos, three were done
    assert out.read_bytes() == files[".npy"]
    assert out.with_suffix(".jsonl").read_bytes() == files[".jsonl"]


def test_a_failed_conversion_is_repeated_by_resume(finished, tmp_path, patchlife, monkeypatch):
    line, files, _ = finished
    out = tmp_path / "e.npy"
    real = os.replace

    def full(source, target):
        if Path(target) == out:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        result = patchlife(*line, "--out", out)
    assert (result.code, "No space left" in result.err) == (2, True)
    assert not out.exists()
    assert patchlife(*line, "--out", out, "--resume").code == 1
    assert out.read_bytes() == files[".npy"]


@pytest.mark.parametrize("suffix", ["parquet", "npy"])
def test_resuming_a_finished_run_adds_new_photos_only(suffix, patchlife, model, photos, tmp_path):
    line, whole, out = ["embed", *model], tmp_path / f"whole.{suffix}", tmp_path / f"e.{suffix}"
    photos[0].write_bytes(b"no photo")
    assert patchlife(*line, *photos, "--out", whole, "--batch-size", 1).code == 1
    assert patchlife(*line, *photos[:4], "--out", out, "--batch-size", 1).code == 1
    first = out.read_bytes()
    result = patchlife(*line, *photos[:4], "--out", out, "--resume")
    assert (result.code, "4 photos, 1 failed" in result.err) == (1, True)
    assert out.read_bytes() == first
    assert patchlife(*line, *photos, "--out", out, "--batch-size", 1, "--resume").code == 1
    assert out.read_bytes() == whole.read_bytes()
    if suffix == "npy":
        assert out.with_suffix(".jsonl").read_bytes() == whole.with_suffix(".jsonl").read_bytes()


@pytest.mark.parametrize("options", [["--budget", 0.5], ["--normalize"]])
def test_resuming_with_other_settings_is_refused(options, finished, tmp_path, patchlife):
    line, _, journal = finished
    (tmp_path / "e.parquet.partial.jsonl").write_bytes(journal[:-30])
    result = patchlife(*line, "--out", tmp_path / "e.parquet", "--resume", *options)
    assert result.code == 2
    assert "was started with another model or other settings" in result.err


@pytest.mark.parametrize("name", ["e.parquet", "e.npy", "e.jsonl"])
def test_an_existing_file_is_not_overwritten(name, finished, tmp_path, patchlife):
    line, *_ = finished
    (tmp_path / name).write_bytes(b"mine")
    out = tmp_path / name.replace("jsonl", "npy")
    for options in ([], ["--resume"]):
        result = patchlife(*line, "--out", out, *options)
        assert result.code == 2
        assert "already exists" in result.err or "is not a result" in result.err or "are not a result" in result.err
        assert (tmp_path / name).read_bytes() == b"mine"


def test_a_parquet_file_of_another_program_is_not_continued(finished, tmp_path, patchlife):
    import pyarrow as pa

    line, *_ = finished
    out = tmp_path / "e.parquet"
    pq.write_table(pa.table({"sales": [1, 2]}), out)
    result = patchlife(*line, "--out", out, "--resume")
    assert result.code == 2
    assert "is not a result of patchlife (its columns are sales); it was not changed" in result.err


# ---- models and errors


def test_predict_on_a_model_without_classifier_points_to_embed(patchlife, headless, photos):
    result = patchlife("predict", *headless, *photos)
    assert result.code == 2
    assert "has no classifier, so it gives embeddings: write them with patchlife embed" in result.err


def test_a_model_that_gives_a_vector_for_each_patch_is_refused(patchlife, headless, photos, tmp_path):
    result = patchlife("embed", *headless, *photos, "--model-args", "global_pool=", "--out", tmp_path / "e.npy")
    assert result.code == 2
    result = patchlife("embed", *headless, *photos, "--model-args", "global_pool=''", "--out", tmp_path / "e.npy")
    assert result.code == 2
    assert "gives a vector for each patch, not one for the photo" in result.err


def test_the_output_must_be_a_table(patchlife, model, photos, tmp_path):
    result = patchlife("embed", *model, *photos, "--out", tmp_path / "e.csv")
    assert result.code == 2
    assert "--out must end in .parquet or .npy, got " in result.err
    result = patchlife("predict", *model, *photos, "--out", tmp_path / "e.npy")
    assert "predictions are not written to .npy files" in result.err


@pytest.mark.slow
def test_an_exported_file_of_a_model_without_classifier_gives_the_same_embeddings(
    patchlife, headless_file, photos, tmp_path, model
):
    from patchlife.export import export

    pytest.importorskip("onnxruntime")
    slim = wrap(vit_of(headless_file, 0), LifeConfig(budget=0.6)).eval()
    export(slim, tmp_path / "m.onnx")
    assert patchlife("embed", tmp_path / "m.onnx", *photos, "--out", tmp_path / "e.npy").code == 0
    with torch.no_grad():
        expected = slim.output(images_of(photos, slim.unwrap()))
    assert np.abs(np.load(tmp_path / "e.npy") - expected.numpy()).max() < 1e-4
    assert "write them with patchlife embed" in patchlife("predict", tmp_path / "m.onnx", *photos).err
    assert patchlife("export", *model, "--out", tmp_path / "c.onnx").code == 0
    assert "is an exported classifier" in patchlife("embed", tmp_path / "c.onnx", *photos).err
