"""The simplest reduction: a uniform grid of patches is kept, whatever the image shows; the others are interpolated."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchlife.backbones import Backbone
from patchlife.benchmarks.baselines.base import Baseline
from patchlife.slimming.cost import Cost
from patchlife.slimming.schedule import solve

NEIGHBOURS = 4


class UniformGrid(Baseline):
    """Keeps ``kept`` patches from block ``start`` on. A dropped patch's place gets its last state plus what the blocks
    changed in the 4 nearest kept patches, weighted by inverse distance (``residual``), or only their states."""

    def __init__(self, backbone: Backbone, grid: tuple[int, int], start: int, kept: int, residual: bool = True) -> None:
        super().__init__(backbone, f"{kept} patches from block {start} on")
        self.start, self.grid, self.residual = start, grid, residual
        self.order = spread_out(grid)[:kept].sort().values
        self.neighbours, self.weights = nearest(grid, self.order)

    @classmethod
    def of(cls, backbone: Backbone, budget: float, images: Tensor, start: int, residual: bool = True) -> UniformGrid:
        """As many patches as ``budget``, a fraction of the backbone's dense FLOPs, allows."""
        rows, cols = backbone.grid_of(images)
        blocks = tuple(backbone.block_flops(i) for i in range(backbone.depth))
        outer = sum(backbone.outer_flops((images.shape[-2], images.shape[-1])))
        kept = solve(Cost(rows * cols, backbone.prefix, outer, 0, blocks), budget, max(start, 1), (start,)).kept[-1]
        return cls(backbone, (rows, cols), start, kept, residual)

    def features(self, images: Tensor, blocks: tuple[int, ...]) -> list[Float[Tensor, "batch dim rows cols"]]:
        """The normalised features after each of ``blocks`` (rising)."""
        bb, found = self.backbone, []
        embedded = bb.embed(images)
        x = dropped = begin = embedded.tokens
        for index in range(max(blocks) + 1):
            if index == self.start:
                dropped = x[:, bb.prefix :]
                begin = dropped[:, self.order]
                x = torch.cat((x[:, : bb.prefix], begin), dim=1)
            x = bb.block(index, x)
            if index in blocks:
                patches = x[:, bb.prefix :]
                if index >= self.start:
                    patches = self.interpolated(patches, begin, dropped)
                found.append(bb.norm(patches).transpose(1, 2).reshape(len(x), -1, *self.grid))
        return found

    def interpolated(self, patches: Tensor, begin: Tensor, dropped: Tensor) -> Float[Tensor, "batch patches dim"]:
        """The states of the whole grid from the kept ``patches``, whose states were ``begin`` at the start block."""
        known = patches - begin if self.residual else patches
        spread = (known[:, self.neighbours] * self.weights[..., None]).sum(dim=2)
        return dropped + spread if self.residual else spread

    def flops(self, images: Tensor) -> float:
        """FLOPs per image."""
        bb, kept = self.backbone, len(self.order)
        rows, cols = bb.grid_of(images)
        counts = [rows * cols if index < self.start else kept for index in range(bb.depth)]
        tokens = [bb.prefix + n for n in counts]
        blocks = sum(a * n + c * n**2 for n, (a, c) in zip(tokens, map(bb.block_flops, range(bb.depth)), strict=True))
        return self.outer_flops(images) + blocks


def spread_out(grid: tuple[int, int]) -> Int[Tensor, " patches"]:
    """Patches in an order of which every beginning is spread evenly over the grid: a checkerboard first, then finer.

    The order of a Bayer matrix (ordered dithering).
    """
    rows, cols = torch.arange(grid[0])[:, None], torch.arange(grid[1])[None]
    rank = torch.zeros(grid, dtype=torch.long)
    for bit in range(6):  # 64 x 64 patches
        low_row, low_col = (rows >> bit) & 1, (cols >> bit) & 1
        rank += (2 * (low_row ^ low_col) + low_row) << 2 * (5 - bit)
    return rank.flatten().argsort(stable=True)


def nearest(
    grid: tuple[int, int], kept: Int[Tensor, " kept"]
) -> tuple[Int[Tensor, "patches neighbours"], Float[Tensor, "patches neighbours"]]:
    """(places in ``kept`` of the nearest ones, their weights), a kept patch's own weight being 1."""
    index = torch.arange(grid[0] * grid[1])
    places = torch.stack((index // grid[1], index % grid[1]), dim=1).float()
    distance, neighbours = torch.cdist(places, places[kept]).topk(min(NEIGHBOURS, len(kept)), largest=False)
    weights = 1 / distance.clamp(min=1e-6) ** 2
    return neighbours, weights / weights.sum(dim=1, keepdim=True)
