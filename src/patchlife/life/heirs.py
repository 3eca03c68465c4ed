"""Heirs: a dying patch leaves what it knew to the most similar patch that lives on.

Who inherits is part of the one decision. When a patch dies, its token is averaged into its heir's, weighted by
how many patches each already stands for (its size), and attention gives a key of size s more weight: a bias of
``0.75 log s`` on the key, which fused attention takes. The idea of merging and of that bias is ToMe's (Bolya et al.,
ICLR 2023, arXiv 2210.09461); deciding it once, along lives, is ours.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .schedule import Schedule

BIAS = 0.75
"""Share of log size: a whole share would count merged patches as if each still asked for itself, none would
ignore them. Three quarters measured best on a frozen ViT-Tiny (recipes/NOTES.md)."""

__all__ = ["adaptive_heirs", "fixed_heirs", "inherit", "key_bias", "log_size"]


def fixed_heirs(kin: Float[Tensor, "batch patches dim"], schedule: Schedule) -> Int[Tensor, "batch patches"]:
    """For each rank, the rank of its heir: the most similar patch that survives the drop at which it dies.

    ``kin`` has unit rows in order of life. Survivors to the end are their own heirs.
    """
    batch, patches, _ = kin.shape
    last = schedule.survivors[-1]
    heirs = [torch.arange(last, device=kin.device).expand(batch, -1)]
    alive = [*dict.fromkeys(schedule.survivors)]  # 196, 96, 43: each group of the dying looks among those left
    alive = alive if alive[0] == patches else [patches, *alive]
    for before, after in reversed(list(pairwise(alive))):
        similarity = kin[:, after:before] @ kin[:, :after].transpose(1, 2)
        heirs.append(similarity.argmax(dim=2))
    return torch.cat(heirs, dim=1)


def adaptive_heirs(
    kin: Float[Tensor, "batch patches dim"], counts: Int[Tensor, "batch depth"]
) -> Int[Tensor, "batch patches"]:
    """`fixed_heirs` where each image has its own survivors per block."""
    patches = kin.shape[1]
    rank = torch.arange(patches, device=kin.device)
    doomed = rank[None, :, None] >= counts[:, None, :]  # (batch, rank, block): not among those that enter it
    left = torch.where(doomed, counts[:, None, :], 0).amax(
        dim=2
    )  # how many live on when this rank dies; 0: it never does
    similarity = (kin @ kin.transpose(1, 2)).masked_fill(rank[None, None, :] >= left[:, :, None], -torch.inf)
    return torch.where(left > 0, similarity.argmax(dim=2), rank)


def inherit(
    patches: Float[Tensor, "batch before dim"],
    size: Float[Tensor, "batch before"],
    heirs: Int[Tensor, "batch dying"],
) -> tuple[Float[Tensor, "batch after dim"], Float[Tensor, "batch after"]]:
    """Survivors and their sizes after the last ``dying`` patches went into their heirs.

    A product with a 0/1 matrix: unlike a scatter it adds in a fixed order on every device and in every engine.
    """
    after = patches.shape[1] - heirs.shape[1]
    takes = (heirs[:, None, :] == torch.arange(after, device=heirs.device)[:, None]).to(patches.dtype)
    weight = size.to(patches.dtype)
    mass = patches[:, :after] * weight[:, :after, None] + takes @ (patches[:, after:] * weight[:, after:, None])
    grown = size[:, :after] + takes.to(size.dtype).matmul(size[:, after:, None]).squeeze(-1)
    return mass / grown[..., None].to(mass.dtype), grown


def key_bias(size: Float[Tensor, "batch patches"], prefix: int) -> Float[Tensor, "batch 1 1 keys"]:
    """What attention adds to its logits: a share of log size for patches, nothing for prefix tokens."""
    return torch.nn.functional.pad(log_size(size), (prefix, 0))[:, None, None, :]


def log_size(size: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The bias of a key that stands for ``size`` patches."""
    return BIAS * size.log()
