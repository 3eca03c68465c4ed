"""The methods that are compared: each gives the features that the head reads, at a fraction of the dense FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import camvid
import torch
from dense_model import BLOCKS, Head, maps_of
from torch import Tensor, nn
from uniform_grid import UniformGrid

import patchlife
from patchlife.backbones import Backbone, adapt
from patchlife.benchmarks.baselines.base import dense_flops
from patchlife.benchmarks.baselines.tome import pairs_for
from patchlife.benchmarks.baselines.tome_unmerging import UnmergingToMe
from patchlife.config import Restore
from patchlife.flop_counter import counted
from patchlife.slimming import slim_model
from patchlife.slimming.coverage import coverage_gain
from patchlife.slimming.scorers import Scores

START, DROPS = 2, (2, 5)
"""Earlier than the default (3 and 6): chosen on scenes of the train split."""


@dataclass(frozen=True)
class Method:
    """A model that is evaluated.

    Attributes:
        maps: from photos (batch, 3, 352, 480) of bytes to the head's input.
        flops: per image, head included. backbone_flops: without it.
        setting: what meets the budget, as text. size: height, width that the backbone reads.
        model: the slimmed model, where it is one of patchlife's.
    """

    maps: Callable[[Tensor], list[Tensor]]
    flops: float
    backbone_flops: float
    setting: str
    size: tuple[int, int] = camvid.INPUT
    model: Any = None


class RandomScores(patchlife.Scorer):
    """A control: the same random order of the patches for every image; similarity as for the attention rule."""

    kind = "camvid-random"

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Backbone, start: int) -> Scores:
        patches = tokens[:, backbone.prefix :]
        score = torch.rand(patches.shape[1], generator=torch.Generator().manual_seed(0)).to(patches)
        return Scores(score.expand(len(patches), -1), nn.functional.normalize(patches, dim=-1))


class EqualImportance(patchlife.Scorer):
    """Coverage gains where every patch is equally important: kept is what represents the others best.

    The class token's attention tells what a photo shows; a street scene's sky and road have labels too. Coverage adds
    patches in order of importance, here in steps of the golden ratio over the grid, which spreads them evenly.
    """

    kind = "camvid-equal-importance"

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Backbone, start: int) -> Scores:
        embedding = nn.functional.normalize(tokens[:, backbone.prefix :], dim=-1)
        batch, patches, _ = embedding.shape
        order = torch.arange(patches, device=tokens.device) * 0.618034 % 1
        importance = ((1 - 1e-3 * order) / patches).expand(batch, -1)
        return Scores(coverage_gain(importance, embedding), embedding)


def dense(backbone: nn.Module, head: Head) -> Method:
    """Every patch in every block."""
    flops = dense_flops(adapt(backbone), blank())
    return Method(lambda photos: maps_of(backbone, camvid.as_input(photos)), flops + head_flops(head), flops, "")


def slimmed(model: Any, head: Head) -> Method:
    """A model of patchlife in fixed mode, with whatever scorer and settings it has."""
    flops = model.cost().total(model.schedule().kept)
    return Method(
        lambda photos: maps_of(model, camvid.as_input(photos)),
        flops + head_flops(head),
        flops,
        f"patches {model.schedule()}",
        model=model,
    )


def untrained(backbone: nn.Module, head: Head, budget: float, **settings: Any) -> Method:
    """patchlife with nothing trained."""
    return slimmed(patchlife.wrap(backbone, config_of(budget, settings)).eval(), head)


def equal_importance(backbone: nn.Module, head: Head, budget: float, **settings: Any) -> Method:
    """patchlife with nothing trained, and a scorer that does not read the class token's attention."""
    return slimmed(patchlife.wrap(backbone, config_of(budget, settings), EqualImportance()).eval(), head)


def fitted(folder: Path) -> Callable[..., Method]:
    """patchlife with a trained adapter: its scorer, and its weight delta, which follows the budget, if it has one."""

    def build(backbone: nn.Module, head: Head, budget: float, **settings: Any) -> Method:
        model = patchlife.load(folder, backbone)
        return slimmed(slim_model(model.backbone, config_of(budget, settings), model.scorer).eval(), head)

    return build


def config_of(budget: float, settings: dict[str, Any]) -> patchlife.LifeConfig:
    """Settings of patchlife; the drop points that measured best (README.md), unless others are asked for."""
    return patchlife.LifeConfig(**{"budget": budget, "start": START, "drops": DROPS} | settings)


def random(backbone: nn.Module, head: Head, budget: float, **settings: Any) -> Method:
    """The same run with random scores."""
    return slimmed(patchlife.wrap(backbone, config_of(budget, settings), RandomScores()).eval(), head)


def tome(backbone: nn.Module, head: Head, budget: float, restore: Restore = "residual") -> Method:
    """ToMe with un-merging."""
    parts = adapt(backbone)
    model = UnmergingToMe(parts, pairs_for(parts, budget, blank()), restore).eval()
    flops = model.flops(blank())
    return Method(
        lambda photos: model.features(camvid.as_input(photos), BLOCKS), flops + head_flops(head), flops, model.knob
    )


def uniform_grid(backbone: nn.Module, head: Head, budget: float, start: int = 1, residual: bool = True) -> Method:
    """A uniform grid of patches, the others interpolated."""
    model = UniformGrid.of(adapt(backbone), budget, blank(), start, residual).eval()
    flops = model.flops(blank())
    return Method(
        lambda photos: model.features(camvid.as_input(photos), BLOCKS), flops + head_flops(head), flops, model.knob
    )


def smaller_input(backbone: nn.Module, head: Head, budget: float) -> Method:
    """The dense model on a smaller photo: the largest size whose FLOPs, head included, fit `budget` of the backbone's
    dense FLOPs plus the head's at full size. What the head saves on the smaller grid goes into more patches."""
    parts = adapt(backbone)
    allowed = budget * dense_flops(parts, blank()) + head_flops(head)
    size = largest_size(lambda size: dense_flops(parts, blank(size)) + head_flops(head, size) <= allowed)
    flops = dense_flops(parts, blank(size))
    return Method(
        lambda photos: maps_of(backbone, camvid.as_input(photos, size)),
        flops + head_flops(head, size),
        flops,
        f"{size[0]} x {size[1]} pixels",
        size=size,
    )


def largest_size(fits: Callable[[tuple[int, int]], bool]) -> tuple[int, int]:
    """The size (height, width) in whole patches with the most patches that fits, within 6 % of the photo's shape."""
    shape = camvid.INPUT[1] / camvid.INPUT[0]
    sizes = [
        (16 * rows, 16 * cols)
        for rows in range(4, camvid.INPUT[0] // 16 + 1)
        for cols in range(4, camvid.INPUT[1] // 16 + 1)
        if abs(cols / rows / shape - 1) <= 0.06
    ]
    return max((size for size in sizes if fits(size)), key=lambda size: size[0] * size[1])


@cache
def blank(size: tuple[int, int] = camvid.INPUT) -> Tensor:
    """A black image, for sizes and FLOPs."""
    return torch.zeros(1, 3, *size)


def head_flops(head: Head, size: tuple[int, int] = camvid.INPUT) -> int:
    """FLOPs of the head on one image of this size."""
    grid = size[0] // 16, size[1] // 16
    width = head.mix.in_channels // len(BLOCKS)
    return counted(head, [torch.zeros(1, width, *grid) for _ in BLOCKS])[0]
