"""Heirs: a dying patch leaves what it knew to the most similar patch that lives on.

Who inherits, and how much, is part of the one decision. When a patch dies, its token is averaged into its heir's,
weighted by how many patches each already stands for (its size); the heir takes over only the share of it that the two
have in common, their cosine, so that a patch without a likeness spoils nobody. Attention gives a key of size s more
weight: a bias of ``0.75 log s`` on the key, which fused attention takes. The idea of merging and of that bias is
ToMe's (Bolya et al., ICLR 2023, arXiv 2210.09461); deciding it once, along lives, and the shares are ours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .schedule import Schedule
from .similarity import Likeness

BIAS = 0.75
"""Share of log size: a whole share would count merged patches as if each still asked for itself, none would
ignore them. Three quarters measured best on a frozen ViT-Tiny (recipes/NOTES.md)."""

__all__ = ["Heirs", "adaptive_heirs", "fixed_heirs", "inherit", "key_bias", "log_size", "one_each", "without_autocast"]


class Heirs(NamedTuple):
    """Who inherits from each patch, patches in order of life.

    Attributes:
        rank: of the heir; of the patch itself if it lives to the end.
        share: how much of the patch the heir takes over, in [0, 1].
    """

    rank: Int[Tensor, "batch patches"]
    share: Float[Tensor, "batch patches"]

    def of(self, first: int, end: int) -> Heirs:
        """Those of the patches of rank ``first`` to ``end``."""
        return Heirs(self.rank[:, first:end], self.share[:, first:end])


def fixed_heirs(likeness: Likeness, order: Int[Tensor, "batch patches"], schedule: Schedule) -> Heirs:
    """The most similar patch that survives the drop at which a patch dies; their cosine, if positive, is its share.

    ``order`` names the patches, longest life first.
    """
    batch, patches = order.shape
    likeness, last = likeness.ordered(order), schedule.survivors[-1]
    heirs = [torch.arange(last, device=order.device).expand(batch, -1)]
    shares = [likeness.cosine.new_ones(batch, last)]
    alive = [*dict.fromkeys(schedule.survivors)]  # 196, 96, 43: each group of the dying looks among those left
    alive = alive if alive[0] == patches else [patches, *alive]
    for before, after in reversed(list(pairwise(alive))):
        similarity = likeness.between(slice(after, before), slice(after))
        heirs.append(similarity.argmax(dim=2))
        shares.append(_shares(similarity, heirs[-1]))
    return Heirs(torch.cat(heirs, dim=1), torch.cat(shares, dim=1))


def adaptive_heirs(
    likeness: Likeness, order: Int[Tensor, "batch patches"], counts: Int[Tensor, "batch depth"]
) -> Heirs:
    """`fixed_heirs` where each image has its own survivors per block."""
    rank = torch.arange(order.shape[1], device=order.device)
    doomed = rank[None, :, None] >= counts[:, None, :]  # (batch, rank, block): not among those that enter it
    left = torch.where(doomed, counts[:, None, :], 0).amax(dim=2)  # how many live on when a rank dies; 0: it never does
    everybody = likeness.ordered(order).between(slice(None), slice(None))
    similarity = everybody.masked_fill(rank[None, None, :] >= left[:, :, None], -torch.inf)
    heirs = similarity.argmax(dim=2)
    return Heirs(torch.where(left > 0, heirs, rank), torch.where(left > 0, _shares(similarity, heirs), 1.0))


def _shares(similarity: Float[Tensor, "batch dying others"], heirs: Int[Tensor, "batch dying"]) -> Tensor:
    return similarity.gather(2, heirs[:, :, None]).squeeze(2).clamp(0, 1)  # argmax and gather: max alone is slower


def inherit(
    patches: Float[Tensor, "batch before dim"],
    size: Float[Tensor, "batch before"],
    heirs: Heirs,
) -> tuple[Float[Tensor, "batch after dim"], Float[Tensor, "batch after"]]:
    """Survivors and their sizes after the last patches, whose ``heirs`` are given, left them their shares.

    A product with a matrix of weights: unlike a scatter it adds in a fixed order on every device and in every engine.
    Weights are settled first and means taken in float32 at least: no sum can leave half precision's range.
    """
    after = patches.shape[1] - heirs.rank.shape[1]
    left = size[:, after:] * heirs.share.to(size.dtype)
    takes = (heirs.rank[:, None, :] == torch.arange(after, device=size.device)[:, None]) * left[:, None, :]
    grown = size[:, :after] + takes.sum(dim=2)
    exact = patches.to(size.dtype)
    own = exact[:, :after] * (size[:, :after] / grown)[..., None]
    with without_autocast(own):
        mean = torch.baddbmm(own, takes / grown[..., None], exact[:, after:])
    return mean.to(patches.dtype), grown


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """What is decided and averaged keeps its digits where autocast is on; elsewhere nothing is changed or traced."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def one_each(shape: tuple[int, ...], like: Tensor) -> Float[Tensor, "*shape"]:
    """The sizes to begin with, where ``like`` is: float32, for a share of a patch is no whole number, or wider."""
    return torch.ones(shape, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def key_bias(size: Float[Tensor, "batch patches"], prefix: int) -> Float[Tensor, "batch 1 1 keys"]:
    """What attention adds to its logits: a share of log size for patches, nothing for prefix tokens."""
    return torch.nn.functional.pad(log_size(size), (prefix, 0))[:, None, None, :]


def log_size(size: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The bias of a key that stands for ``size`` patches."""
    return BIAS * torch.log1p(size - 1)  # MKL's log wakes its threads: 50 us for a hundred numbers
