"""Searches the shapes of schedules for a model on unlabelled photos: start block, drop points and power per budget.

Nothing is trained. The dense model runs once on each photo; its tokens at every possible start block are kept, so that
a schedule costs only the blocks from there on. All candidates run on a few photos, the best ones on more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..backbones import Backbone, Embedded
from ..config import LifeConfig, Shape
from ..config.checks import check_budget
from ..errors import ConfigError
from ..slimming import SlimModel
from ..slimming.calibration import images_in
from ..slimming.schedule import floor
from ..slimming.shapes import at_depth, twelfths
from .agreement import kl_divergence
from .embeddings import cosines, one_vector

__all__ = ["BUDGETS", "TunedBudget", "Tuning", "candidates", "tune"]

BUDGETS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.61, 0.7, 0.8, 0.9)
"""The budgets for which a shape is searched by default."""

_STARTS = (1, 2, 3, 4)  # all drop points are in twelfths of the depth, those after the start relative to it
_LATER = ((), (1,), (2,), (3,), (4,), (1, 3), (2, 4), (2, 5), (3, 6), (1, 2, 3), (2, 4, 6), (1, 2, 3, 4, 5))
_POWERS = (0.5, 0.75, 1.0, 1.5)
_ROUNDS = ((12, 36), (64, 4))
"""(photos that all remaining candidates run on, candidates that remain after it); the last ones run on all photos."""
_BATCH = 32

Report = Callable[[int, int], None]
"""Called with (runs done, runs in all), a run being one photo through one schedule."""


@dataclass(frozen=True)
class TunedBudget:
    """What was found for a budget.

    Attributes:
        budget: fraction of the dense FLOPs.
        before: the shape that the model had. loss_before: its distance from the dense model, mean over the photos.
        shape: the best shape. loss: its distance.
    """

    budget: float
    before: Shape
    loss_before: float
    shape: Shape
    loss: float


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`.

    Attributes:
        shapes: the shape of every budget, for `SlimModel.use_shapes`.
        rows: what was measured, by rising budget.
        measure: what the losses are: KL divergence (in nats), or for a model without a classifier cosine distance.
        photos: number of photos.
    """

    shapes: tuple[Shape, ...]
    rows: tuple[TunedBudget, ...]
    measure: str
    photos: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [dataclasses.asdict(r) | {"before": r.before.to_dict(), "shape": r.shape.to_dict()} for r in self.rows]
        return {"measure": self.measure, "photos": self.photos, "rows": rows}


@torch.no_grad()
def tune(
    model: SlimModel,
    batches: Iterable[Any],
    budgets: Sequence[float] = BUDGETS,
    report: Report = lambda done, total: None,
) -> Tuning:
    """The shapes with which ``model`` is nearest to the dense model on unlabelled images; the model is not changed.

    Give the result to the model: ``model.use_shapes(tune(model, batches).shapes)``. Shapes are compared in fixed mode.

    Args:
        model: in eval mode. A learned scorer keeps the start blocks that it was fitted for.
        batches: batches of images of one size, as for `SlimModel.calibrate`. A few hundred images are enough.
        budgets: those to search a shape for; budgets in between have the shape of the nearest one. Those that the
            model's own shape cannot reach are left out, and have no row in the result.
        report: called with the progress.

    Raises:
        ConfigError: no images, images of different sizes, a model in training mode, or no budget within reach.
    """
    if model.training:
        raise ConfigError("shapes are searched in eval mode, but the model is in training mode; call .eval() first")
    asked = sorted({check_budget(budget, "budgets") for budget in budgets} - {1.0})
    if not asked:
        raise ConfigError(f"budgets must have one below 1, at which patches are dropped, got {tuple(budgets)}")
    with model.temporarily(mode="fixed"):
        learned = any(True for _ in model.scorer.parameters())
        possible = candidates(model.backbone.depth, _starts_of(model) if learned else None)
        photos = _Photos(model, batches, {shape.start for shape in possible} | set(model.starts))
        reachable = {budget: found for budget in asked if (found := _reachable(model, budget, possible, photos.size))}
        if not reachable:
            raise ConfigError(f"no budget of {', '.join(map(str, asked))} is within reach of this model")
        progress = _Progress(report, sum(_runs(len(found), photos.count) for found in reachable.values()))
        rows = tuple(_tuned(model, budget, found, photos, progress) for budget, found in reachable.items())
        progress.finish()
        return Tuning(_family(rows, model, photos.size), rows, photos.measure, photos.count)


def candidates(depth: int, starts: Sequence[int] | None = None) -> list[Shape]:
    """The shapes that are tried for a model of ``depth`` blocks, of these start blocks if they are given."""
    places = [start / depth * 12 for start in starts] if starts else [float(start) for start in _STARTS]
    found = [
        replace(shape, power=power)
        for place in places
        for later in _LATER
        for shape in at_depth(((1.0, twelfths(place, *(place + step for step in later)), 1.0),), depth)
        for power in (_POWERS if len(shape.drops) > 1 else (1.0,))
    ]
    return [shape for shape in dict.fromkeys(found) if shape.start in starts] if starts else list(dict.fromkeys(found))


def _starts_of(model: SlimModel) -> tuple[int, ...]:
    return getattr(model.scorer, "starts", None) or model.starts


class _Photos:
    """What the search needs of the photos.

    Attributes:
        tokens: the input of each possible start block, by its index.
        output: of the dense model.
        size: (height, width) of the images. count: number of images.
    """

    def __init__(self, model: SlimModel, batches: Iterable[Any], starts: set[int]) -> None:
        dense = model.dense_backbone()
        each: list[dict[int, Tensor]] = []
        outputs: list[Tensor] = []
        sizes: set[tuple[int, int]] = set()
        with model.temporarily(budget=1.0):
            for batch in batches:
                images = images_in(batch)
                if not isinstance(images, Tensor) or len(sizes | {(images.shape[-2], images.shape[-1])}) > 1:
                    raise ConfigError("shapes are searched on images of one size; give batches of one size")
                sizes.add((images.shape[-2], images.shape[-1]))
                images = images.to(device=model.device, dtype=model.dtype)
                each.append(dict(_tokens(model.backbone, images, starts)))
                outputs.append(dense.output(images))
        if not outputs:
            raise ConfigError("shapes are searched on images, got none")
        self.output, self.tokens = torch.cat(outputs), {s: torch.cat([found[s] for found in each]) for s in starts}
        self.count, self.size = len(self.output), sizes.pop()
        self.embedded: Embedded = model.backbone.embed(model.backbone.blank(self.size))
        self._kl = model.backbone.num_classes > 0

    @property
    def measure(self) -> str:
        """What `loss` is."""
        return "KL divergence" if self._kl else "cosine distance"

    def loss(self, model: SlimModel, rows: range) -> float:
        """Sum of the distances of ``model``, as it is set, from the dense model on these photos."""
        total = 0.0
        for begin in range(rows.start, rows.stop, _BATCH):
            part = slice(begin, min(begin + _BATCH, rows.stop))
            found, expected = model.resume(self.tokens[model.start][part], self.embedded), self.output[part]
            if self._kl:
                distance = kl_divergence(expected.float(), found.float())
            else:
                distance = 1 - cosines(one_vector(expected), one_vector(found))
            total += distance.double().sum().item()
        return total


def _tokens(
    backbone: Backbone, images: Float[Tensor, "batch channels height width"], starts: set[int]
) -> Iterator[tuple[int, Float[Tensor, "batch tokens dim"]]]:
    """(block, its input) for each of ``starts``, which may be 0 and must not be empty."""
    embedded = backbone.embed(images)
    x = embedded.tokens
    for index in range(max(starts) + 1):
        if index in starts:
            yield index, x
        x = backbone.block(index, x, backbone.rope_of(embedded.rope, index)) if index < max(starts) else x


def _reachable(model: SlimModel, budget: float, shapes: Iterable[Shape], size: tuple[int, int]) -> list[LifeConfig]:
    """The settings for this budget: first the model's own, then those of each shape, with different schedules.

    Empty if the model's own shape cannot reach the budget, or no other one can.
    """
    own = model.settings.replace(budget=budget)
    found: dict[Any, LifeConfig] = {}
    for settings in [own, *(own.replace(shapes=(shape,), start=None, drops=None) for shape in shapes)]:
        try:
            with model.temporarily(**vars(settings)):
                found.setdefault((model.schedule(size).kept, model.start), settings)
        except ConfigError:
            if settings is own:
                return []
    return list(found.values())


def _runs(count: int, photos: int) -> int:
    """How many runs a search among ``count`` candidates takes."""
    runs, before = 0, 0
    for many, remaining in (*_ROUNDS, (photos, 1)):
        runs += count * (min(many, photos) - before)
        before, count = min(many, photos), min(count, remaining + 1)
    return runs


def _tuned(
    model: SlimModel, budget: float, settings: Sequence[LifeConfig], photos: _Photos, progress: _Progress
) -> TunedBudget:
    """The best of ``settings`` by halving; the first ones are the model's own, and stay to the end."""
    losses, before = dict.fromkeys(range(len(settings)), 0.0), 0
    with model.temporarily(budget=budget):
        for many, remaining in (*_ROUNDS, (photos.count, 1)):
            rows = range(before, min(many, photos.count))
            for place in losses:
                with model.temporarily(**vars(settings[place])):
                    losses[place] += photos.loss(model, rows)
                progress.add(len(rows))
            before = rows.stop
            best = sorted(losses, key=lambda place: losses[place])[:remaining]
            losses = {place: losses[place] for place in dict.fromkeys([0, *best])}
        shapes = []
        for place in (0, best[0]):
            with model.temporarily(**vars(settings[place])):
                shapes.append(replace(model.shape, budget=budget))
    own, found = (losses[place] / photos.count for place in (0, best[0]))
    return TunedBudget(budget, shapes[0], own, shapes[1], found)


def _family(rows: Sequence[TunedBudget], model: SlimModel, size: tuple[int, int]) -> tuple[Shape, ...]:
    """The shape of each budget for those near it; a boundary is half way, or where the next shape is within reach."""
    family: list[Shape] = []
    for row, following in pairwise(rows):
        alone = (replace(following.shape, budget=1.0),)
        with model.temporarily(budget=following.budget, shapes=alone, start=None, drops=None):
            lowest = math.ceil(1000 * floor(model.cost(size), following.shape.drops) + 1) / 1000
        boundary = min(following.budget, max((row.budget + following.budget) / 2, lowest))
        family.append(replace(row.shape, budget=round(boundary, 4)))
    family.append(replace(rows[-1].shape, budget=1.0))
    return tuple(
        shape
        for shape, after in zip(family, [*family[1:], None], strict=True)
        if after is None or (shape.drops, shape.power) != (after.drops, after.power)
    )


class _Progress:
    def __init__(self, report: Report, total: int) -> None:
        self.report, self.done, self.total = report, 0, total

    def add(self, runs: int) -> None:
        """Count runs that are done."""
        self.done += runs
        self.report(min(self.done, self.total), self.total)

    def finish(self) -> None:
        """Count all runs as done: the total was an upper bound."""
        self.report(self.total, self.total)
