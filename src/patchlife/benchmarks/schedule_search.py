"""Which schedule is fastest here, from what single blocks take at several token counts; or: leave it dense.

FLOPs are a promise; a device keeps it where a block gets faster with fewer tokens. So blocks are timed, schedules
are predicted from that, and the best prediction is put to the test against the dense model before it is advised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones import Backbone, sdpa
from ..errors import ConfigError
from ..evaluation.timing import Spread, alternate
from ..slimming import Schedule, SlimModel
from ..slimming.schedule import solve
from .engines import EXPORTED, prepared

__all__ = ["BlockTimes", "Key", "advise", "candidates", "pays", "scheduled", "settings_text", "verdict"]

Key = tuple[int, tuple[int, ...]]
"""What tells schedules at one FLOPs target apart: start block and drop points."""

SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1)
"""Of the patches, at which a block is timed."""

WORTH_IT = 1.03
"""A speed-up that slimming, or another schedule than the default, has to reach before it is advised."""

_PLACES = ("fastest", "second", "third")
"""By prediction."""


class BlockTimes:
    """Seconds that a block takes on some patches, interpolated between measured counts.

    Args:
        backbone: the model. seconds: measured on its middle block, by number of patches. Other blocks are taken to
            differ as their FLOPs do.
    """

    def __init__(self, backbone: Backbone, seconds: dict[int, float]) -> None:
        self.backbone = backbone
        self.counts = sorted(seconds)
        self.seconds = [seconds[n] for n in self.counts]
        self.middle = backbone.block_flops(backbone.depth // 2)

    def block(self, index: int, patches: int) -> float:
        """Seconds of one block."""
        n = patches + self.backbone.prefix
        (a, c), (b, d) = self.backbone.block_flops(index), self.middle
        share = (a + c * n) / (b + d * n)
        return float(np.interp(patches, self.counts, self.seconds)) * share

    def total(self, schedule: Schedule) -> float:
        """Seconds of all blocks."""
        return sum(self.block(i, n) for i, n in enumerate(schedule.kept))


def measure_blocks(backbone: Backbone, images: Tensor, rounds: int = 12) -> BlockTimes:
    """Time the middle block at several token counts, run as the slimmed model runs it."""
    index = backbone.depth // 2
    with torch.inference_mode():
        embedded = backbone.embed(images)
    patches = embedded.tokens.shape[1] - backbone.prefix

    def block_on(n: int) -> Callable[[], Tensor]:
        x = embedded.tokens[:, : backbone.prefix + n].contiguous()
        rope = None if embedded.rope is None else embedded.rope[..., :n, :]
        if n == patches:
            return lambda: backbone.block(index, x, backbone.rope_of(rope, index))
        attend = partial(sdpa, bias=x.new_zeros(len(x), 1, 1, x.shape[1]))  # as with heirs
        return lambda: backbone.block_with(index, x, attend, backbone.token_rope(rope, index))

    counts = sorted({max(1, round(share * patches)) for share in SHARES}, reverse=True)
    timing = alternate({str(n): block_on(n) for n in counts}, rounds=rounds, device=images.device)
    return BlockTimes(backbone, {n: timing.seconds[str(n)].median for n in counts})


def candidates(depth: int) -> Iterator[Key]:
    """(start, drops): one drop or two, none before a quarter of the depth (earlier ones ruin accuracy)."""
    for start in range(max(1, depth // 4), depth // 2 + 1):
        yield start, (start,)
        for second in range(start + 1, min(depth - 1, 3 * depth // 4) + 1):
            yield start, (start, second)


def advise(model: SlimModel, images: Tensor, target: float, engine: str = "eager", few: int = 1) -> dict[str, Any]:
    """What to do on this device with batches like ``images`` at a fraction ``target`` of the dense FLOPs.

    Blocks are timed eagerly; the ``few`` (at most 3) schedules that should be fastest, and the model's own, are then
    timed in ``engine``. The model's head decides in all of them.
    """
    times = measure_blocks(model.backbone, images)
    default = scheduled(model, target, (model.start, model.drops))
    models = {"default": default}
    for name, key in zip(_PLACES, fastest(times, default, target)[:few], strict=False):
        if key != (model.start, model.drops):
            models[name] = scheduled(model, target, key)
    own = scheduled(model, 1.0, (model.start, model.drops))
    runs = {"dense": prepared(own if engine in EXPORTED else model.backbone.vit, engine, images)}
    runs |= {name: prepared(candidate, engine, images) for name, candidate in models.items()}
    timing = alternate(runs, rounds=15, device=images.device, patience=60)
    schedules = {name: _described(candidate) for name, candidate in models.items()}
    text, importance = verdict({name: timing.ratios[name] for name in models}, schedules)
    return {
        "batch": len(images),
        "target": target,
        "engine": engine,
        "block_ms": {n: round(1000 * s, 4) for n, s in zip(times.counts, times.seconds, strict=True)},
        "schedules": schedules,
        "ratios": {name: vars(timing.ratios[name]) for name in models},
        "pays": importance,
        "verdict": text,
    }


def scheduled(model: SlimModel, target: float, key: Key) -> SlimModel:
    """``model`` with another schedule: the same backbone and head, in fixed mode."""
    start, drops = key
    settings = model.config.replace(budget=target, mode="fixed", start=start, drops=drops)
    return SlimModel(model.backbone, settings, model.scorer).eval()


def fastest(times: BlockTimes, model: SlimModel, target: float) -> list[Key]:
    """Schedules that reach ``target``, those whose blocks are predicted to take least time first.

    A learned head knows the tokens of its own start block only, so with one no other start is tried.
    """
    cost, depth, own = model.cost(), model.backbone.depth, (model.start, model.drops)
    learned = next(model.scorer.parameters(), None) is not None
    predicted: dict[Key, float] = {}
    for start, drops in [*candidates(depth), own]:
        if learned and start != model.start:
            continue
        try:
            predicted[start, drops] = times.total(solve(cost, target, start, drops))
        except ConfigError:  # so late a start cannot reach the target
            continue
    return sorted(predicted, key=lambda key: predicted[key])


def pays(ratio: Spread) -> bool:
    """Whether so much over the dense speed is importance advising."""
    return not ratio.noisy and ratio.p10 >= 1 and ratio.median >= WORTH_IT


def settings_text(schedule: Mapping[str, Any]) -> str:
    """A schedule as a user sets it."""
    return f"start {schedule['start']}, drops {', '.join(map(str, schedule['drops']))}"


def _described(model: SlimModel) -> dict[str, Any]:
    cost, schedule = model.cost(), model.schedule()
    flops = round(cost.total(schedule.kept) / cost.dense, 4)
    return {"start": model.start, "drops": list(model.drops), "patches": str(schedule), "flops": flops}


def verdict(ratios: dict[str, Spread], schedules: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """(advice in words, whether slimming pays), from measured speed-ups over dense of "default" and others."""
    if any(ratio.noisy for ratio in ratios.values()):
        return "too noisy to advise anything; try again on a quiet machine", False
    name = max(ratios, key=lambda n: ratios[n].median)
    if ratios[name].median < WORTH_IT * ratios["default"].median:
        name = "default"
    ratio, schedule = ratios[name], schedules[name]
    measured = f"{ratio.median:.2f}x the dense speed ({ratio.p10:.2f}x to {ratio.p90:.2f}x)"
    if not pays(ratio):
        return f"slimming does not pay here: at best {measured}; stay with the dense model", False
    settings = settings_text(schedule)
    if name == "default":
        return f"the default schedule ({settings}): {measured}; no other one is faster by 3 %", True
    return f"{settings}: {measured}; the default schedule reaches {ratios['default'].median:.2f}x", True
