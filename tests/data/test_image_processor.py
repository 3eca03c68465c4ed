"""Preprocessing from the settings of transformers' image processors: the pixels are the processor's own.

transformers has two kinds of each processor: by Pillow, with the same pixels exactly, and by torchvision, which rounds
resized pixels differently.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from scenes import scene

from patchlife.data import Preprocess, list_photos, read_photo
from patchlife.errors import ConfigError

EDGE = {"shortest_edge": 224}
SQUARE = {"height": 224, "width": 224}
PROCESSORS = {
    "ViT": transformers.ViTImageProcessor(),
    "ViT, oblong": transformers.ViTImageProcessor(size={"height": 96, "width": 160}, resample=3),
    "DeiT": transformers.DeiTImageProcessor(),
    "CLIP": transformers.CLIPImageProcessor(),
    "CLIP at 336 pixels": transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336),
    "BiT, as DINOv2 has it": transformers.BitImageProcessor(size={"shortest_edge": 256}, crop_size=SQUARE),
    "a crop from 255": transformers.BitImageProcessor(size={"shortest_edge": 255}, crop_size=SQUARE),
    "a crop larger than the photo": transformers.CLIPImageProcessor(size={"shortest_edge": 200}, crop_size=SQUARE),
    "SigLIP": transformers.SiglipImageProcessor(size={"height": 384, "width": 384}),
    "DINOv3": transformers.DINOv3ViTImageProcessor(),
    "no mean and standard deviation": transformers.ViTImageProcessor(do_normalize=False),
    "pixels from 0 to 2": transformers.ViTImageProcessor(rescale_factor=1 / 127.5, image_mean=[1.0, 0.9, 1.1]),
    "pixels from 0 to 255": transformers.ViTImageProcessor(
        do_rescale=False, image_mean=[120.0] * 3, image_std=[60.0] * 3
    ),
    "one number for all channels": transformers.ViTImageProcessor(image_mean=0.4, image_std=0.3),
    "nearest": transformers.ViTImageProcessor(resample=0),
}
SIZES = [(300, 225), (225, 301), (500, 121), (31, 500), (64, 64), (224, 224), (257, 640)]


def difference_in_levels(processor, photo: Image.Image) -> torch.Tensor:
    """Differences of the pixels from those of the processor, in steps of 1/255."""
    preprocess = Preprocess.from_image_processor(processor.to_dict())
    expected = processor(photo, return_tensors="pt")["pixel_values"][0]
    got = preprocess(photo)
    assert got.shape == expected.shape
    return (got - expected) * 255 * torch.tensor(preprocess.std).view(-1, 1, 1)


@pytest.mark.parametrize("name", sorted(PROCESSORS.keys() - {"DINOv3"}))  # of which there is no kind by Pillow
def test_pixels_are_those_of_the_processor_by_pillow(name):
    values = PROCESSORS[name].to_dict()
    processor = getattr(transformers, f"{values.pop('image_processor_type')}Pil")(**values)
    for size in SIZES:
        assert difference_in_levels(processor, scene(*size)).abs().max() < 1e-3, size


@pytest.mark.parametrize("name", sorted(PROCESSORS.keys() - {"nearest"}))  # torchvision takes other pixels
def test_pixels_are_those_of_the_processor_by_torchvision_but_for_rounding(name):
    for size in SIZES:
        _check_rounding(difference_in_levels(PROCESSORS[name], scene(*size)), size)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["ViT", "DeiT", "CLIP", "BiT, as DINOv2 has it", "SigLIP", "DINOv3"])
def test_pixels_of_real_photos_are_those_of_the_processor(name, shared):
    for path in list_photos(shared / "data/in20/val")[::200]:
        _check_rounding(difference_in_levels(PROCESSORS[name], read_photo(path)), path)


def _check_rounding(levels: torch.Tensor, photo: object) -> None:
    levels = levels.abs()
    assert levels.max() < 2.01, photo
    assert (levels > 1.01).float().mean() < 1e-3, photo
    assert levels.mean() < 0.4, photo


def test_a_crop_with_an_odd_margin_is_where_the_processor_cuts_it():
    """A margin of 31 pixels: transformers cuts 15 at the left, timm 16."""
    ramp = Image.fromarray(np.tile(np.arange(255, dtype=np.uint8)[None, :, None], (255, 1, 3)))
    processor = PROCESSORS["a crop from 255"]
    assert difference_in_levels(processor, ramp).abs().max() < 0.5
    nearest = replace(Preprocess.from_image_processor(processor.to_dict()), crop_offset="nearest")
    assert nearest.crop_box(ramp.size)[0] == 16
    assert Preprocess.from_image_processor(processor.to_dict()).crop_box(ramp.size)[0] == 15


def test_every_resized_length_is_exact():
    """``crop_fraction`` is a quotient of floats, and must not lose a pixel of the resized photo."""
    for crop in (48, 224, 336, 384, 518):
        for edge in range(crop, crop + 120):
            values = {**PROCESSORS["CLIP"].to_dict(), "size": {"shortest_edge": edge}, "crop_size": crop}
            preprocess = Preprocess.from_image_processor(values)
            assert preprocess._resized((1000, 800)) == (int(edge * 1000 / 800), edge)


def test_files_of_old_versions_have_one_number_for_a_size():
    values = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    old = Preprocess.from_image_processor({"feature_extractor_type": "ViTFeatureExtractor", "size": 384, **values})
    assert (old.size, old.crop_mode) == ((384, 384), "squash")
    values |= {"do_center_crop": True, "crop_size": 224}
    old = Preprocess.from_image_processor({"feature_extractor_type": "CLIPFeatureExtractor", "size": 256, **values})
    assert (old.size, old.crop_mode) == ((224, 224), "center")
    assert old._resized((400, 300)) == (int(256 * 400 / 300), 256)


def test_a_grey_model_gets_the_mean_over_the_channels():
    values = {**PROCESSORS["ViT"].to_dict(), "image_mean": [0.3, 0.4, 0.5]}
    assert Preprocess.from_image_processor(values, channels=1).mean == (pytest.approx(0.4),)


def test_the_default_offset_is_not_stored():
    """Files and run identities of earlier versions stay as they are."""
    assert "crop_offset" not in Preprocess().to_dict()
    own = Preprocess.from_image_processor(PROCESSORS["CLIP"].to_dict())
    assert own.to_dict()["crop_offset"] == "floor"
    assert Preprocess.from_dict(own.to_dict()) == own


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "supported image processors are ViTImage.*'ConvNextImage"),
        ({"image_processor_type": None}, "supported image processors are ViTImageProcessor, .*, got ''"),
        ({"do_resize": False}, "must resize photos, do_resize, got False"),
        ({"size": {"shortest_edge": 224}}, "size is shortest_edge, so photos differ in shape: do_center_crop must be"),
        ({"size": {"longest_edge": 224}}, "size must be height and width, or shortest_edge, got {'longest_edge': 224}"),
        ({"size": None}, "size must be height and width, or shortest_edge, got {}"),
        (
            {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 112}},
            "with shortest_edge, crop_size must be square",
        ),
        (
            {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 112}},
            "crop_size must be the same part of size in height and in width",
        ),
        ({"image_std": None}, r"has image_mean and image_std; missing, got \['image_std'\]"),
        ({"resample": 9}, "resample must be a number from 0 to 5 of Pillow's filters, got 9"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_image_processor({**PROCESSORS["ViT"].to_dict(), **settings})
