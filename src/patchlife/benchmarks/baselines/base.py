"""What all methods under comparison have in common: a name, a source, a knob, and an honest FLOPs count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from ...backbones import Backbone
from ...errors import ConfigError, UnsupportedModelError

__all__ = [
    "Baseline",
    "Method",
    "bisect",
    "check_class_token",
    "check_no_rope",
    "closest",
    "dense_flops",
    "reduction_blocks",
    "take",
]

Images = Float[Tensor, "batch channels height width"]


class Baseline(nn.Module):
    """A backbone slimmed in some way. Called as the backbone is.

    Attributes:
        backbone: the parts of the model; shared, not changed.
        knob: the setting that was solved for, in words.
    """

    def __init__(self, backbone: Backbone, knob: str = "") -> None:
        super().__init__()
        self.backbone = backbone
        self.knob = knob

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        raise NotImplementedError

    def flops(self, images: Images) -> float:
        """FLOPs per image that ``images``, as one batch, cost."""
        raise NotImplementedError

    def tensor_module(self) -> nn.Module:
        """What stands for it where graphs are exported: itself, or a `SlimModel`, whose export is proved."""
        return self

    def extra_repr(self) -> str:
        """What its answers follow from, beside the weights."""
        return self.knob

    def outer_flops(self, images: Images) -> int:
        """The part that no method touches: embedding, final norm, pooling, classifier."""
        return sum(self.backbone.outer_flops((images.shape[-2], images.shape[-1])))


@dataclass(frozen=True)
class Method:
    """A way to slim a Vision Transformer, as the comparison sees it.

    Attributes:
        name: what the command line calls it. title: for tables.
        source: paper and arXiv id. training: what was trained for this comparison, and for how long.
        build: (backbone, fraction of the dense FLOPs, sample images) -> the slimmed model. The images settle
            knobs whose cost depends on what is seen; the others only look at their size.
        trained: is meant to be used without training, or was trained. If not, its accuracy says nothing.
        shapes: "static" ones are the same for every image, so the model compiles whole and fits a CUDA graph.
        exports: takes part where graphs are exported to ONNX Runtime or OpenVINO.
        ours: is this project's.
    """

    name: str
    title: str
    source: str
    training: str
    build: Callable[[Backbone, float, Images], Baseline]
    trained: bool = True
    shapes: Literal["static", "dynamic"] = "static"
    exports: bool = False
    ours: bool = False


def dense_flops(backbone: Backbone, images: Images) -> int:
    """FLOPs per image of the untouched backbone."""
    rows, cols = backbone.grid_of(images)
    n = backbone.prefix + rows * cols
    blocks = sum(a * n + c * n**2 for a, c in map(backbone.block_flops, range(backbone.depth)))
    return sum(backbone.outer_flops((images.shape[-2], images.shape[-1]))) + blocks


# ---- conditions


def check_class_token(backbone: Backbone, who: str) -> None:
    """Raise UnsupportedModelError unless the model classifies from a class token."""
    if not backbone.reads_class:
        raise UnsupportedModelError(f"{who} ranks tokens by the class token, which {backbone.family} does not read")


def check_no_rope(rope: Tensor | None, who: str) -> None:
    """Raise UnsupportedModelError for models that rotate queries and keys by position."""
    if rope is not None:
        raise UnsupportedModelError(f"{who} is not defined for models with rotary positions")


# ---- tokens


def take(x: Float[Tensor, "batch tokens dim"], index: Int[Tensor, "batch kept"]) -> Tensor:
    """The tokens of each image that ``index`` names, in its order."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def reduction_blocks(depth: int) -> tuple[int, int, int]:
    """Where three-stage methods remove tokens: blocks 3, 6 and 9 of 12, in proportion for other depths."""
    return max(1, depth // 4), max(2, depth // 2), max(3, 3 * depth // 4)


# ---- solving a knob


def bisect(cost: Callable[[float], float], target: float, low: float, high: float, steps: int = 30) -> float:
    """The knob in [low, high] whose cost is the largest one within ``target``; cost must grow with the knob.

    Raises ConfigError when even ``low`` costs more.
    """
    least = cost(low)
    if least > target:
        raise ConfigError(f"out of reach: the least this method can cost is {least / target:.2f} of the target")
    if cost(high) <= target:
        return high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return low


def closest(cost: Callable[[int], float], target: float, low: int, high: int) -> int:
    """The whole number in [low, high] whose cost comes closest to ``target``; cost must grow with it."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return min((low, high), key=lambda knob: abs(cost(knob) - target))
