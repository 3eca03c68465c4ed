"""``--model-args`` and local folders as MODEL: they apply to the model, the photos and the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from small import NAME, checkpoint, write_photos
from versions import needs_timm

from patchlife.data import read_photo

ARGS = ["global_pool=avg", "in_chans=1"]


@pytest.fixture(scope="session")
def grey(tmp_path_factory) -> list[object]:
    """The arguments that select a model with one input channel and average pooling."""
    file = checkpoint(tmp_path_factory.mktemp("grey") / "vit.safetensors", global_pool="avg", in_chans=1)
    return [NAME, "--checkpoint", file]


def test_a_grey_model_gives_the_probabilities_of_timm(patchlife, grey, photos):
    result = patchlife("predict", *grey, *photos, "--model-args", *ARGS, "--budget", 1, "--top", 10)
    assert result.code == 0, result.err
    vit = timm.create_model(NAME, num_classes=10, global_pool="avg", in_chans=1).eval()
    vit.load_state_dict(load_file(grey[2]))
    config = timm.data.resolve_data_config({"mean": (0.5,), "std": (0.5,)}, pretrained_cfg=vit.pretrained_cfg)
    transform = timm.data.create_transform(**{**config, "input_size": (1, 160, 160), "mean": (0.5,), "std": (0.5,)})
    shown = torch.stack([transform(Image.open(path).convert("L")) for path in photos])
    with torch.no_grad():
        expected = vit(shown).softmax(-1)
    for record, row in zip(result.records, expected, strict=True):
        for entry in record["top"]:
            assert entry["probability"] == pytest.approx(float(row[entry["class"]]), abs=2e-5)


def test_missing_model_arguments_are_named(patchlife, grey, photos):
    result = patchlife("predict", *grey, *photos)
    assert result.code == 2
    assert "If it was built with other arguments, give them: --model-args global_pool=avg in_chans=1" in result.err


def test_every_verb_works_with_a_grey_model(patchlife, grey, tmp_path):
    photos = tmp_path / "photos"
    write_photos(photos / "0", 4)
    out, args = tmp_path / "adapter", ["--model-args", *ARGS]
    fit = ["fit", *grey, photos, "--out", out, "--epochs", 1, "--batch-size", 2, "--budget", 0.8, "--device", "cpu"]
    bench = ["--no-speed", "--data", photos, "--methods", "dense", "--out", tmp_path / "bench"]
    for line in (
        ["info", *grey, *args, "--json"],
        ["draw", *grey, photos, "--out", tmp_path / "pictures", "--strip", *args],
        ["eval", *grey, photos, "--budgets", "1.0,0.6", "--device", "cpu", *args],
        ["bench", *grey, *bench, *args],
        ["export", *grey, "--format", "torch", "--photos", photos, "--out", tmp_path / "m.pt2", *args],
        ["predict", tmp_path / "m.pt2", photos, "--trust"],
        [*fit, *args],
        ["predict", out, photos],
        ["bench", out, *bench],
    ):
        result = patchlife(*line)
        assert result.code == 0, result.err
    origin = json.loads((out / "adapter.json").read_text())["origin"]
    assert origin["options"] == {"global_pool": "avg", "in_chans": 1, "num_classes": 10}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["in_chans=2"], "in_chans must be 3 or 1, got 2"),
        (["pool=avg"], f"{NAME} takes no model argument 'pool'"),
        (["global_pool=mean"], f"timm cannot build {NAME} with the model arguments global_pool=mean"),
        (["img_size=170"], "img_size must be a multiple of the patches' 16 x 16 pixels, got 170"),
        (["pretrained=true"], "pretrained is not an argument of the model; weights come from --checkpoint FILE or"),
        (["a=1", "a=2"], "--model-args gives a twice"),
        (["photos/"], "expected NAME=VALUE, got 'photos/'"),
    ],
)
def test_invalid_model_arguments(args, message, patchlife):
    result = patchlife("info", NAME, "--model-args", *args)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_an_exported_model_takes_no_model_arguments(patchlife, model, photos, tmp_path):
    assert patchlife("export", *model, "--format", "torch", "--out", tmp_path / "m.pt2").code == 0
    result = patchlife("predict", tmp_path / "m.pt2", *photos, "--model-args", "in_chans=1")
    assert result.code == 2
    assert "--model-args was fixed at export" in result.err


def test_images_that_are_not_square(patchlife, model, photos):
    result = patchlife("predict", *model, *photos, "--model-args", "img_size=96,128")
    assert result.code == 0
    assert result.records[0]["kept"][0] == 6 * 8


def test_a_local_folder_in_the_format_of_timm(patchlife, photos, tmp_path, monkeypatch):
    needs_timm("1.0.31", "safetensors in a local folder")
    trained = timm.create_model(NAME, num_classes=3)
    config = {"label_names": ["ant", "bee", "cow"]}
    timm.models.save_for_hf(trained, tmp_path / "mine", config, safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    result = patchlife("predict", "local-dir:mine", *photos, "--top", 3)
    assert result.code == 0, result.err
    assert {entry["label"] for entry in result.records[0]["top"]} == {"ant", "bee", "cow"}
    bench = patchlife("bench", "local-dir:mine", "--no-speed", "--data", labelled(photos), "--methods", "dense")
    assert bench.code == 0, bench.err
    description = json.loads(patchlife("info", "local-dir:mine", "--json").out)
    assert (description["model"], description["weights"]) == (NAME, f"local-dir:{tmp_path / 'mine'}")
    result = patchlife("info", "local-dir:nowhere")
    assert result.code == 2
    assert "local-dir:nowhere: expected a folder with config.json as timm writes it, got No such file" in result.err


def labelled(photos: list[Path]) -> Path:
    """Move the photos into a folder with the name of a class; returns its parent."""
    folder = photos[0].parent / "ant"
    folder.mkdir()
    for path in photos:
        path.rename(folder / path.name)
    assert read_photo(folder / photos[0].name).mode == "RGB"
    return photos[0].parent


def test_a_tag_that_timm_does_not_know(patchlife):
    result = patchlife("info", f"{NAME}.nonsense")
    assert result.code == 2
    assert f"timm has no weights tagged 'nonsense' for {NAME}; tags are {NAME}.r160_in1k" in result.err
    assert "Traceback" not in result.err


def test_export_names_the_option_that_sets_the_mode(patchlife, model, tmp_path):
    result = patchlife("export", *model, "--mode", "adaptive", "--format", "torch", "--out", tmp_path / "m.pt2")
    assert result.code == 2
    assert "give --mode fixed" in result.err
