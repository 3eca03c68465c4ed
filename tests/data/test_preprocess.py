from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import scene
from versions import needs_timm

from patchlife.data import Preprocess, list_photos, read_photo
from patchlife.errors import ConfigError

AUGREG = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
}
DINOV2 = {"input_size": (3, 518, 518), "crop_pct": 1.0, "interpolation": "bicubic"}
SQUASH = {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear"}
BORDER = {"input_size": (3, 224, 224), "crop_pct": 0.95, "crop_mode": "border", "mean": (0.2, 0.4, 0.6)}
OBLONG = {"input_size": (3, 96, 160), "crop_pct": 0.875, "crop_mode": "center"}
ZOOMED_OUT = {"input_size": (3, 224, 224), "crop_pct": 1.15}
CFGS = [AUGREG, DINOV2, SQUASH, BORDER, OBLONG, {**OBLONG, "crop_mode": "border"}, ZOOMED_OUT]


def timm_transform(cfg: dict):
    from timm.data import create_transform, resolve_data_config

    if cfg == OBLONG:
        needs_timm("1.0.31", "oblong images resized with the requested interpolation")
    return create_transform(**resolve_data_config({}, pretrained_cfg=cfg))


@pytest.mark.parametrize("cfg", CFGS)
@pytest.mark.parametrize("size", [(300, 225), (225, 301), (500, 120), (31, 500), (64, 64), (1, 1), (224, 224)])
def test_all_pixels_equal_those_of_timm(cfg, size):
    photo = scene(*size)
    assert torch.equal(Preprocess.from_timm_cfg(cfg)(photo), timm_transform(cfg)(photo))


@pytest.mark.shared
@pytest.mark.parametrize("cfg", CFGS)
def test_all_pixels_equal_those_of_timm_on_real_photos(cfg, shared):
    preprocess, reference = Preprocess.from_timm_cfg(cfg), timm_transform(cfg)
    for path in list_photos(shared / "data/in20/val")[::100]:
        with Image.open(path) as photo:
            assert torch.equal(preprocess(read_photo(path)), reference(photo.convert("RGB")))


def test_missing_values_of_a_cfg_are_the_defaults_of_timm():
    assert Preprocess.from_timm_cfg({}) == Preprocess()
    assert Preprocess.from_timm_cfg({"input_size": None, "crop_pct": None, "mean": None}) == Preprocess()
    with_other_keys = {**AUGREG, "num_classes": 1000, "pool_size": None, "license": "apache-2.0"}
    assert Preprocess.from_timm_cfg(with_other_keys).mean == (0.5, 0.5, 0.5)


def test_dict_and_json_round_trip():
    preprocess = Preprocess.from_timm_cfg(BORDER)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert Preprocess.from_dict({}) == Preprocess()
    assert hash(Preprocess.from_dict(preprocess.to_dict())) == hash(preprocess)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": [224]}, r"size must be \(height, width\).*got \(224,\)"),
        ({"size": [0, 224]}, r"size must be \(height, width\)"),
        ({"crop_fraction": 90}, r"crop_fraction must be in \(0, 2\].*got 90"),
        ({"crop_mode": "random"}, "crop_mode must be one of center, squash, border, got 'random'"),
        ({"interpolation": "random"}, "interpolation must be one of nearest, bilinear, bicubic"),
        ({"mean": [0.5, 0.5]}, r"mean must be three numbers.*, or one number for grey, got \(0\.5, 0\.5\)"),
        ({"mean": [0.5]}, r"std must be one positive number, because mean has 1, got \(0\.229, "),
        ({"std": [0.5, 0, 0.5]}, "std must be three positive numbers"),
        ({"crop_pct": 0.9}, r"the fields are size, crop_fraction.*got \['crop_pct'\]"),
        ({"size": "large"}, "preprocessing:"),
        ({"crop_fraction": "0.9"}, "expected numbers, got"),
    ],
)
def test_invalid_values(values, message):
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_dict(values)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_an_unsupported_number_of_channels(channels):
    message = f"in_chans must be 3 or 1, got {channels}"
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_timm_cfg({"input_size": (channels, 28, 28)})
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_timm_cfg({}, channels)


@pytest.mark.parametrize("cfg", [AUGREG, {**BORDER, "mean": (0.3,), "std": [0.2]}])
def test_the_input_of_a_grey_model_equals_that_of_timm(cfg):
    """timm converts a photo to grey before it resizes it, and averages the mean and std of three colours."""
    photo = scene(300, 200)
    grey = Preprocess.from_timm_cfg(cfg, channels=1)
    mean, std = (sum(values) / len(values) for values in (cfg["mean"], cfg.get("std", Preprocess.std)))
    assert (grey.mean, grey.std) == ((pytest.approx(mean),), (pytest.approx(std),))
    colour = Preprocess.from_dict({**grey.to_dict(), "mean": 3 * [mean], "std": 3 * [std]})
    expected = colour(photo.convert("L").convert("RGB"))
    assert grey(photo).shape == (1, 224, 224)
    assert torch.equal(grey(photo)[0], expected[1])
    assert grey.shown(photo).mode == "RGB"
    assert Preprocess.from_dict(json.loads(json.dumps(grey.to_dict()))) == grey
    assert grey.normalise([]).shape == (0, 1, 224, 224)


def test_one_mean_of_a_cfg_applies_to_three_channels():
    assert Preprocess.from_timm_cfg({"mean": (0.5,), "std": (0.2,)}).mean == (0.5, 0.5, 0.5)
    assert Preprocess.from_timm_cfg({"input_size": (1, 28, 28)}).channels == 1


def test_other_modes_are_converted():
    grey = scene().convert("L")
    assert torch.equal(Preprocess()(grey), Preprocess()(grey.convert("RGB")))


# --- the picture before normalisation


def test_shown_is_what_is_normalised():
    preprocess = Preprocess.from_timm_cfg(AUGREG)
    shown = preprocess.shown(scene(300, 200))
    assert shown.size == (224, 224)
    from_shown = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(preprocess(scene(300, 200)), from_shown)


@pytest.mark.parametrize(
    ("mode", "fraction", "box"),
    [
        ("center", 1.0, (50, 0, 250, 200)),
        ("center", 0.5, (100, 50, 200, 150)),
        ("squash", 1.0, (0, 0, 300, 200)),
        ("squash", 0.5, (75, 50, 225, 150)),
        ("border", 1.0, (0, -50, 300, 250)),
    ],
)
def test_crop_box_in_photo_coordinates(mode, fraction, box):
    preprocess = Preprocess(size=(100, 100), crop_mode=mode, crop_fraction=fraction)
    assert preprocess.crop_box((300, 200)) == pytest.approx(box, abs=3)  # one pixel of the model's


def test_crop_box_is_the_box_of_shown():
    preprocess, photo = Preprocess.from_timm_cfg(AUGREG), scene(640, 400)
    box = tuple(round(edge) for edge in preprocess.crop_box(photo.size))
    cropped = photo.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
    difference = np.asarray(cropped, dtype=int) - np.asarray(preprocess.shown(photo), dtype=int)
    assert np.abs(difference).max() <= 6


@pytest.mark.parametrize("cfg", [AUGREG, SQUASH, BORDER, OBLONG])
@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (3, 60001)])
def test_extreme_shapes_stay_small(cfg, size):
    preprocess = Preprocess.from_timm_cfg(cfg)
    assert preprocess(scene(*size)).shape == (3, *preprocess.size)
    trimmed = preprocess._resized(preprocess._trimmed(scene(*size)).size)
    assert trimmed[0] * trimmed[1] <= 17_000_000


def test_trimming_does_not_change_the_input(monkeypatch):
    """A long photo gives the same input with and without its ends cut off."""
    preprocess, photo = Preprocess.from_timm_cfg(AUGREG), scene(9, 3000)
    whole = preprocess.shown(photo)
    monkeypatch.setattr("patchlife.data.preprocess._LARGEST_RESIZED", 1_000_000)
    assert preprocess._trimmed(photo).size[1] < 200
    difference = np.asarray(whole, dtype=int) - np.asarray(preprocess.shown(photo), dtype=int)
    assert np.abs(difference).max() <= 1


def test_settings_do_not_import_torch():
    code = "import sys, patchlife.data; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_size_can_be_replaced():
    assert replace(Preprocess(), size=(64, 96))(scene()).shape == (3, 64, 96)
