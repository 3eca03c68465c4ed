"""The answers for a folder of photos against the budget, and which photos change theirs first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import CURVE_BUDGETS
from ..data import evenly_spaced, load_batches
from ..errors import ConfigError
from ..evaluation.agreement import kl_divergence
from .explorer import Explorer

__all__ = ["Change", "FolderCurve", "curve_of", "reachable"]

_BATCH = 16


@dataclass(frozen=True)
class Change:
    """A photo whose answer differs from the first one's (the dense model's, or that of the largest budget).

    Attributes:
        photo: its file.
        budget: the largest one at which the answer differs.
        before, after: the answers; empty for a model without a classifier.
    """

    photo: Path
    budget: float
    before: str
    after: str


@dataclass(frozen=True)
class FolderCurve:
    """Measures of a folder by budget.

    Attributes:
        measure: what ``values`` are: "top-1", "same answer as dense" (fractions) or "cosine to dense".
        values: by budget.
        dense: the measure of the dense model; None where it is 1 by definition or not known.
        divergences: KL divergence from the dense model by budget, in nats, mean over the photos; empty without a dense
            model, and for a model without a classifier or with several classes a photo.
        photos: that were read. unread: messages for the others.
        changes: photos that change their answer, those at the largest budgets first.
    """

    measure: str
    values: dict[float, float]
    dense: float | None
    divergences: dict[float, float]
    photos: int
    unread: list[str]
    changes: list[Change]


def reachable(explorer: Explorer) -> list[float]:
    """The budgets of a curve, the largest first: those in an exported file, else the ones that the model reaches."""
    if explorer.budgets is not None:
        return explorer.budgets[::-1]
    model, found = explorer.slim, []
    assert model is not None
    with model.temporarily(mode="fixed"):
        for budget in sorted(CURVE_BUDGETS, reverse=True):
            try:
                model.set_budget(budget).schedule()
            except ConfigError:
                continue
            found.append(budget)
    return found


def curve_of(
    explorer: Explorer,
    photos: Sequence[Path],
    limit: int = 200,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FolderCurve:
    """Measure up to ``limit`` of the photos, evenly spaced, in fixed mode.

    The measure is top-1 where the folders are classes of the model, else the agreement with the dense model; for a
    model without a classifier the cosine to the dense embedding. ``progress`` is told (photos done, photos).

    Raises ConfigError if no photo can be read.
    """
    chosen = evenly_spaced(photos, limit)
    classes, budgets = _classes(explorer, photos, chosen), reachable(explorer)
    first: list[float | None] = [None] if explorer.slim is not None else []
    told: list[list[Tensor]] = [[] for _ in (*first, *budgets)]
    read: list[int] = []
    unread: list[str] = []
    for done, batch in enumerate(_batches(explorer, chosen)):
        read += batch.indices
        unread += [str(error) for _, error in batch.failures]
        if len(batch.images):
            for outputs, found in zip(told, explorer.outputs(batch.images, [*first, *budgets]), strict=True):
                outputs.append(found)
        progress(min(len(chosen), (done + 1) * _BATCH), len(chosen))
    if not read:
        raise ConfigError("none of the photos can be read; " + (unread[0] if unread else "the folder is empty"))
    outputs = [torch.cat(parts) for parts in told]
    by_budget = dict(zip(budgets, outputs[len(first) :], strict=True))
    paths = [chosen[index] for index in read]
    if not explorer.classes:
        values = {b: torch.cosine_similarity(outputs[0], own).mean().item() for b, own in by_budget.items()}
        return FolderCurve("cosine to dense", values, None, {}, len(paths), unread, [])
    names = explorer.pipeline.labels.names
    answers = {budget: own.argmax(dim=1).tolist() for budget, own in by_budget.items()}
    reference = outputs[0].argmax(dim=1).tolist()
    changes = [
        Change(path, budget, names[reference[i]], names[answers[budget][i]])
        for i, path in enumerate(paths)
        if (budget := next((b for b in budgets if answers[b][i] != reference[i]), None)) is not None
    ]
    divergences = {}
    if first and not explorer.pipeline.multi_label:
        logs = outputs[0].clamp_min(1e-12).log()
        divergences = {b: kl_divergence(logs, own.clamp_min(1e-12).log()).mean().item() for b, own in by_budget.items()}
    changes.sort(key=lambda change: -change.budget)
    if classes is not None:
        truth = [classes[index] for index in read]
        values = {budget: _fraction(own, truth) for budget, own in answers.items()}
        dense = _fraction(reference, truth) if explorer.slim is not None else None
        return FolderCurve("top-1", values, dense, divergences, len(paths), unread, changes)
    values = {budget: _fraction(own, reference) for budget, own in answers.items()}
    return FolderCurve("same answer as dense", values, None, divergences, len(paths), unread, changes)


def _batches(explorer: Explorer, photos: Sequence[Path]) -> Iterator:
    return iter(load_batches(photos, explorer.pipeline.preprocess, _BATCH))


def _classes(explorer: Explorer, photos: Sequence[Path], chosen: Sequence[Path]) -> list[int] | None:
    """The class of each chosen photo; None where the folders are not all classes of the model."""
    if not explorer.classes or explorer.pipeline.multi_label:
        return None
    try:
        by_path = dict(zip(photos, explorer.pipeline.labels.classes_of(photos), strict=True))
    except ConfigError:
        return None
    return [by_path[path] for path in chosen]


def _fraction(answers: Sequence[int], expected: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(answers)
