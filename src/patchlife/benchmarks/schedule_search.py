"""Finds the fastest schedule on this device at a FLOPs target, or advises the dense model.

Fewer FLOPs save time only if a block becomes faster with fewer tokens. So single blocks are timed at several token
counts, the time of each schedule is predicted from them, and the best predictions are timed against the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones import Backbone, sdpa
from ..errors import ConfigError
from ..evaluation.threads import ThreadTimes, fastest_of, thread_counts
from ..evaluation.timing import Spread, alternate, cpu_threads
from ..slimming import Schedule, SlimModel, variant
from ..slimming.schedule import solve
from .baselines.dense import Dense
from .engines import EXPORTED, prepared

__all__ = ["BlockTimes", "Key", "advise", "candidates", "pays", "scheduled", "settings_text", "verdict"]

Key = tuple[int, tuple[int, ...]]
"""A schedule at one FLOPs target: (start block, drop points)."""

FRACTIONS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1)
"""Fractions of the patches at which a block is timed."""

MIN_SPEEDUP = 1.03
"""The least speed-up at which slimming, or another schedule than the default, is advised."""

EAGER_ON_A_GPU = (
    "; in eager mode a GPU waits for the start of each kernel, and a slimmed model has more of them: measure with "
    "--engine compile (in Python: patchlife.runtime.CompiledBudgets), or with larger batches"
)
"""Added to advice against slimming that was measured in eager mode on a GPU."""

_DENSE, _SLIMMED = "dense", "slimmed"
_RANKS = ("fastest", "second", "third")
"""Names of schedules by predicted time."""


class BlockTimes:
    """Predicts the seconds of a block at a number of patches, interpolated between measured counts.

    Args:
        backbone: the model.
        seconds: measured on the middle block, by number of patches. The time of another block is scaled by its FLOPs.
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
        scale = (a + c * n) / (b + d * n)
        return float(np.interp(patches, self.counts, self.seconds)) * scale

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
        attend = partial(sdpa, bias=x.new_zeros(len(x), 1, 1, x.shape[1]))  # merging adds such a bias
        return lambda: backbone.block_with(index, x, attend, backbone.token_rope(rope, index))

    counts = sorted({max(1, round(fraction * patches)) for fraction in FRACTIONS}, reverse=True)
    timing = alternate({str(n): block_on(n) for n in counts}, rounds=rounds, device=images.device)
    return BlockTimes(backbone, {n: timing.seconds[str(n)].median for n in counts})


def candidates(depth: int) -> Iterator[Key]:
    """(start, drops) of all schedules with one or two drops, none before a quarter of the depth.

    Earlier drops cost too much accuracy.
    """
    for start in range(max(1, depth // 4), depth // 2 + 1):
        yield start, (start,)
        for second in range(start + 1, min(depth - 1, 3 * depth // 4) + 1):
            yield start, (start, second)


def advise(model: SlimModel, images: Tensor, target: float, engine: str = "eager", few: int = 1) -> dict[str, Any]:
    """The fastest schedule on this device for batches like ``images`` at a fraction ``target`` of the dense FLOPs.

    The dense model and the slimmed one run on the number of CPU threads at which each is fastest. Blocks are timed
    eagerly. The ``few`` (at most 3) schedules with the least predicted time, and the model's own, are then timed in
    ``engine``. The model's scorer scores in all of them.

    Returns:
        An entry of `Result.advice`: plain values for JSON.
    """
    models = {"default": _own(model, target)}
    own = (models["default"].start, models["default"].drops)
    dense = scheduled(model, 1.0, own) if engine in EXPORTED else Dense(model.backbone)
    tried = _thread_times({_DENSE: dense, _SLIMMED: models["default"]}, engine, images)
    best = {name: tried[name].best if tried else torch.get_num_threads() for name in (_DENSE, _SLIMMED)}
    with cpu_threads(best[_SLIMMED]):
        blocks = measure_blocks(model.backbone, images)
    for name, key in zip(_RANKS, fastest(blocks, models["default"], target)[:few], strict=False):
        if key != own:
            models[name] = scheduled(model, target, key)
    threads = {_DENSE: best[_DENSE], **dict.fromkeys(models, best[_SLIMMED])}
    runs = {
        name: _prepared_for(threads[name], module, engine, images) for name, module in {_DENSE: dense, **models}.items()
    }
    timing = alternate(runs, rounds=15, device=images.device, patience=60, threads=threads)
    schedules = {name: _to_dict(candidate) for name, candidate in models.items()}
    text, worthwhile = verdict({name: timing.ratios[name] for name in models}, schedules)
    text += _remark(engine, images.device, worthwhile)
    return {
        "batch": len(images),
        "target": target,
        "engine": engine,
        "threads": {name: best[name] for name in (_DENSE, _SLIMMED)},
        "ms_by_threads": {name: times.milliseconds() for name, times in tried.items()},
        "block_ms": {n: round(1000 * s, 4) for n, s in zip(blocks.counts, blocks.seconds, strict=True)},
        "schedules": schedules,
        "ratios": {name: vars(timing.ratios[name]) for name in models},
        "pays": worthwhile,
        "verdict": text,
    }


def _thread_times(modules: Mapping[str, nn.Module], engine: str, images: Tensor) -> dict[str, ThreadTimes]:
    """The times of each module at several numbers of CPU threads; empty if there is no choice.

    There is none on a GPU, with one core, and for compiled code, which would be compiled again for each number.
    """
    counts = thread_counts()
    if images.device.type != "cpu" or len(counts) == 1 or engine not in ("eager", *EXPORTED):
        return {}
    return fastest_of({name: {n: _prepared_for(n, m, engine, images) for n in counts} for name, m in modules.items()})


def _prepared_for(threads: int, module: nn.Module, engine: str, images: Tensor) -> Callable[[], object]:
    """`prepared` for a number of CPU threads: an exported graph keeps the number that it is opened with."""
    with cpu_threads(threads):
        return prepared(module, engine, images)


def scheduled(model: SlimModel, target: float, key: Key) -> SlimModel:
    """``model`` with another schedule: the same backbone and scorer, in fixed mode.

    For the model's own start and drop points it is the model's own schedule.
    """
    own, (start, drops) = _own(model, target), key
    if (own.start, own.drops) == key:
        return own
    settings = model.settings.replace(budget=target, mode="fixed", start=start, drops=drops)
    return variant(model, settings).eval()


def _own(model: SlimModel, target: float) -> SlimModel:
    """``model`` with its own schedule for ``target``, in fixed mode."""
    return variant(model, model.settings.replace(budget=target, mode="fixed")).eval()


def fastest(times: BlockTimes, model: SlimModel, target: float) -> list[Key]:
    """Schedules that meet ``target``, the least predicted time first.

    ``model`` is the model with its own schedule for ``target``. A learned scorer was trained on the tokens of its own
    start blocks, so no other start is tried for it.
    """
    cost, depth = model.cost(), model.backbone.depth
    learned = next(model.scorer.parameters(), None) is not None
    fitted = getattr(model.scorer, "starts", None) or (model.start,)
    predicted = {(model.start, model.drops): times.total(model.schedule())}
    for start, drops in candidates(depth):
        if (learned and start not in fitted) or (start, drops) in predicted:
            continue
        try:
            predicted[start, drops] = times.total(solve(cost, target, start, drops))
        except ConfigError:  # the start is too late for the target
            continue
    return sorted(predicted, key=lambda key: predicted[key])


def pays(ratio: Spread) -> bool:
    """Whether a speed-up over dense is large and steady enough to be advised."""
    return not ratio.noisy and ratio.p10 >= 1 and ratio.median >= MIN_SPEEDUP


def settings_text(schedule: Mapping[str, Any]) -> str:
    """The options that set a schedule, as text."""
    return f"start {schedule['start']}, drops {', '.join(map(str, schedule['drops']))}"


def _remark(engine: str, device: torch.device, worthwhile: bool) -> str:
    """`EAGER_ON_A_GPU` where it applies, else nothing."""
    return EAGER_ON_A_GPU if engine == "eager" and device.type == "cuda" and not worthwhile else ""


def _to_dict(model: SlimModel) -> dict[str, Any]:
    cost, schedule = model.cost(), model.schedule()
    flops = round(cost.total(schedule.kept) / cost.dense, 4)
    return {"start": model.start, "drops": list(model.drops), "patches": str(schedule), "flops": flops}


def verdict(ratios: dict[str, Spread], schedules: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """(advice as text, whether slimming pays), from the speed-ups over dense of "default" and other schedules."""
    if any(ratio.noisy for ratio in ratios.values()):
        return "too noisy to advise anything; try again on a quiet machine", False
    name = max(ratios, key=lambda n: ratios[n].median)
    if ratios[name].median < MIN_SPEEDUP * ratios["default"].median:
        name = "default"
    ratio, schedule = ratios[name], schedules[name]
    measured = f"{ratio.median:.2f}x the dense speed ({ratio.p10:.2f}x to {ratio.p90:.2f}x)"
    if not pays(ratio):
        return f"slimming does not pay here: at best {measured}; stay with the dense model", False
    settings = settings_text(schedule)
    if name == "default":
        return f"the default schedule ({settings}): {measured}; no other one is faster by 3 %", True
    return f"{settings}: {measured}; the default schedule reaches {ratios['default'].median:.2f}x", True
