"""TNT: Rao, Jiang and Moyer, Training Noise Token Pruning (2024, arXiv 2411.18092), with a single pruning layer.

A linear layer gives each patch a relevance, a softmax over the patches of the image. In training, noise is added to
the patches, more where the relevance is lower, and none is dropped (`recipes/fewer_epochs`). At inference the least
relevant patches are dropped once, after the first quarter of the blocks (the third of 12). Then redundant patches go:
the others are divided at random into two sets, and those of the first set that are most similar to a patch of the
second are dropped. Nothing is merged, and later blocks see the kept patches only.

Published with one layer for DeiT: keep rate 0.6 with 25 of 196 patches dropped for similarity, 0.69 of the FLOPs. The
FLOPs agree with 0.6 as the fraction kept in the end, which is how the rate is read here. The number dropped for
similarity stays 25 of 196, but is at most half of all that are dropped (our addition, for other rates). The random
division is one draw for all images, so that runs repeat.

The paper trains 40 epochs on ImageNet. With an untrained layer only the speed is meaningful.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...backbones import Backbone
from .base import Baseline, Images, Method, bisect, check_class_token, check_no_rope, dense_flops, take

__all__ = ["TNT", "TokenNoise", "without_redundant"]


def without_redundant(patches: Float[Tensor, "batch patches dim"], drop: int) -> Float[Tensor, "batch kept dim"]:
    """``patches`` without the ``drop`` of a random half that are most similar to a patch of the other half."""
    if not drop:
        return patches
    order = _random_order(patches.shape[1], patches.device)
    first, second = patches[:, order].tensor_split(2, dim=1)
    unit, others = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    similarity = (unit @ others.transpose(1, 2)).amax(dim=2)
    return torch.cat((take(first, similarity.argsort(dim=1)[:, : first.shape[1] - drop]), second), dim=1)


@lru_cache(maxsize=16)
def _random_order(patches: int, device: torch.device) -> Int[Tensor, "patches"]:
    """A fixed random order, on ``device``; kept, because a CUDA graph cannot copy it from the host."""
    with torch.inference_mode(False):
        return torch.randperm(patches, generator=torch.Generator().manual_seed(0)).to(device)


class TokenNoise(Baseline):
    """Keeps ``rate`` of the patches after the first quarter of the blocks, the most relevant ones by ``relevance``.

    Attributes:
        rate: fraction of the patches kept. It does not depend on the training, so it can be set afterwards.
        at: the first block without the dropped patches.
        relevance: the linear layer, dim to 1.
    """

    def __init__(self, backbone: Backbone, rate: float, relevance: nn.Linear | None = None) -> None:
        check_class_token(backbone, "TNT")
        self.at = max(1, backbone.depth // 4)
        super().__init__(backbone, f"keep rate {rate:.3f} before block {self.at}")
        self.rate = rate
        self.relevance = relevance or untrained(backbone)

    def kept(self, patches: int) -> tuple[int, int]:
        """(patches kept, patches dropped for similarity) of ``patches``."""
        keep = max(1, math.floor(self.rate * patches))
        return keep, min(round(patches * 25 / 196), (patches - keep) // 2, keep)

    def alpha(self, patches: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch patches"]:
        """Relevance of the patches; sums to one over an image."""
        return self.relevance(patches)[..., 0].softmax(dim=1)

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        bb = self.backbone
        embedded = bb.embed(images)
        check_no_rope(embedded.rope, "TNT")
        x = embedded.tokens
        for index in range(self.at):
            x = bb.block(index, x)
        return self.resume(x)

    def resume(self, x: Float[Tensor, "batch tokens dim"]) -> Tensor:
        """Logits from the tokens that enter block ``at``, before patches are dropped."""
        bb = self.backbone
        patches = x[:, bb.prefix :]
        keep, similar = self.kept(patches.shape[1])
        if keep < patches.shape[1]:
            best = self.alpha(patches).argsort(dim=1, descending=True)[:, : keep + similar]
            x = torch.cat((x[:, : bb.prefix], without_redundant(take(patches, best), similar)), dim=1)
        return self.rest(x)

    def rest(self, x: Float[Tensor, "batch tokens dim"]) -> Tensor:
        """Logits from the tokens that enter block ``at``; none is dropped."""
        bb = self.backbone
        for index in range(self.at, bb.depth):
            x = bb.block(index, x)
        return bb.classify(bb.norm(x))

    def flops(self, images: Images) -> float:
        """FLOPs per image."""
        bb = self.backbone
        rows, cols = bb.grid_of(images)
        n, total = rows * cols, float(self.outer_flops(images))
        keep, similar = self.kept(n)
        if keep < n:
            relevant = keep + similar
            pairs = (relevant + 1) // 2 * (relevant // 2) if similar else 0
            total += 2 * bb.dim * (n + pairs)
        for index in range(bb.depth):
            tokens = bb.prefix + (n if index < self.at else keep)
            a, c = bb.block_flops(index)
            total += a * tokens + c * tokens**2
        return total


def untrained(backbone: Backbone) -> nn.Linear:
    """An untrained relevance layer, on the backbone's device and in its dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(backbone.dim, 1)
    return layer.to(next(backbone.parameters())).eval()


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    check_class_token(backbone, "TNT")
    flops, relevance = target * dense_flops(backbone, images), untrained(backbone)
    rate = bisect(lambda rate: TokenNoise(backbone, rate, relevance).flops(images), flops, 0.005, 1.0)
    return TokenNoise(backbone, rate, relevance)


TNT = Method(
    "tnt",
    "TNT, one layer",
    "arXiv 2411.18092 (2024)",
    "nothing: untrained relevance layer, for speed only",
    _build,
    trained=False,
)
