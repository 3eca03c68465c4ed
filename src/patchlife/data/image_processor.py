"""Settings of transformers' image processors in the terms of `Preprocess`. transformers itself is not imported."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

__all__ = ["check_setting", "processor_filter", "processor_geometry", "processor_scale"]

_PROCESSORS = ("ViT", "DeiT", "Bit", "CLIP", "Siglip", "DINOv3ViT")
_FILTERS: tuple[Any, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by number


def processor_geometry(values: Mapping[str, Any]) -> tuple[tuple[int, int], float, Any]:
    """(size, crop_fraction, crop_mode) of an image processor."""
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    name = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    known = f"supported image processors are {', '.join(f'{known}ImageProcessor' for known in _PROCESSORS)}"
    check_setting(name in _PROCESSORS, known, kind)
    check_setting(values.get("do_resize", True), "the image processor must resize photos, do_resize", False)
    size = _named(values.get("size"), shortest=name in ("CLIP", "Bit"))
    crop = _named(values.get("crop_size")) if values.get("do_center_crop") else {}
    resized, target = _sides(size), _sides(crop)
    if resized is not None:
        target = target or resized
        fraction = _fraction(target[0], resized[0])
        check_setting(
            all(math.floor(t / fraction) == r for t, r in zip(target, resized, strict=True)),
            "crop_size must be the same part of size in height and in width",
            (size, crop),
        )
        return target, fraction, "squash"
    check_setting(size.keys() == {"shortest_edge"}, "size must be height and width, or shortest_edge", size)
    check_setting(target is not None, "size is shortest_edge, so photos differ in shape: do_center_crop must be", False)
    assert target is not None
    check_setting(target[0] == target[1], "with shortest_edge, crop_size must be square", crop)
    return target, _fraction(target[0], size["shortest_edge"]), "center"


def _named(size: Any, shortest: bool = False) -> dict[str, int]:
    """A size by the names of its sides; files of old versions have one number."""
    if isinstance(size, int):
        return {"shortest_edge": size} if shortest else {"height": size, "width": size}
    return {name: int(value) for name, value in size.items() if value} if isinstance(size, Mapping) else {}


def _sides(size: Mapping[str, int]) -> tuple[int, int] | None:
    """(height, width), if both are given."""
    return (size["height"], size["width"]) if size.keys() == {"height", "width"} else None


def _fraction(window: int, length: int) -> float:
    """The ``crop_fraction`` of a window of a length: `Preprocess._resized` must give exactly this length."""
    fraction = window / length
    return fraction if math.floor(window / fraction) == length else math.nextafter(fraction, 0)


def processor_scale(values: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) for pixels from 0 to 1."""
    scale = 255 * float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 255.0
    scale = 1.0 if math.isclose(scale, 1, rel_tol=1e-6) else scale
    if not values.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1 / scale,) * 3
    missing = [name for name in ("image_mean", "image_std") if values.get(name) is None]
    check_setting(not missing, "an image processor that normalises has image_mean and image_std; missing", missing)
    mean, std = ((v,) * 3 if isinstance(v := values[name], int | float) else v for name in ("image_mean", "image_std"))
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)


def processor_filter(number: Any) -> Any:
    """The name of Pillow's resampling filter of this number."""
    known = isinstance(number, int) and 0 <= number < len(_FILTERS)
    check_setting(known, f"resample must be a number from 0 to {len(_FILTERS) - 1} of Pillow's filters", number)
    return _FILTERS[int(number)]


def check_setting(holds: bool, rule: str, got: object) -> None:
    """Raise ConfigError with the broken ``rule`` unless it ``holds``."""
    if not holds:
        raise ConfigError(f"preprocessing: {rule}, got {got!r}")
