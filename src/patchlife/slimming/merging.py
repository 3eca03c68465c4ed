"""Merging: when a patch is dropped, its token is averaged into the most similar kept one, its merge target.

Targets and merge weights are part of the one decision. The mean is weighted by size (how many patches a token stands
for) and by the merge weight (the cosine of the two patches, so that a patch with low similarity changes little). A key
of size s gets the bias ``0.75 * log(s)`` on its attention logits, which fused attention accepts as a mask. Merging, and
a bias of ``log(s)``, are from ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461); one decision for all drops, and cosines
as weights, are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .schedule import Schedule
from .similarity import comparable, flat_index, most_similar, row_blocks, take, windows

__all__ = [
    "MergeTargets",
    "adaptive_merge_targets",
    "fixed_merge_targets",
    "initial_sizes",
    "key_bias",
    "log_size",
    "merge",
    "merge_rows",
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
    embedding: Float[Tensor, "batch patches k"], order: Int[Tensor, "batch patches"], schedule: Schedule
) -> MergeTargets:
    """For each patch the most similar one of those kept at the drop point that drops it, weighted by their cosine.

    Args:
        embedding: similarity embeddings, vectors of unit length, in grid order.
        order: the patches, longest life first.
        schedule: how many are kept.
    """
    if len(windows(order.shape[1])) > 1:
        return _targets_in_windows(embedding, order, _kept_where_dropped(schedule, order))
    return _targets(take(comparable(embedding), order), schedule.kept)


def adaptive_merge_targets(
    embedding: Float[Tensor, "batch patches k"],
    order: Int[Tensor, "batch patches"],
    counts: Int[Tensor, "batch depth"],
) -> MergeTargets:
    """`fixed_merge_targets` where each image keeps its own number of patches in each block."""
    if len(windows(order.shape[1])) > 1 or not len(order):
        return _targets_in_windows(embedding, order, _counts_where_dropped(counts, order.shape[1]))
    ranked = take(comparable(embedding), order)
    if not adds_in_order(ranked):
        return _targets_together(ranked, _counts_where_dropped(counts, order.shape[1]))
    each = [_targets(ranked[image : image + 1], kept) for image, kept in enumerate(counts.tolist())]
    return MergeTargets(*(torch.cat(parts) for parts in zip(*each, strict=True)))


def _targets(ranked: Float[Tensor, "batch patches k"], kept: Sequence[int]) -> MergeTargets:
    """The merge targets of patches in order of life, of which each block keeps the first ones."""
    batch, patches, _ = ranked.shape
    counts = [*dict.fromkeys((patches, *kept))]  # such as 196, 96, 43
    ranks = [torch.arange(counts[-1], device=ranked.device).expand(batch, -1)]
    weights = [ranked.new_ones(batch, counts[-1])]
    for before, after in reversed(list(pairwise(counts))):
        target, cosine = most_similar(ranked[:, after:before], ranked[:, :after])
        ranks.append(target)
        weights.append(cosine)
    return MergeTargets(torch.cat(ranks, dim=1), torch.cat(weights, dim=1).clamp(0, 1))


def _targets_together(ranked: Float[Tensor, "batch patches k"], kept: Int[Tensor, "batch patches"]) -> MergeTargets:
    """`_targets` of images with different counts: a few calls for all of them, where one for each image would be slow.

    ``kept`` is how many patches are kept at the drop point that drops each rank; 0: it is never dropped.
    """
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    targets, weights = [], []
    for rows in row_blocks(len(rank), len(rank)):
        cosine = ranked[:, rows] @ ranked.transpose(1, 2)
        best = cosine.masked_fill(rank >= kept[:, rows, None], -torch.inf).max(dim=2)
        dropped = kept[:, rows] > 0
        targets.append(torch.where(dropped, best.indices, rank[rows]))
        weights.append(torch.where(dropped, best.values, 1.0).clamp(0, 1))
    return MergeTargets(torch.cat(targets, dim=1), torch.cat(weights, dim=1))


def _counts_where_dropped(counts: Int[Tensor, "batch depth"], patches: int) -> Int[Tensor, "batch patches"]:
    """How many patches are kept at the drop point that drops each rank; 0: it is never dropped."""
    ranks = torch.arange(patches, device=counts.device)
    absent = ranks[None, :, None] >= counts[:, None, :]  # (batch, rank, block): does not enter that block
    return torch.where(absent, counts[:, None, :], 0).amax(dim=2)


def _kept_where_dropped(schedule: Schedule, order: Int[Tensor, "batch patches"]) -> Int[Tensor, "batch patches"]:
    """`_counts_where_dropped` for a schedule; without a copy from the host, which a CUDA graph cannot record."""
    counts = [*dict.fromkeys((order.shape[1], *schedule.kept))]
    parts = [order.new_zeros(counts[-1])]
    parts += [order.new_full((before - after,), after) for before, after in reversed(list(pairwise(counts)))]
    return torch.cat(parts).expand(order.shape[0], -1)


def _targets_in_windows(
    embedding: Float[Tensor, "batch patches k"],
    order: Int[Tensor, "batch patches"],
    kept: Int[Tensor, "batch patches"],
) -> MergeTargets:
    """The merge targets, searched in each patch's window (`similarity.windows`); ``kept`` as in `_targets_together`.

    A patch whose window keeps none is merged with weight 0.
    """
    embedding, rank = comparable(embedding), order.argsort(dim=1)
    found = [_targets_in(embedding[:, w], rank[:, w], kept) for w in windows(order.shape[1])]
    ranks, target, weight = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return MergeTargets(
        torch.empty_like(target).scatter(1, ranks, target), torch.empty_like(weight).scatter(1, ranks, weight)
    )


def _targets_in(
    embedding: Float[Tensor, "batch patches k"], rank: Int[Tensor, "batch patches"], kept: Int[Tensor, "batch all"]
) -> tuple[Tensor, Tensor, Tensor]:
    """(ranks of one window's patches in rising order, the rank of the target of each, its merge weight)."""
    rank, local = rank.sort(dim=1)
    ranked, kept = take(embedding, local), kept.gather(1, rank)
    targets, weights = [], []
    for rows in row_blocks(rank.shape[1], rank.shape[1]):
        cosine = ranked[:, rows] @ ranked.transpose(1, 2)
        best = cosine.masked_fill(rank[:, None, :] >= kept[:, rows, None], -torch.inf).max(dim=2)
        dropped, none = kept[:, rows] > 0, best.values == -torch.inf
        target = torch.where(none, 0, rank.gather(1, best.indices))
        targets.append(torch.where(dropped, target, rank[:, rows]))
        weights.append(torch.where(dropped, best.values.clamp(0, 1), 1.0))
    return rank, torch.cat(targets, dim=1), torch.cat(weights, dim=1)


def adds_in_order(x: Tensor) -> bool:
    """Whether ``x`` is on a CPU: it adds rows in order, fast, and a call takes little time there."""
    return x.device.type == "cpu"


def merge(
    tokens: Float[Tensor, "batch before dim"],
    size: Float[Tensor, "batch before"],
    target: Int[Tensor, "batch dropped"],
    weight: Float[Tensor, "batch dropped"],
) -> tuple[Float[Tensor, "batch kept dim"], Float[Tensor, "batch kept"]]:
    """(kept tokens, their sizes) after the last ones were merged, each with its ``weight`` into the token ``target``.

    Weights come first and means are taken in float32 at least, so no sum exceeds half precision's range.
    """
    batch, dropped = target.shape
    kept = tokens.shape[1] - dropped
    moved = size[:, kept:] * weight.to(size.dtype)
    if torch.compiler.is_compiling() or not adds_in_order(tokens):
        return _merge_by_product(tokens, size, target, moved)
    exact, place = tokens.to(size.dtype), flat_index(target, kept)
    mean, new_size = merge_rows(
        exact[:, :kept].flatten(0, 1), size[:, :kept].flatten(), exact[:, kept:].flatten(0, 1), moved.flatten(), place
    )
    return mean.view(batch, kept, tokens.shape[2]).to(tokens.dtype), new_size.view(batch, kept)


def merge_rows(
    rows: Float[Tensor, "rows dim"],
    size: Float[Tensor, "rows"],
    dropped: Float[Tensor, "dropped dim"],
    moved: Float[Tensor, "dropped"],
    target: Int[Tensor, "dropped"],
) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows"]]:
    """(rows, their sizes) after ``moved`` of each dropped token was merged into the row ``target``.

    Weights come first, and a row that nothing is merged into stays as it is, to the bit.
    """
    new_size = size.index_add(0, target, moved)
    mean = rows * (size / new_size)[:, None]
    _add_to(mean, target, dropped * (moved / new_size[target])[:, None])
    return mean, new_size


def _add_to(rows: Float[Tensor, "rows dim"], target: Int[Tensor, "added"], added: Float[Tensor, "added dim"]) -> None:
    """Add each of ``added`` to its target among ``rows``, in place and in order.

    With several threads torch first sorts the targets in parallel where rows are the first dimension. That takes longer
    than adding 2000 of them one after the other. The sums are the same to the bit.
    """
    if len(added) > 2000 or torch.get_num_threads() == 1 or rows.device.type != "cpu":
        rows.index_add_(0, target, added)
    else:
        rows.t().index_add_(1, target, added.t())


def _merge_by_product(
    tokens: Float[Tensor, "batch before dim"],
    size: Float[Tensor, "batch before"],
    target: Int[Tensor, "batch dropped"],
    moved: Float[Tensor, "batch dropped"],
) -> tuple[Float[Tensor, "batch kept dim"], Float[Tensor, "batch kept"]]:
    """`merge` as a product with a matrix of weights, for devices and engines that scatter in no fixed order.

    On a CPU `torch.index_add` adds row after row, and takes a fiftieth of the time at 2000 dropped patches.
    """
    kept = tokens.shape[1] - target.shape[1]
    received = (target[:, None, :] == torch.arange(kept, device=size.device)[:, None]) * moved[:, None, :]
    new_size = size[:, :kept] + received.sum(dim=2)
    exact = tokens.to(size.dtype)
    own = exact[:, :kept] * (size[:, :kept] / new_size)[..., None]
    with without_autocast(own):
        mean = torch.baddbmm(own, received / new_size[..., None], exact[:, kept:])
    return mean.to(tokens.dtype), new_size


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Autocast off where it is on: decisions and means keep their precision. Elsewhere nothing is changed or traced."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def initial_sizes(shape: tuple[int, ...], like: Tensor) -> Float[Tensor, "*shape"]:
    """Ones on the device of ``like``, in float32 or wider: after a weighted merge a size is not a whole number."""
    return torch.ones(shape, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def key_bias(size: Float[Tensor, "batch keys"]) -> Float[Tensor, "batch 1 1 keys"]:
    """`log_size` in the shape of attention logits. Prefix tokens have size 1 and get 0."""
    return log_size(size)[:, None, None, :]


def log_size(size: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The bias of a key that stands for ``size`` patches."""
    return BIAS * torch.log1p(size - 1)  # not log: MKL's log wakes its threads, 50 us for a hundred numbers
