"""Merging: when a patch is dropped, its token is averaged into the most similar kept one, its merge target.

Targets and merge weights are part of the one decision. The mean is weighted by size (how many patches a token stands
for) and by the merge weight (the cosine of the two patches, so that a patch with low similarity changes little). A key
of size s gets the bias ``0.75 * log(s)`` on its attention logits, which fused attention accepts as a mask. Merging, and
a bias of ``log(s)``, are from ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461); one decision for all drops, and cosines
as weights, are ours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .schedule import Schedule
from .similarity import Similarity

__all__ = [
    "MergeTargets",
    "adaptive_merge_targets",
    "fixed_merge_targets",
    "initial_sizes",
    "key_bias",
    "log_size",
    "merge",
    "without_autocast",
]

BIAS = 0.75
"""Factor of the log size. 1 would count a merged token as if each of its patches still were a key of its own, 0 would
ignore the size; 0.75 measured best on a frozen ViT-Tiny (recipes/NOTES.md)."""


class MergeTargets(NamedTuple):
    """Where each patch is merged when it is dropped; patches in order of life.

    Attributes:
        rank: of the target; a patch that is never dropped is its own target.
        weight: how much of the patch the target takes, in [0, 1].
    """

    rank: Int[Tensor, "batch patches"]
    weight: Float[Tensor, "batch patches"]

    def of(self, first: int, end: int) -> MergeTargets:
        """Those of the patches of rank ``first`` to ``end``."""
        return MergeTargets(self.rank[:, first:end], self.weight[:, first:end])


def fixed_merge_targets(
    similarity: Similarity, order: Int[Tensor, "batch patches"], schedule: Schedule
) -> MergeTargets:
    """For each patch the most similar one of those kept at the drop point that drops it, weighted by their cosine.

    ``order`` names the patches, longest life first.
    """
    batch, patches = order.shape
    similarity, last = similarity.ordered(order), schedule.kept[-1]
    ranks = [torch.arange(last, device=order.device).expand(batch, -1)]
    weights = [similarity.cosine.new_ones(batch, last)]
    counts = [*dict.fromkeys(schedule.kept)]  # such as 196, 96, 43
    counts = counts if counts[0] == patches else [patches, *counts]
    for before, after in reversed(list(pairwise(counts))):
        cosine = similarity.between(slice(after, before), slice(after))
        ranks.append(cosine.argmax(dim=2))
        weights.append(_weights(cosine, ranks[-1]))
    return MergeTargets(torch.cat(ranks, dim=1), torch.cat(weights, dim=1))


def adaptive_merge_targets(
    similarity: Similarity, order: Int[Tensor, "batch patches"], counts: Int[Tensor, "batch depth"]
) -> MergeTargets:
    """`fixed_merge_targets` where each image keeps its own number of patches in each block."""
    rank = torch.arange(order.shape[1], device=order.device)
    absent = rank[None, :, None] >= counts[:, None, :]  # (batch, rank, block): does not enter that block
    # how many patches are kept at the drop point that drops a rank; 0: it is never dropped
    kept = torch.where(absent, counts[:, None, :], 0).amax(dim=2)
    cosine = similarity.ordered(order).between(slice(None), slice(None))
    cosine = cosine.masked_fill(rank[None, None, :] >= kept[:, :, None], -torch.inf)
    target = cosine.argmax(dim=2)
    return MergeTargets(torch.where(kept > 0, target, rank), torch.where(kept > 0, _weights(cosine, target), 1.0))


def _weights(cosine: Float[Tensor, "batch dropped kept"], target: Int[Tensor, "batch dropped"]) -> Tensor:
    return cosine.gather(2, target[:, :, None]).squeeze(2).clamp(0, 1)  # argmax and gather: max alone is slower


def merge(
    patches: Float[Tensor, "batch before dim"],
    size: Float[Tensor, "batch before"],
    targets: MergeTargets,
) -> tuple[Float[Tensor, "batch kept dim"], Float[Tensor, "batch kept"]]:
    """(kept patches, their sizes) after the last ones, whose ``targets`` are given, were merged into them.

    The mean is a product with a matrix of weights: unlike a scatter it adds in a fixed order on every device and in
    every engine. Weights come first and means are taken in float32 at least, so no sum exceeds half precision's range.
    """
    kept = patches.shape[1] - targets.rank.shape[1]
    moved = size[:, kept:] * targets.weight.to(size.dtype)
    received = (targets.rank[:, None, :] == torch.arange(kept, device=size.device)[:, None]) * moved[:, None, :]
    new_size = size[:, :kept] + received.sum(dim=2)
    exact = patches.to(size.dtype)
    own = exact[:, :kept] * (size[:, :kept] / new_size)[..., None]
    with without_autocast(own):
        mean = torch.baddbmm(own, received / new_size[..., None], exact[:, kept:])
    return mean.to(patches.dtype), new_size


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Autocast off where it is on: decisions and means keep their precision. Elsewhere nothing is changed or traced."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def initial_sizes(shape: tuple[int, ...], like: Tensor) -> Float[Tensor, "*shape"]:
    """Ones on the device of ``like``, in float32 or wider: after a weighted merge a size is not a whole number."""
    return torch.ones(shape, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def key_bias(size: Float[Tensor, "batch patches"], prefix: int) -> Float[Tensor, "batch 1 1 keys"]:
    """What is added to the attention logits of each key: `log_size` for patches, 0 for prefix tokens."""
    return torch.nn.functional.pad(log_size(size), (prefix, 0))[:, None, None, :]


def log_size(size: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The bias of a key that stands for ``size`` patches."""
    return BIAS * torch.log1p(size - 1)  # not log: MKL's log wakes its threads, 50 us for a hundred numbers
