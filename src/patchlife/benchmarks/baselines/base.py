"""The base class of baselines, the description of a method, and functions that several baselines share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...backbones import Backbone
from ...backbones.timm_branches import check_branches
from ...errors import ConfigError, UnsupportedModelError

__all__ = [
    "Baseline",
    "MergingBaseline",
    "Method",
    "bisect",
    "check_class_token",
    "check_no_rope",
    "class_attention",
    "closest",
    "dense_flops",
    "reduction_blocks",
    "size_bias",
    "spread",
    "take",
]

Images = Float[Tensor, "batch channels height width"]


class Baseline(nn.Module):
    """Base class of slimmed backbones; called with images like the backbone. Write `forward` and `flops`.

    Attributes:
        backbone: the parts of the model; shared, not changed.
        knob: the setting that meets the FLOPs target, as text.
    """

    def __init__(self, backbone: Backbone, knob: str = "") -> None:
        super().__init__()
        self.backbone = backbone
        self.knob = knob

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        raise NotImplementedError

    def flops(self, images: Images) -> float:
        """FLOPs per image of ``images`` as one batch."""
        raise NotImplementedError

    def tensor_module(self) -> nn.Module:
        """The module to export: this one, or a `SlimModel`, whose export is compared with the model."""
        return self

    def extra_repr(self) -> str:
        """The knob, which decides the predictions together with the weights."""
        return self.knob

    def outer_flops(self, images: Images) -> int:
        """FLOPs per image outside the blocks, equal for all methods: embedding, final norm, pooling, classifier."""
        return sum(self.backbone.outer_flops((images.shape[-2], images.shape[-1])))


class MergingBaseline(Baseline):
    """Base class of methods that shorten the sequence inside the blocks. Write `block` and `flops`.

    Every token knows how many patches it stands for, its size.
    """

    title: ClassVar[str]

    def __init__(self, backbone: Backbone, knob: str) -> None:
        check_class_token(backbone, self.title)
        check_branches(backbone, self.title)
        super().__init__(backbone, knob)

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        return self.backbone.classify(self.backbone.norm(self.tokens(images)[0]))

    def tokens(self, images: Images) -> tuple[Tensor, Float[Tensor, "batch patches"]]:
        """(tokens after the last block, number of patches merged into each one)."""
        bb = self.backbone
        embedded = bb.embed(images)
        check_no_rope(embedded.rope, self.title)
        x = embedded.tokens
        size = x.new_ones(len(x), x.shape[1] - bb.prefix)
        block = self.block_for(size.shape[1])
        for index in range(bb.depth):
            x, size = block(index, x, size)
        return x, size

    def block_for(self, patches: int) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`block` for images of so many patches."""
        return self.block

    def block(self, index: int, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, sizes of the patches) after block ``index``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: in ``--methods``. title: in tables.
        source: paper and arXiv id. training: what was trained for this comparison, and for how long.
        build: (backbone, fraction of the dense FLOPs, sample images) -> the slimmed model. Knobs whose cost depends on
            the images are solved on them; for other methods only the image size matters.
        trained: the method was trained, or needs no training. If False, its accuracy is not measured.
        shapes: "static" if tensor shapes are the same for every image, so that the model fits one compiled graph and a
            CUDA graph.
        exports: the method can be exported to ONNX Runtime and OpenVINO.
        ours: the method is this project's.
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
    """FLOPs per image of the dense model."""
    rows, cols = backbone.grid_of(images)
    n = backbone.prefix + rows * cols
    blocks = sum(a * n + c * n**2 for a, c in map(backbone.block_flops, range(backbone.depth)))
    return sum(backbone.outer_flops((images.shape[-2], images.shape[-1]))) + blocks


# ---- conditions


def check_class_token(backbone: Backbone, method: str) -> None:
    """Raise UnsupportedModelError unless the model classifies from a class token."""
    if not backbone.reads_class:
        raise UnsupportedModelError(
            f"{method} needs a model that classifies from the class token, and {backbone.family} does not"
        )


def check_no_rope(rope: Tensor | None, method: str) -> None:
    """Raise UnsupportedModelError for models with rotary position embeddings."""
    if rope is not None:
        raise UnsupportedModelError(f"{method} is not defined for models with rotary position embeddings")


# ---- tokens


def take(x: Float[Tensor, "batch tokens dim"], index: Int[Tensor, "batch kept"]) -> Tensor:
    """The tokens of each image at ``index``, in its order."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def class_attention(
    q: Float[Tensor, "batch tokens heads dim"],
    k: Float[Tensor, "batch tokens heads dim"],
    prefix: int,
    bias: Float[Tensor, "batch 1 1 tokens"] | None = None,
) -> Float[Tensor, "batch patches"]:
    """The class token's attention to each patch, mean over the heads, in float32; it sums to less than one.

    The row is computed beside fused attention: half of the FLOPs of one query's attention. ``bias`` is added to the
    logits, as in the attention itself.
    """
    logits = torch.einsum("bhd,bthd->bht", q[:, 0] * q.shape[-1] ** -0.5, k).float()
    logits = logits if bias is None else logits + bias[:, 0]
    return logits.softmax(dim=-1).mean(dim=1)[:, prefix:]


def size_bias(size: Float[Tensor, "batch patches"], prefix: int) -> Float[Tensor, "batch 1 1 tokens"]:
    """The log of each key's size, for the attention logits: a merged token counts as often as its patches (ToMe)."""
    return F.pad(size.log(), (prefix, 0))[:, None, None]


def spread(total: int, blocks: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """A number for each of ``depth`` blocks: ``total`` spread over ``blocks``, the remainder in the first ones."""
    share = {block: total // len(blocks) + (at < total % len(blocks)) for at, block in enumerate(blocks)}
    return tuple(share.get(block, 0) for block in range(depth))


def reduction_blocks(depth: int) -> tuple[int, int, int]:
    """Blocks at which three-stage methods drop tokens: 3, 6 and 9 of 12, in proportion for other depths."""
    return max(1, depth // 4), max(2, depth // 2), max(3, 3 * depth // 4)


# ---- solving a knob


def bisect(cost: Callable[[float], float], target: float, low: float, high: float, steps: int = 30) -> float:
    """The largest knob in [low, high] whose cost is at most ``target``; cost must grow with the knob.

    Raises ConfigError if ``low`` costs more than ``target``.
    """
    least = cost(low)
    if least > target:
        raise ConfigError(f"out of reach: this method costs at least {least / target:.2f} times the target")
    if cost(high) <= target:
        return high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return low


def closest(cost: Callable[[int], float], target: float, low: int, high: int) -> int:
    """The integer in [low, high] whose cost is closest to ``target``; cost must grow with it."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return min((low, high), key=lambda knob: abs(cost(knob) - target))
