"""DiffRate: Chen et al., Differentiable Compression Rate for Efficient Vision Transformers (ICCV 2023,
arXiv 2305.17997).

In every block, between attention and MLP, patches are sorted by the class token's attention. The last ones are pruned;
the last ones of the rest are merged, each into the most similar patch that stays. How many are pruned and merged in
each block is searched on the model, with its weights frozen (`diffrate_search.py`).

The method "diffrate" uses uniform rates: the same number of patches in every block, half of them pruned and half
merged. That is not what the paper proposes, and the tables say so. `searched_method` is the paper's method,
with rates from a file.

Similarity is the cosine of the tokens. As in ToMe, a merged token is the size-weighted mean, and attention adds the log
of each key's size to its logits; this is our reading of how merged tokens are weighted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...backbones import Backbone, sdpa
from ...backbones.timm_branches import attention_branch, branch_cost, check_branches, mlp_branch
from ...errors import ConfigError
from .base import (
    Baseline,
    Images,
    MergingBaseline,
    Method,
    bisect,
    check_class_token,
    class_attention,
    dense_flops,
    size_bias,
    take,
)

__all__ = [
    "DIFFRATE",
    "DiffRate",
    "Rates",
    "block_flops",
    "compress",
    "meeting",
    "scaled",
    "searched_method",
    "uniform",
]

Count = TypeVar("Count", float, Tensor)


@dataclass(frozen=True)
class Rates:
    """How many patches each block prunes and merges.

    Attributes:
        patches: of the grid that the rates are for.
        pruned: in each block. merged: in each block, of the patches that were not pruned.
    """

    patches: int
    pruned: tuple[int, ...]
    merged: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"patches": self.patches, "pruned": list(self.pruned), "merged": list(self.merged)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rates:
        """From `to_dict`."""
        return cls(values["patches"], tuple(values["pruned"]), tuple(values["merged"]))


def compress(
    patches: Float[Tensor, "batch patches dim"],
    size: Float[Tensor, "batch patches"],
    attention: Float[Tensor, "batch patches"],
    pruned: int,
    merged: int,
) -> tuple[Float[Tensor, "batch kept dim"], Float[Tensor, "batch kept"]]:
    """(patches, sizes) in the order of ``attention``, without the last ``pruned``, after the next ``merged`` merged.

    A merged patch goes into the one with the largest cosine similarity among those that stay; sizes are added.
    """
    order = attention.argsort(dim=1, descending=True)[:, : patches.shape[1] - pruned]
    patches, size = take(patches, order), size.gather(1, order)
    if not merged:
        return patches, size
    kept, unit = patches.shape[1] - merged, F.normalize(patches, dim=-1)
    partner = (unit[:, kept:] @ unit[:, :kept].transpose(1, 2)).argmax(dim=2)
    both = torch.cat((patches * size[..., None], size[..., None]), dim=2)
    both = both[:, :kept].scatter_add(1, partner[..., None].expand(-1, -1, both.shape[2]), both[:, kept:])
    size = both[..., -1]
    return both[..., :-1] / size[..., None], size


class DiffRate(MergingBaseline):
    """Prunes and merges as ``rates`` say; ``origin`` of the rates is for the knob's text."""

    title = "DiffRate"

    def __init__(self, backbone: Backbone, rates: Rates, origin: str = "given") -> None:
        if not len(rates.pruned) == len(rates.merged) == backbone.depth:
            raise ConfigError(
                f"DiffRate needs rates for {backbone.depth} blocks, got {len(rates.pruned)} pruned and "
                f"{len(rates.merged)} merged; search them on this model"
            )
        super().__init__(backbone, f"{origin} rates: pruned {rates.pruned}, merged {rates.merged}")
        self.rates = rates

    def counts(self, index: int, patches: int) -> tuple[int, int]:
        """(pruned, merged) of ``patches`` in block ``index``; at least one patch stays."""
        pruned = min(self.rates.pruned[index], patches - 1)
        return pruned, min(self.rates.merged[index], patches - 1 - pruned)

    def block_for(self, patches: int) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`block`. Raises ConfigError if the rates are for another number of patches."""
        self._check_grid(patches)
        return self.block

    def block(self, index: int, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """One block that prunes and merges between attention and MLP."""
        bb, scores = self.backbone, []
        pruned, merged = self.counts(index, size.shape[1])
        bias = size_bias(size, bb.prefix) if any(self.rates.merged[:index]) else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if pruned + merged:
                scores.append(class_attention(q, k, bb.prefix, bias))
            return sdpa(q, k, v, bias)

        x = x + attention_branch(bb, index, x, attend)
        if pruned + merged:
            patches, size = compress(x[:, bb.prefix :], size, scores[0], pruned, merged)
            x = torch.cat((x[:, : bb.prefix], patches), dim=1)
        return x + mlp_branch(bb, index, x), size

    def flops(self, images: Images) -> float:
        """FLOPs per image."""
        bb = self.backbone
        rows, cols = bb.grid_of(images)
        self._check_grid(rows * cols)
        n, total = rows * cols, float(self.outer_flops(images))
        for index in range(bb.depth):
            pruned, merged = self.counts(index, n)
            total += block_flops(bb, index, float(n), float(pruned), float(merged), decides=pruned + merged > 0)
            n -= pruned + merged
        return total

    def _check_grid(self, patches: int) -> None:
        if patches != self.rates.patches:
            raise ConfigError(
                f"these DiffRate rates are for {self.rates.patches} patches, got images of {patches}; search them at "
                "this image size"
            )


def block_flops(bb: Backbone, index: int, n: Count, pruned: Count, merged: Count, decides: bool = True) -> Count:
    """FLOPs of block ``index``, which n patches enter; numbers or tensors with gradients."""
    cost, tokens = branch_cost(bb, index), bb.prefix + n
    after = n - pruned - merged
    total = (cost.project + cost.out) * tokens + cost.pair * tokens**2 + cost.mlp * (bb.prefix + after)
    if decides:  # the class token's row, and the similarities
        total = total + cost.pair // 2 * tokens + 2 * bb.dim * merged * after
    return total


# ---- rates that meet a target


def uniform(backbone: Backbone, target: float, images: Images) -> Rates:
    """The same number of patches in every block, half of them pruned and half merged, while there are any."""
    rows, cols = backbone.grid_of(images)
    return scaled(backbone, rows * cols, [1.0] * (2 * backbone.depth), target, images)


def meeting(backbone: Backbone, found: Rates, target: float, images: Images) -> Rates:
    """``found`` with all counts multiplied by one factor, so that the model costs ``target`` of the dense FLOPs.

    Raises ConfigError if the target is out of reach with these proportions.
    """
    counts = [float(count) for pair in zip(found.pruned, found.merged, strict=True) for count in pair]
    return scaled(backbone, found.patches, counts, target, images)


def scaled(backbone: Backbone, patches: int, counts: list[float], target: float, images: Images) -> Rates:
    """``counts`` (pruned and merged, block by block) times the factor that meets the target; one patch stays.

    Raises ConfigError if the target is out of reach with these proportions.
    """
    sums = [0.0, *accumulate(counts)]

    def rates(keep: float) -> Rates:
        """The factor is ``1 / keep - 1``."""
        totals = [min(patches - 1, round((1 / keep - 1) * total)) for total in sums]
        rounded = [after - before for before, after in pairwise(totals)]
        return Rates(patches, tuple(rounded[::2]), tuple(rounded[1::2]))

    flops = target * dense_flops(backbone, images)
    return rates(bisect(lambda keep: DiffRate(backbone, rates(keep)).flops(images), flops, 1e-6, 1.0))


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    check_class_token(backbone, "DiffRate")
    check_branches(backbone, "DiffRate")
    return DiffRate(backbone, uniform(backbone, target, images), "uniform")


_SOURCE = "arXiv 2305.17997 (ICCV 2023)"
DIFFRATE = Method(
    "diffrate", "DiffRate, uniform rates", _SOURCE, "nothing (the paper searches the rates on the model)", _build
)


def searched_method(path: Path) -> Method:
    """DiffRate with searched rates from a JSON file: `Rates.to_dict` by fraction of the dense FLOPs, such as "0.5"."""

    def build(backbone: Backbone, target: float, images: Images) -> Baseline:
        found = {float(flops): values for flops, values in json.loads(path.read_text()).items()}
        if target not in found:
            raise ConfigError(
                f"{path.name} has DiffRate rates for {', '.join(f'{flops:g}' for flops in sorted(found))} of the "
                f"FLOPs, got {target:g}; search them with searched_diffrate"
            )
        return DiffRate(backbone, Rates.from_dict(found[target]), "searched")

    return Method("diffrate", "DiffRate", _SOURCE, f"rates searched on this model: {path.name}", build)
