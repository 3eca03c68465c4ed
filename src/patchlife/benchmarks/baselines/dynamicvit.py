"""DynamicViT: Rao et al., Efficient Vision Transformers with Dynamic Token Sparsification (NeurIPS 2021,
arXiv 2106.02034).

Before each of three blocks a small network scores every patch from its own features and the mean features of all
remaining patches. The highest-scored patches are kept: fractions rho, rho**2, rho**3 of the grid. The paper trains
these networks together with the backbone (30 epochs). Without their weights only the speed is meaningful.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...backbones import Backbone
from ...errors import CheckpointError
from .base import (
    Baseline,
    Images,
    Method,
    bisect,
    check_class_token,
    check_no_rope,
    dense_flops,
    reduction_blocks,
    take,
)

__all__ = ["DYNAMICVIT", "DynamicViT", "Predictor", "trained_dynamicvit"]


class Predictor(nn.Module):
    """Predicts the probability of keeping each patch, from its own features and the mean over all patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own = dim // 2  # channels of the patch itself; the others are averaged over patches
        self.features = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def forward(self, patches: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches"]:
        """Log-probability of keeping each patch."""
        features = self.features(patches)
        mean = features[..., self.own :].mean(dim=1, keepdim=True).expand(-1, patches.shape[1], -1)
        both = torch.cat((features[..., : self.own], mean), dim=-1)
        return self.decide(both).log_softmax(dim=-1)[..., 0]


class DynamicViT(Baseline):
    """Keeps the fractions ``rho``, ``rho**2`` and ``rho**3`` of the grid's patches."""

    def __init__(self, backbone: Backbone, rho: float, predictors: nn.ModuleList | None = None) -> None:
        check_class_token(backbone, "DynamicViT")
        super().__init__(backbone, f"rho {rho:.3f} before blocks {reduction_blocks(backbone.depth)}")
        self.rho = rho
        self.at = reduction_blocks(backbone.depth)
        self.predictors: nn.ModuleList = predictors or untrained(backbone)

    def kept(self, patches: int) -> tuple[int, ...]:
        """Number of patches kept at each of the three blocks, from a grid of ``patches``."""
        return tuple(max(1, int(patches * self.rho**stage)) for stage in (1, 2, 3))

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        bb = self.backbone
        embedded = bb.embed(images)
        check_no_rope(embedded.rope, "DynamicViT")
        x = embedded.tokens
        stages = dict(zip(self.at, zip(self.predictors, self.kept(x.shape[1] - bb.prefix), strict=True), strict=True))
        for index in range(bb.depth):
            if index in stages:
                predictor, keep = stages[index]
                patches = x[:, bb.prefix :]
                best = predictor(patches).argsort(dim=1, descending=True)[:, :keep]
                x = torch.cat((x[:, : bb.prefix], take(patches, best)), dim=1)
            x = bb.block(index, x)
        return bb.classify(bb.norm(x))

    def flops(self, images: Images) -> float:
        """FLOPs per image."""
        bb = self.backbone
        rows, cols = bb.grid_of(images)
        n, total = rows * cols, float(self.outer_flops(images))
        stages = dict(zip(self.at, zip(self.predictors, self.kept(n), strict=True), strict=True))
        for index in range(bb.depth):
            if index in stages:
                predictor, keep = stages[index]
                total, n = total + predictor_flops(predictor, n), keep
            a, c = bb.block_flops(index)
            total += a * (bb.prefix + n) + c * (bb.prefix + n) ** 2
        return total


def predictor_flops(predictor: nn.Module, patches: int) -> int:
    """FLOPs of a predictor's matrix products, for ``patches`` patches of one image."""
    return patches * sum(2 * m.weight.numel() for m in predictor.modules() if isinstance(m, nn.Linear))


def untrained(backbone: Backbone) -> nn.ModuleList:
    """Three untrained predictors, on the backbone's device and in its dtype."""
    reference = next(backbone.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        predictors = nn.ModuleList(Predictor(backbone.dim) for _ in range(3))
    return predictors.to(reference).eval()


def trained_dynamicvit(path: Path) -> Method:
    """DynamicViT with trained predictors from a safetensors file (names as in ``nn.ModuleList[Predictor]``)."""

    def build(backbone: Backbone, target: float, images: Images) -> Baseline:
        from ...backbones.checkpoint import read_weights

        predictors, weights = untrained(backbone), read_weights(path)
        wrong = predictors.state_dict().keys() ^ weights.keys()
        if wrong:
            raise CheckpointError(
                f"{path} must hold the weights of three predictors; missing or unknown names: "
                f"{', '.join(sorted(wrong)[:6])}"
            )
        predictors.load_state_dict(weights)
        return _solved(backbone, target, images, predictors)

    return Method("dynamicvit", "DynamicViT", _SOURCE, f"predictors of {path.name}", build)


def _solved(backbone: Backbone, target: float, images: Images, predictors: nn.ModuleList) -> DynamicViT:
    flops = target * dense_flops(backbone, images)
    rho = bisect(lambda rho: DynamicViT(backbone, rho, predictors).flops(images), flops, 0.02, 1.0)
    return DynamicViT(backbone, rho, predictors)


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    return _solved(backbone, target, images, untrained(backbone))


_SOURCE = "arXiv 2106.02034 (NeurIPS 2021)"
DYNAMICVIT = Method(
    "dynamicvit", "DynamicViT", _SOURCE, "nothing: untrained predictors, for speed only", _build, trained=False
)
