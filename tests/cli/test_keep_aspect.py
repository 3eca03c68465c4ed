"""``--keep-aspect``: photos keep their own shape and run together, in predict and embed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from small import NAME, checkpoint, photo

import patchlife.runtime.inference as inference
from patchlife import LifeConfig, save, wrap
from patchlife.backbones import Origin
from patchlife.config import ModelConfig
from patchlife.data import Preprocess, read_photo
from patchlife.runtime.opening import open_pipeline

SHAPES = {
    "a tall.png": (60, 180),
    "b wide.png": (240, 80),
    "c square.png": (90, 90),
    "d tiny.png": (2, 1),
    "e turned.jpg": (120, 80),
    "f long.png": (2000, 20),
}
GRIDS = [(17, 5), (5, 17), (10, 10), (7, 14), (12, 8), (1, 100)]  # of at most 10 x 10 patches of 16 x 16 pixels


@pytest.fixture
def shapes(tmp_path) -> list[Path]:
    """Photos of different shapes; one is turned by its EXIF orientation."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for seed, (name, size) in enumerate(SHAPES.items()):
        picture = photo(seed, *size)
        exif = picture.getexif()
        exif[0x0112] = 6 if "turned" in name else 1
        picture.save(folder / name, exif=exif)
    return sorted(folder.iterdir())


def dynamic(file: Path) -> torch.nn.Module:
    vit = timm.create_model(NAME, num_classes=10, dynamic_img_size=True).eval()
    vit.load_state_dict(load_file(file))
    return vit


def probabilities(records: list[dict]) -> torch.Tensor:
    """(photos, classes) of records with all classes."""
    found = [{entry["class"]: entry["probability"] for entry in record["top"]} for record in records]
    return torch.tensor([[row[c] for c in range(10)] for row in found])


def test_predictions_are_those_of_each_photo_alone(patchlife, model, shapes, vit_file):
    result = patchlife("predict", *model, *shapes, "--keep-aspect", "--top", 10, "--batch-size", 4)
    assert result.code == 0, result.err
    vit = dynamic(vit_file)
    slimmed = wrap(vit, LifeConfig(budget=0.6))
    preprocess = Preprocess.from_timm_cfg(vit.pretrained_cfg)
    own = Preprocess(**{**preprocess.to_dict(), "size": preprocess.size, "keep_aspect": (16, 16)})
    with torch.no_grad():
        images = [own(read_photo(path))[None] for path in shapes]
        expected = torch.cat([slimmed(image) for image in images]).softmax(-1)
    assert [(image.shape[2] // 16, image.shape[3] // 16) for image in images] == GRIDS
    torch.testing.assert_close(probabilities(result.records), expected, atol=2e-5, rtol=0)
    for record, (rows, cols) in zip(result.records, GRIDS, strict=True):
        assert record["kept"][0] == rows * cols
        assert 0.55 < record["fraction_of_dense"] <= 0.6
        assert record["flops"] == pytest.approx(
            record["fraction_of_dense"] * slimmed.cost((16 * rows, 16 * cols)).dense
        )


def test_budget_1_is_the_dense_model_at_the_size_of_each_photo(patchlife, model, shapes, vit_file):
    result = patchlife("predict", *model, *shapes, "--keep-aspect", "--top", 10, "--budget", 1)
    vit = dynamic(vit_file)
    pipeline = open_pipeline(ModelConfig(NAME, checkpoint=vit_file), keep_aspect=True)
    with torch.no_grad():
        expected = torch.cat([vit(pipeline.preprocess(read_photo(p))[None]) for p in shapes]).softmax(-1)
    torch.testing.assert_close(probabilities(result.records), expected, atol=2e-5, rtol=0)
    assert [record["fraction_of_dense"] for record in result.records] == [1.0] * len(shapes)


def test_adaptive_mode_is_calibrated_on_the_photos_own_shapes(patchlife, model, tmp_path):
    paths = []
    for seed in range(12):
        paths.append(tmp_path / f"{seed:02}.png")
        photo(seed, *[(90, 60), (60, 90), (80, 80), (100, 95)][seed % 4]).save(paths[-1])
    line = ["predict", *model, *paths, "--keep-aspect", "--mode", "adaptive", "--budget", 0.7, "--top", 10]
    whole, single = patchlife(*line), patchlife(*line, "--batch-size", 1)
    assert whole.code == single.code == 0, whole.err
    assert "calibrated it on 12 of the photos" in whole.err
    torch.testing.assert_close(probabilities(whole.records), probabilities(single.records), atol=2e-5, rtol=0)
    fractions = [record["fraction_of_dense"] for record in whole.records]
    assert sum(fractions) / 12 == pytest.approx(0.7, rel=0.02)
    assert len(set(fractions)) > 4


def test_an_adapter_serves_photos_of_their_own_shape(patchlife, shapes, vit_file, tmp_path):
    """Its thresholds are those of the model's own size; its weights are opened for any size."""
    slimmed = open_pipeline(ModelConfig(NAME, checkpoint=vit_file, life={"budget": 0.7, "mode": "adaptive"})).model
    slimmed.calibrate([torch.randn(8, 3, 160, 160) * torch.linspace(0.2, 2, 8)[:, None, None, None]])
    adapter = save(slimmed, tmp_path / "adapter")
    result = patchlife("predict", adapter, *shapes, "--keep-aspect")
    assert result.code == 0, result.err
    assert "calibrated" not in result.err
    assert [record["kept"][0] for record in result.records] == [rows * cols for rows, cols in GRIDS]
    assert isinstance(slimmed.origin, Origin)


def test_a_shape_without_thresholds_is_an_error_of_its_photo_alone(patchlife, shapes, vit_file, tmp_path):
    slimmed = open_pipeline(ModelConfig(NAME, checkpoint=vit_file, life={"budget": 0.7, "mode": "adaptive"})).model
    slimmed.calibrate([torch.randn(8, 3, 160, 160) * torch.linspace(0.2, 2, 8)[:, None, None, None]])
    adapter = save(slimmed, tmp_path / "adapter")
    photo(7, 900, 30).save(tmp_path / "narrow.png")  # one row of patches, far fewer than the 100 of the calibration
    result = patchlife("predict", adapter, *shapes, tmp_path / "narrow.png", "--keep-aspect")
    assert result.code == 1
    assert ["error" in record for record in result.records] == [False] * len(shapes) + [True]
    assert "no thresholds" in result.records[-1]["error"]


def test_the_demo_and_its_photos(patchlife, shapes):
    result = patchlife("predict", "demo", *shapes, "--keep-aspect")
    assert result.code == 0, result.err
    assert len({record["kept"][0] for record in result.records}) > 2


def test_embeddings(patchlife, shapes, tmp_path):
    file = checkpoint(tmp_path / "headless.safetensors", num_classes=0)
    out = tmp_path / "e.npy"
    result = patchlife("embed", NAME, "--checkpoint", file, *shapes, "--keep-aspect", "--out", out)
    assert result.code == 0, result.err
    pipeline = open_pipeline(ModelConfig(NAME, checkpoint=file), keep_aspect=True)
    with torch.no_grad():
        expected = torch.cat([pipeline.model(pipeline.preprocess(read_photo(p))[None]) for p in shapes])
    np.testing.assert_allclose(np.load(out), expected.numpy(), atol=1e-4)


def test_a_photo_that_fails_does_not_stop_the_others(patchlife, model, shapes, monkeypatch):
    shapes[2].write_bytes(b"")
    real = inference.SlimModel.predict

    def fragile(self, images):
        if any(image.shape[-1] == 1600 for image in images):
            raise RuntimeError("out of memory")
        return real(self, images)

    monkeypatch.setattr(inference.SlimModel, "predict", fragile)
    result = patchlife("predict", *model, *shapes, "--keep-aspect")
    assert result.code == 1
    assert ["error" in record for record in result.records] == [False, False, True, False, False, True]


def test_a_run_with_another_shape_is_another_run(patchlife, model, shapes, tmp_path):
    out = tmp_path / "out.jsonl"
    assert patchlife("predict", *model, *shapes[:3], "--out", out).code == 0
    result = patchlife("predict", *model, *shapes, "--out", out, "--resume", "--keep-aspect")
    assert result.code == 2
    assert "was started with another model or other settings" in result.err


def test_engines_and_exported_files_are_refused(patchlife, model, shapes, tmp_path):
    result = patchlife("predict", *model, *shapes, "--keep-aspect", "--engine", "onnx")
    assert result.code == 2
    assert "--engine onnx runs images of one size; remove one of the two" in result.err
    file = tmp_path / "exported.onnx"
    file.write_bytes(b"")
    for verb in ("predict", "embed"):
        result = patchlife(verb, file, *shapes, "--keep-aspect")
        assert result.code == 2
        assert "exported model, which takes images of one size; remove --keep-aspect" in result.err


@pytest.mark.shared
def test_real_photos(shared, patchlife):
    photos = [sorted(folder.iterdir())[5] for folder in sorted((shared / "data/in20/val").iterdir())]
    weights = shared / "weights/vit_tiny_patch16_224.safetensors"
    line = ["predict", "vit_tiny_patch16_224", *photos, "--checkpoint", weights, "--labelled", "--keep-aspect"]
    result = patchlife(*line, "--budget", 0.61)
    assert result.code == 0
    assert "20 photos, 0 failed, 0.6" in result.err
    for path, record in zip(photos, result.records, strict=True):
        width, height = read_photo(path).size
        assert (record["kept"][0] < 196) == (abs(width / height - 1) > 0.08), (path, width, height)
