"""The images that an exported file takes, and generated ones to compare it with the model."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..data import Preprocess
from ..errors import ConfigError
from ..runtime.tensor_module import TensorModule
from ..slimming import SlimModel
from .parity import sample_images

__all__ = ["comparison_images", "image_size_of"]


def image_size_of(
    model: SlimModel, image_size: tuple[int, int] | None, preprocess: Preprocess | None, images: Tensor | None
) -> tuple[int, int]:
    """The image size (height, width) of an export with these arguments. Raises ConfigError if they name several."""
    named = {"image_size": image_size, "the size of preprocess": preprocess.size if preprocess else None}
    named |= {"the size of images": (images.shape[-2], images.shape[-1]) if images is not None else None}
    sizes = {name: (size[0], size[1]) for name, size in named.items() if size is not None}
    if len({*sizes.values()}) > 1:
        got = ", ".join(f"{name} {size[0]} x {size[1]}" for name, size in sizes.items())
        raise ConfigError(f"an exported graph takes images of one size (height x width), got {got}; make them equal")
    return next(iter(sizes.values()), model.backbone.image_size)


def comparison_images(module: TensorModule, size: tuple[int, int]) -> Float[Tensor, "n channels height width"]:
    """Generated images for the comparison with the model, where no photos are given."""
    return sample_images(8, module.model.backbone.channels, size)
