"""The answers for a folder of photos against the budget, and which photos change theirs first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import CURVE_BUDGETS
from ..data import evenly_spaced, load_batches
from ..errors import ConfigError
from ..evaluation.agreement import kl_divergence
from .explorer import Explorer

__all__ = ["Change", "FolderCurve", "budgets_of", "curve_of"]

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


def budgets_of(explorer: Explorer) -> list[float]:
    """The budgets of a curve, the largest first: those in an exported file, else the ones that the model reaches."""
    if explorer.budgets is not None:
        return explorer.budgets[::-1]
    assert explorer.slim is not None
    with explorer.slim.temporarily(mode="fixed"):
        return explorer.slim.in_reach(CURVE_BUDGETS)


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
    classes = _classes(explorer, photos, chosen)
    told = _told(explorer, chosen, progress)
    return _of_answers(explorer, told, classes) if explorer.classes else _of_embeddings(told)


# ---- running


class _Told(NamedTuple):
    """What the model says of the photos that could be read, at each budget."""

    photos: list[Path]
    indices: list[int]  # of these photos among the chosen ones
    unread: list[str]
    dense: Tensor | None  # (photos, classes or width); None without a dense model
    by_budget: dict[float, Tensor]  # the largest budget first

    @property
    def reference(self) -> Tensor:
        """What the others are compared with: the dense model, or else the largest budget."""
        return self.dense if self.dense is not None else next(iter(self.by_budget.values()))


def _told(explorer: Explorer, chosen: Sequence[Path], progress: Callable[[int, int], None]) -> _Told:
    budgets = budgets_of(explorer)
    dense: list[float | None] = [None] if explorer.slim is not None else []
    parts: list[list[Tensor]] = [[] for _ in (*dense, *budgets)]
    read: list[int] = []
    unread: list[str] = []
    for done, batch in enumerate(load_batches(chosen, explorer.pipeline.preprocess, _BATCH)):
        read += batch.indices
        unread += [str(error) for _, error in batch.failures]
        if len(batch.images):
            for part, output in zip(parts, explorer.outputs(batch.images, [*dense, *budgets]), strict=True):
                part.append(output)
        progress(min(len(chosen), (done + 1) * _BATCH), len(chosen))
    if not read:
        raise ConfigError("none of the photos can be read; " + (unread[0] if unread else "the folder is empty"))
    outputs = [torch.cat(part) for part in parts]
    own = outputs.pop(0) if dense else None
    return _Told([chosen[i] for i in read], read, unread, own, dict(zip(budgets, outputs, strict=True)))


# ---- measures


def _of_embeddings(told: _Told) -> FolderCurve:
    values = {b: torch.cosine_similarity(told.reference, own).mean().item() for b, own in told.by_budget.items()}
    return FolderCurve("cosine to dense", values, None, {}, len(told.photos), told.unread, [])


def _of_answers(explorer: Explorer, told: _Told, classes: Sequence[int] | None) -> FolderCurve:
    """Of a classifier; ``classes`` of the chosen photos, if they are known."""
    reference, answers = _answers(told.reference), {b: _answers(own) for b, own in told.by_budget.items()}
    changes = _changes(told.photos, explorer.pipeline.labels.names, reference, answers)
    divergences = {} if explorer.pipeline.multi_label else _divergences(told)
    if classes is None:
        measure, expected, dense = "same answer as dense", reference, None
    else:
        measure, expected = "top-1", [classes[index] for index in told.indices]
        dense = _fraction(reference, expected) if told.dense is not None else None
    values = {budget: _fraction(own, expected) for budget, own in answers.items()}
    return FolderCurve(measure, values, dense, divergences, len(told.photos), told.unread, changes)


def _answers(probabilities: Tensor) -> list[int]:
    return probabilities.argmax(dim=1).tolist()


def _changes(
    photos: Sequence[Path], names: Sequence[str], reference: Sequence[int], answers: dict[float, list[int]]
) -> list[Change]:
    """The photos with another answer than the reference, those that change at the largest budgets first."""
    found = []
    for i, photo in enumerate(photos):
        budget = next((b for b, own in answers.items() if own[i] != reference[i]), None)
        if budget is not None:
            found.append(Change(photo, budget, names[reference[i]], names[answers[budget][i]]))
    return sorted(found, key=lambda change: -change.budget)


def _divergences(told: _Told) -> dict[float, float]:
    """KL divergence from the dense model by budget, in nats; empty without a dense model."""
    if told.dense is None:
        return {}
    dense = told.dense.clamp_min(1e-12).log()
    return {b: kl_divergence(dense, own.clamp_min(1e-12).log()).mean().item() for b, own in told.by_budget.items()}


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
