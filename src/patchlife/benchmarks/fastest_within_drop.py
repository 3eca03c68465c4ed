"""Finds the fastest schedule whose top-1 is at most so many points below the dense model's, for each batch size.

`schedule_search.py` finds the fastest schedules at each FLOPs target. Here those that pay are evaluated on labelled
photos, once for all batch sizes, and the fastest one within the allowed drop is chosen across all targets.
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

__all__ = ["AccuracyDrop", "Candidate", "fastest_within_drop", "measure_drops"]

Candidate = tuple[float, Key]
"""A schedule at a FLOPs target: (fraction of the dense FLOPs, (start, drops))."""


@dataclass(frozen=True)
class AccuracyDrop:
    """Top-1 of a schedule beside the dense model's.

    Attributes:
        photos: number of photos evaluated.
        top1: in per cent of the photos.
        drop: points of top-1 below the dense model.
        interval: 95 % interval of ``drop``, from paired differences.
    """

    photos: int
    top1: float
    drop: float
    interval: tuple[float, float]


@torch.inference_mode()
def measure_drops(
    model: SlimModel,
    advice: Sequence[dict[str, Any]],
    dense: nn.Module,
    batches: Iterable[tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, "batch"]]],
) -> dict[Candidate, AccuracyDrop]:
    """Evaluate every schedule in ``advice`` (see `advise`) that pays at some batch size.

    Args:
        model: the backbone and scorer of all schedules.
        advice: results of `advise`.
        dense: the dense model.
        batches: images and labels; read once, and not at all if no schedule pays.

    Raises:
        ImageError: ``batches`` is empty.
    """
    candidates = {_candidate(row) for entry in advice for row in _rows(entry) if pays(row["ratio"])}
    models = {candidate: scheduled(model, *candidate) for candidate in sorted(candidates)}
    if not models:
        return {}
    reference = next(dense.parameters())
    before: list[Tensor] = []
    after: dict[Candidate, list[Tensor]] = {candidate: [] for candidate in models}
    for images, labels in batches:
        images = images.to(reference)
        before.append(dense(images).argmax(dim=1).cpu() == labels)
        for candidate, slimmed in models.items():
            after[candidate].append(slimmed(images).argmax(dim=1).cpu() == labels)
    if not before:
        raise ImageError("none of the labelled photos can be read, so no schedule can be evaluated; check --data")
    return {candidate: _drop(torch.cat(before), torch.cat(right)) for candidate, right in after.items()}


def fastest_within_drop(
    advice: Sequence[dict[str, Any]], drops: dict[Candidate, AccuracyDrop], max_drop: float
) -> list[dict[str, Any]]:
    """For each batch size in ``advice``: the fastest schedule whose top-1 drops by at most ``max_drop`` points.

    An entry without such a schedule has ``chosen`` None; its ``verdict`` says why.
    """
    batch_sizes = dict.fromkeys(entry["batch"] for entry in advice)
    return [_fastest_at(batch, advice, drops, max_drop) for batch in batch_sizes]


def _fastest_at(
    batch: int, advice: Sequence[dict[str, Any]], drops: dict[Candidate, AccuracyDrop], max_drop: float
) -> dict[str, Any]:
    rows = [row for entry in advice if entry["batch"] == batch for row in _rows(entry)]
    evaluated = [(row, drops[_candidate(row)]) for row in rows if pays(row["ratio"])]
    within = [(row, drop) for row, drop in evaluated if drop.drop <= max_drop]
    best = max(within, key=lambda pair: pair[0]["ratio"].median, default=None)
    return {
        "batch": batch,
        "max_drop": max_drop,
        "candidates": [_to_dict(row, drops.get(_candidate(row))) for row in rows],
        "chosen": _to_dict(*best) if best else None,
        "verdict": _verdict(rows, evaluated, best, max_drop),
    }


def _verdict(
    rows: list[dict[str, Any]],
    evaluated: list[tuple[dict[str, Any], AccuracyDrop]],
    best: tuple[dict[str, Any], AccuracyDrop] | None,
    max_drop: float,
) -> str:
    if not evaluated and any(row["ratio"].noisy for row in rows):
        return "too noisy to advise anything; try again on a quiet machine"
    if not evaluated:
        largest = max((row["ratio"] for row in rows), key=lambda ratio: ratio.median)
        return f"slimming does not pay here: at best {_speed_text(largest)}; stay with the dense model"
    if best is None:
        row, drop = min(evaluated, key=lambda pair: pair[1].drop)
        return (
            f"none of the {len(evaluated)} schedules that are faster than dense qualifies; {_schedule_text(row)} comes "
            f"closest, {_drop_text(drop)}: stay with the dense model, or allow more with --max-drop"
        )
    row, drop = best
    unsure = "; the interval exceeds the allowed drop, so evaluate more photos" if drop.interval[1] > max_drop else ""
    return f"{_schedule_text(row)}: {_speed_text(row['ratio'])}, {_drop_text(drop)}{unsure}"


def _drop(before: Tensor, after: Tensor) -> AccuracyDrop:
    low, high = paired_interval(before, after)
    drop = before.double().mean() - after.double().mean()
    return AccuracyDrop(len(after), 100 * after.double().mean().item(), 100 * drop.item(), (100 * low, 100 * high))


# ---- schedules of an advice entry, with target and speed


def _rows(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**schedule, "target": entry["target"], "ratio": Spread(**entry["ratios"][name])}
        for name, schedule in entry["schedules"].items()
    ]


def _candidate(row: dict[str, Any]) -> Candidate:
    return row["target"], (row["start"], tuple(row["drops"]))


def _to_dict(row: dict[str, Any], drop: AccuracyDrop | None) -> dict[str, Any]:
    """Plain values for JSON; ``accuracy`` is null for a schedule that was not evaluated because it does not pay."""
    return {**row, "ratio": vars(row["ratio"]), "accuracy": vars(drop) if drop else None}


def _schedule_text(row: dict[str, Any]) -> str:
    return f"{settings_text(row)} at {row['target']:g} of the FLOPs"


def _speed_text(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x the dense speed ({ratio.p10:.2f}x to {ratio.p90:.2f}x)"


def _drop_text(drop: AccuracyDrop) -> str:
    low, high = drop.interval
    return f"{drop.drop:.2f} points of top-1 lost (95 % interval {low:.2f} to {high:.2f}, {drop.photos} photos)"
