"""What the place of a dropped patch holds where all patches are needed again: in dense features, and for pooling.

A patch p that was dropped and merged into its target t gets, by `LifeConfig.restore`:

    last        last(p)
    target      restored(t)
    residual    last(p) + restored(t) - merged(t)

last(p) is the state with which p was dropped, merged(t) the state of t right after p was merged into it, and
restored(t) the state of t at the asked block. The residual thus adds to p what the blocks changed in its target. A
target that was dropped later is itself restored first: drop points are undone from the last one to the first.

Every rule is a sum of two terms, of which one can be absent. A run keeps them only where all patches are asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...config import Restore
from ..similarity import take

__all__ = ["Dropped", "DroppedRows", "dropped_patches", "dropped_rows", "restored", "restored_rows"]


class Dropped(NamedTuple):
    """The patches of one drop point, in fixed mode: a place gets ``own`` plus the state of ``target``.

    Attributes:
        own: None where only the target counts.
        target: tokens that were kept at this drop point; None where only ``own`` counts.
        slope: for `run_gated`: zeros, with the gradients of the choice among the kept patches.
    """

    own: Float[Tensor, "batch dropped dim"] | None
    target: Int[Tensor, "batch dropped"] | None
    slope: Float[Tensor, "batch kept dropped"] | None = None


def dropped_patches(
    how: Restore,
    last: Float[Tensor, "batch dropped dim"],
    kept: Float[Tensor, "batch tokens_kept dim"],
    target: Int[Tensor, "batch dropped"] | None,
    slope: Float[Tensor, "batch kept dropped"] | None = None,
) -> Dropped:
    """What is kept of a drop point. ``last``: states of the dropped patches; ``kept``: the other tokens, merged."""
    if how == "last":
        return Dropped(last, None)
    assert target is not None, "without merging the rule is last (LifeConfig.restore_by)"
    return Dropped(last - take(kept, target) if how == "residual" else None, target, slope)


def restored(tokens: Float[Tensor, "batch tokens_kept dim"], drops: list[Dropped]) -> Float[Tensor, "batch tokens dim"]:
    """``tokens`` after some block, then the patches of ``drops`` (first drop point first), in the plan's order."""
    parts = [tokens]
    for drop in reversed(drops):
        if drop.target is not None:
            parts = [_joined(parts)]
        parts.append(_states(drop, parts[0]))
    return _joined(parts)


def _states(drop: Dropped, tokens: Float[Tensor, "batch tokens_kept dim"]) -> Float[Tensor, "batch dropped dim"]:
    """The restored patches of a drop point; ``tokens`` are all that were kept there, themselves restored."""
    if drop.target is None:
        assert drop.own is not None
        return drop.own
    states = take(tokens, drop.target)
    if drop.slope is not None:
        kept = tokens[:, tokens.shape[1] - drop.slope.shape[1] :].detach()
        states = states + drop.slope.transpose(1, 2).to(kept.dtype) @ kept  # adds 0
    return states if drop.own is None else drop.own + states


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class DroppedRows(NamedTuple):
    """The patches of one drop point, in adaptive mode: the row ``place`` gets ``own`` plus the row ``target``."""

    place: Int[Tensor, "dropped"]
    own: Float[Tensor, "dropped dim"] | None
    target: Int[Tensor, "dropped"]


def dropped_rows(
    how: Restore, rows: Float[Tensor, "all dim"], place: Int[Tensor, "dropped"], target: Int[Tensor, "dropped"]
) -> DroppedRows:
    """What is kept of a drop point. ``rows``: after the merge; those of dropped patches hold their last state."""
    return DroppedRows(place, rows[place] - rows[target] if how == "residual" else None, target)


def restored_rows(rows: Float[Tensor, "all dim"], drops: list[DroppedRows]) -> Float[Tensor, "all dim"]:
    """``rows`` after some block, with the places of ``drops`` (first drop point first) restored; ``rows`` are kept."""
    rows = rows.clone()
    for drop in reversed(drops):
        states = rows[drop.target]
        rows.index_copy_(0, drop.place, states if drop.own is None else drop.own + states)
    return rows
