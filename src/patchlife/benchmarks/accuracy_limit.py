"""Which schedule is fastest among those that lose at most so many points of top-1; or: none is, or: leave it dense.

`advice.py` says what is fast at each FLOPs target; here the schedules that pay are put before labelled photos, once
for all batch sizes, and the fastest affordable one is chosen for each batch size, across the targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ImageError
from ..evaluation.accuracy import paired_interval
from ..evaluation.timing import Spread
from ..slimming import SlimModel
from .schedule_search import Key, pays, scheduled, settings_text

__all__ = ["Loss", "affordable", "losses"]

Place = tuple[float, Key]
"""A schedule among all targets': FLOPs target, then start and drops."""


@dataclass(frozen=True)
class Loss:
    """What a schedule does to top-1.

    Attributes:
        photos: how many were evaluated. top1: per cent of them.
        drop: points of top-1 below the dense model. interval: 95 %, from the photos' paired differences.
    """

    photos: int
    top1: float
    drop: float
    interval: tuple[float, float]


@torch.inference_mode()
def losses(
    model: SlimModel,
    advice: Sequence[dict[str, Any]],
    dense: nn.Module,
    batches: Iterable[tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, "batch"]]],
) -> dict[Place, Loss]:
    """Top-1 of every schedule in ``advice`` (see `advise`) that pays at some batch size; photos are read once.

    ``model`` brings backbone and head; ``dense`` is the untouched backbone. No photo is read when nothing pays.
    """
    places = {_place(row) for entry in advice for row in _rows(entry) if pays(row["ratio"])}
    models = {place: scheduled(model, *place) for place in sorted(places)}
    if not models:
        return {}
    reference = next(dense.parameters())
    before: list[Tensor] = []
    after: dict[Place, list[Tensor]] = {place: [] for place in models}
    for images, labels in batches:
        images = images.to(reference)
        before.append(dense(images).argmax(dim=1).cpu() == labels)
        for place, candidate in models.items():
            after[place].append(candidate(images).argmax(dim=1).cpu() == labels)
    if not before:
        raise ImageError("not one of the labelled photos could be read, so no schedule can be evaluated; check --data")
    return {place: _loss(torch.cat(before), torch.cat(right)) for place, right in after.items()}


def affordable(advice: Sequence[dict[str, Any]], lost: dict[Place, Loss], max_drop: float) -> list[dict[str, Any]]:
    """For each batch size in ``advice``: the fastest schedule that loses at most ``max_drop`` points, or why none."""
    return [_chosen(batch, advice, lost, max_drop) for batch in dict.fromkeys(entry["batch"] for entry in advice)]


def _chosen(batch: int, advice: Sequence[dict[str, Any]], lost: dict[Place, Loss], max_drop: float) -> dict[str, Any]:
    rows = [row for entry in advice if entry["batch"] == batch for row in _rows(entry)]
    evaluated = [(row, lost[_place(row)]) for row in rows if pays(row["ratio"])]
    good = [(row, loss) for row, loss in evaluated if loss.drop <= max_drop]
    best = max(good, key=lambda pair: pair[0]["ratio"].median, default=None)
    return {
        "batch": batch,
        "max_drop": max_drop,
        "candidates": [_to_dict(row, lost.get(_place(row))) for row in rows],
        "chosen": _to_dict(*best) if best else None,
        "verdict": _verdict(rows, evaluated, best, max_drop),
    }


def _verdict(
    rows: list[dict[str, Any]],
    evaluated: list[tuple[dict[str, Any], Loss]],
    best: tuple[dict[str, Any], Loss] | None,
    max_drop: float,
) -> str:
    if not evaluated and any(row["ratio"].noisy for row in rows):
        return "too noisy to advise anything; try again on a quiet machine"
    if not evaluated:
        most = max((row["ratio"] for row in rows), key=lambda ratio: ratio.median)
        return f"slimming does not pay here: at best {_speed(most)}; stay with the dense model"
    if best is None:
        row, loss = min(evaluated, key=lambda pair: pair[1].drop)
        return (
            f"none of the {len(evaluated)} schedules that are faster than dense qualifies; {_named(row)} comes closest, "
            f"{_drop(loss)}: stay with the dense model, or allow more with --max-drop"
        )
    row, loss = best
    unsure = "; the interval reaches further, so more photos may tell otherwise" if loss.interval[1] > max_drop else ""
    return f"{_named(row)}: {_speed(row['ratio'])}, {_drop(loss)}{unsure}"


def _loss(before: Tensor, after: Tensor) -> Loss:
    low, high = paired_interval(before, after)
    gap = before.double().mean() - after.double().mean()
    return Loss(len(after), 100 * after.double().mean().item(), 100 * gap.item(), (100 * low, 100 * high))


# ---- schedules of an advice entry, with target and speed


def _rows(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**schedule, "target": entry["target"], "ratio": Spread(**entry["ratios"][name])}
        for name, schedule in entry["schedules"].items()
    ]


def _place(row: dict[str, Any]) -> Place:
    return row["target"], (row["start"], tuple(row["drops"]))


def _to_dict(row: dict[str, Any], loss: Loss | None) -> dict[str, Any]:
    """Plain values for JSON; ``loss`` is null where the schedule did not pay, so that nobody looked."""
    return {**row, "ratio": vars(row["ratio"]), "loss": vars(loss) if loss else None}


def _named(row: dict[str, Any]) -> str:
    return f"{settings_text(row)} at {row['target']:g} of the FLOPs"


def _speed(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x the dense speed ({ratio.p10:.2f}x to {ratio.p90:.2f}x)"


def _drop(loss: Loss) -> str:
    low, high = loss.interval
    return f"{loss.drop:.2f} points of top-1 lost (95 % interval {low:.2f} to {high:.2f}, {loss.photos} photos)"
