"""Resize, crop and normalise photos for a backbone, as the evaluation transforms of the model libraries do.

The pixels are those of timm's transform, and, but for the rounding of the resized pixels, of transformers' processors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, get_args
from typing import Literal as OneOf

from PIL import Image

from ..errors import ConfigError
from .image_processor import check_setting, processor_filter, processor_geometry, processor_scale
from .reading import as_rgb

if TYPE_CHECKING:  # settings are also read by code that must start without torch
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Preprocess"]

Box = tuple[float, float, float, float]
CropMode = OneOf["center", "squash", "border"]
CropOffset = OneOf["nearest", "floor"]
Interpolation = OneOf["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]

# A 1 x 20000 photo resized to a short side of 224 would have a billion pixels. If a resized photo would have more
# pixels than this, the ends of its long side are cut off first; the crop takes only the middle anyway.
_LARGEST_RESIZED = 16_000_000


@dataclass(frozen=True)
class Preprocess:
    """The settings that turn a photo into the backbone's input.

    Attributes:
        size: (height, width) of the input, in pixels.
        crop_fraction: side of the crop relative to the resized photo; 0.9 trims 5 % at each edge.
        crop_mode: "center": keep the aspect ratio, cut the longer side. "squash": ignore the aspect ratio.
            "border": keep the aspect ratio and the whole photo, pad with the mean colour.
        interpolation: the Pillow name of the resampling filter.
        mean: per channel (red, green, blue), on a scale of 0 to 1, subtracted; a single number makes the input grey.
        std: per channel, on the same scale, divided by.
        crop_offset: how the position of the crop is rounded to whole pixels: "nearest" (timm, torchvision; halves to
            even numbers) or "floor" (transformers).
        keep_aspect: None, or the model's patch size (height, width) in pixels. With it each photo keeps its own shape,
            see `for_photo`; then inputs have different sizes, and ``size`` says only how many pixels they have.
    """

    size: tuple[int, int] = (224, 224)
    crop_fraction: float = 0.875
    crop_mode: CropMode = "center"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_offset: CropOffset = "nearest"
    keep_aspect: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_setting(len(self.size) == 2 and min(self.size) >= 1, "size must be (height, width)", self.size)
        check_setting(0 < self.crop_fraction <= 2, "crop_fraction must be in (0, 2]", self.crop_fraction)
        kinds_of = {"crop_mode": CropMode, "interpolation": Interpolation, "crop_offset": CropOffset}
        for field, kinds in kinds_of.items():
            check_setting(
                getattr(self, field) in get_args(kinds),
                f"{field} must be one of {', '.join(get_args(kinds))}",
                getattr(self, field),
            )
        check_setting(
            len(self.mean) in (1, 3),
            "mean must be three numbers for red, green, blue, or one number for grey",
            self.mean,
        )
        wanted = "one positive number" if self.channels == 1 else "three positive numbers"
        fits = len(self.std) == self.channels and min(self.std) > 0
        check_setting(fits, f"std must be {wanted}, because mean has {self.channels}", self.std)
        patch = self.keep_aspect
        fits = patch is None or (len(patch) == 2 and min(patch) >= 1)
        check_setting(fits, "keep_aspect must be None or a patch size (height, width)", patch)

    @property
    def channels(self) -> int:
        """The number of input channels: 3 for colour, 1 for grey."""
        return len(self.mean)

    @classmethod
    def from_timm_cfg(cls, cfg: Mapping[str, Any], channels: int | None = None) -> Preprocess:
        """Convert a timm ``pretrained_cfg``. Keys that are missing or None take timm's defaults.

        Args:
            cfg: a mapping with any of the keys input_size, crop_pct, crop_mode, interpolation, mean, std.
            channels: input channels of the model, if they differ from ``cfg``. For a grey model, the three values of
                mean and std are averaged.

        Raises:
            ConfigError: a value that is not supported, such as an input with 2 channels.
        """
        cfg_channels, *size = cfg.get("input_size") or (3, 224, 224)
        channels = cfg_channels if channels is None else channels
        check_setting(
            channels in (1, 3), "a photo has 3 channels, or 1 if made grey, so in_chans must be 3 or 1", channels
        )
        same_names = {name: cfg.get(name) for name in ("crop_mode", "interpolation")}
        values = {"size": size, "crop_fraction": cfg.get("crop_pct"), **same_names}
        for name in ("mean", "std"):
            values[name] = _per_channel(cfg.get(name) or getattr(cls, name), channels)
        return cls.from_dict({name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_image_processor(cls, values: Mapping[str, Any], channels: int = 3) -> Preprocess:
        """Convert the settings of an image processor of transformers, as its ``to_dict()`` gives them.

        Args:
            values: settings of a processor for ViT, DeiT, BiT (DINOv2), CLIP, SigLIP or DINOv3.
            channels: input channels of the model: 3, or 1 for a grey model.

        Raises:
            ConfigError: a processor or a setting that is not supported, such as an image size that varies.
        """
        check_setting(
            channels in (1, 3), "a photo has 3 channels, or 1 if made grey, so num_channels must be 3 or 1", channels
        )
        size, fraction, mode = processor_geometry(values)
        mean, std = processor_scale(values)
        return cls(
            size,
            fraction,
            mode,
            processor_filter(values.get("resample")),
            _per_channel(mean, channels),
            _per_channel(std, channels),
            "floor",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Build the settings from the values of `to_dict`; missing fields take their defaults.

        Raises:
            ConfigError: an unknown field, or an invalid value.
        """
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        check_setting(not unknown, f"the fields are {', '.join(cls.__dataclass_fields__)}", unknown)
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        try:
            return cls(**fields)
        except TypeError as error:  # text where a number is expected
            raise ConfigError(f"preprocessing: expected numbers, got {dict(values)}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON; without defaults that older files do not have."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        newer = (("crop_offset", "nearest"), ("keep_aspect", None))
        return {name: v for name, v in values.items() if (name, v) not in newer}

    def __call__(self, photo: Image.Image) -> Float[Tensor, "channels height width"]:
        """Turn one photo into the backbone's input."""
        return self.normalise([self.shown(photo)])[0]

    def for_photo(self, photo_size: tuple[int, int]) -> Preprocess:
        """These settings for one photo: with ``keep_aspect`` at the size that this photo gets, else unchanged.

        The size has as many pixels as ``size`` at most, in whole patches. Of the sizes next to the photo's own shape
        it is the one that shows most of the photo; the rest, less than a patch at each edge, is cut off. A photo that
        is longer than a row of all patches is cut to that row.

        Args:
            photo_size: (width, height) of the photo, in pixels.
        """
        if self.keep_aspect is None:
            return self
        rows, cols = self.keep_aspect
        size = _grid_like(photo_size[1] / rows, photo_size[0] / cols, (self.size[0] // rows) * (self.size[1] // cols))
        return replace(
            self, size=(size[0] * rows, size[1] * cols), crop_fraction=1.0, crop_mode="center", keep_aspect=None
        )

    def normalise(self, shown: Sequence[Image.Image]) -> Float[Tensor, "batch channels height width"]:
        """Turn pictures of `shown`, which are already resized and cropped, into the backbone's input.

        The pictures have one size: with ``keep_aspect`` give those of one photo.
        """
        import numpy as np
        import torch

        if not shown:
            return torch.empty(0, self.channels, *self.size)
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in shown]))
        pixels = pixels[..., : self.channels]  # the three channels of a grey picture are equal
        unit = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)  # (B, C, H, W) in [0, 1]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return unit.sub_(mean).div_(std)

    def shown(self, photo: Image.Image) -> Image.Image:
        """The photo, resized and cropped to ``size``, before normalisation; in RGB mode even for a grey model."""
        if self.keep_aspect:
            return self.for_photo(photo.size).shown(photo)
        photo = self._trimmed(photo if photo.mode == "RGB" else as_rgb(photo))
        if self.channels == 1:
            photo = photo.convert("L").convert("RGB")
        resized, (left, top, right, bottom) = self._geometry(photo.size)
        visible = (max(left, 0), max(top, 0), min(right, resized[0]), min(bottom, resized[1]))
        part = photo.resize(resized, Image.Resampling[self.interpolation.upper()]).crop(visible)
        picture = Image.new("RGB", (right - left, bottom - top), self._fill())
        picture.paste(part, (visible[0] - left, visible[1] - top))
        return picture

    def crop_box(self, photo_size: tuple[int, int]) -> Box:
        """The part of a photo that becomes the model's input.

        Args:
            photo_size: (width, height) of the photo, in pixels.

        Returns:
            (left, top, right, bottom) in pixels of the photo, not rounded. The box extends beyond the photo where the
            photo is padded.
        """
        (width, height), (left, top, right, bottom) = self.for_photo(photo_size)._geometry(photo_size)
        x, y = photo_size[0] / width, photo_size[1] / height
        return left * x, top * y, right * x, bottom * y

    def _geometry(self, photo_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """(width, height) of the resized photo and the box that is cropped from it, rounded as timm does."""
        width, height = self._resized(photo_size)
        left, top = (self._centred(*side) for side in ((width, self.size[1]), (height, self.size[0])))
        return (width, height), (left, top, left + self.size[1], top + self.size[0])

    def _resized(self, photo_size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the photo after resizing, before the crop."""
        width, height = photo_size
        to_height, to_width = (max(math.floor(side / self.crop_fraction), 1) for side in self.size)
        if self.crop_mode == "squash":
            return to_width, to_height
        if self.crop_mode == "center" and to_height == to_width:
            longer = int(to_width * max(photo_size) / min(photo_size))
            return (to_width, longer) if width <= height else (longer, to_height)
        ratios = (height / to_height, width / to_width)
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)

    def _centred(self, length: int, window: int) -> int:
        """The start of a window in the middle of a length; negative if the window is longer."""
        if window > length:
            return -((window - length) // 2)
        return round((length - window) / 2) if self.crop_offset == "nearest" else (length - window) // 2

    def _trimmed(self, photo: Image.Image) -> Image.Image:
        """Cut the ends off a photo that is so long that resizing the whole photo would exhaust memory."""
        width, height = self._resized(photo.size)
        excess = width * height / max(_LARGEST_RESIZED, 4 * self.size[0] * self.size[1])
        if excess <= 1:
            return photo
        wide = width / self.size[1] > height / self.size[0]
        length = photo.width if wide else photo.height
        cut = math.floor((length - length / excess) / 2)  # the same at both ends
        keep = (cut, 0, length - cut, photo.height) if wide else (0, cut, photo.width, length - cut)
        return photo.crop(keep)

    def _fill(self) -> tuple[int, ...]:
        """The padding colour."""
        colour = self.mean if self.channels == 3 else 3 * self.mean
        return tuple(round(255 * m) for m in colour) if self.crop_mode == "border" else (0, 0, 0)


def _grid_like(height: float, width: float, patches: int) -> tuple[int, int]:
    """(rows, cols) of at most ``patches`` patches, in the shape of a photo of this size in patches.

    Rows and columns are rounded down or up, whichever cuts the least of the photo.
    """
    patches, aspect = max(patches, 1), height / width
    exact = math.sqrt(patches * aspect), math.sqrt(patches / aspect)
    rows, cols = ({_within(math.floor(n), patches), _within(math.ceil(n), patches)} for n in exact)
    grids = [(r, c) for r in rows for c in cols if r * c <= patches]

    def shown(grid: tuple[int, int]) -> tuple[float, int]:
        ratio = grid[0] / grid[1] / aspect
        return min(ratio, 1 / ratio), grid[0] * grid[1]

    return max(grids, key=shown)


def _within(number: int, largest: int) -> int:
    return min(max(number, 1), largest)


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """The values of a configuration (one or three) as one value per channel."""
    if channels == 1 and len(values) == 3:
        return (sum(values) / 3,)
    return tuple(values) * channels if len(values) == 1 else tuple(values)
