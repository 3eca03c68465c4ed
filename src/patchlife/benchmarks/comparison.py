"""The comparison itself: all methods on one backbone, taking turns against the clock, then on the same photos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..backbones import Backbone
from ..data import Preprocess, evenly_spaced, load_batches
from ..errors import ConfigError, ExportError, UnsupportedModelError
from ..evaluation.memory import peak_bytes
from ..evaluation.timing import alternate
from .baselines import METHODS, Baseline, Method
from .baselines.base import dense_flops
from .engines import EXPORTED, prepared
from .result import Accuracy, Speed

__all__ = ["evaluate_methods", "time_methods"]

SOLVE_ON = 16
"""Images that settle the knobs whose cost depends on what is seen."""

_DENSE, _DENSE_EAGER = "dense", "dense-eager"
_TORCH_ONLY = "runs in torch only; {} takes what exports with static shapes: dense, limit, and ours in fixed mode"


# ---- speed


def time_methods(
    backbone: Backbone,
    methods: Sequence[Method],
    images: Tensor,
    target: float,
    engine: str = "eager",
    rounds: int = 20,
    patience: float = 120.0,
) -> list[Speed]:
    """Time all methods at one FLOPs target on one batch. The dense model comes first and is the measure.

    A method that cannot do it is left out with its reason; the others go on.
    """
    batch, device = len(images), images.device
    dense = METHODS[_DENSE].build(backbone, 1.0, images)
    whole = dense.flops(images)
    runs: dict[str, Callable[[], object]] = {}
    rows: dict[str, Speed] = {}
    for name, method, way in _entries(methods, engine):
        row = Speed(name, batch, target, engine=way)
        try:
            with torch.inference_mode():
                if way in EXPORTED and not method.exports:
                    raise UnsupportedModelError(_TORCH_ONLY.format(way))
                baseline = method.build(backbone, target, images[:SOLVE_ON]).eval()
                run = prepared(baseline.tensor_module() if way in EXPORTED else baseline, way, images)
                run()  # compiles, where it compiles
                seen = run if way == "compile" and device.type == "cuda" else partial(baseline, images)
                # a graph's was set aside when it was recorded; what an engine takes is not seen from here
                memory = None if way in EXPORTED else peak_bytes(seen, device)
                rows[name] = replace(row, knob=baseline.knob, flops=baseline.flops(images) / whole, memory=memory)
                runs[name] = run
        except (UnsupportedModelError, ConfigError, ExportError, RuntimeError) as error:
            rows[name] = replace(row, left_out=_reason(error))
    if _DENSE not in runs:
        return list(rows.values())
    timing = alternate(runs, rounds=rounds, device=device, patience=patience)
    return [
        replace(row, seconds=timing.seconds[name], ratio=timing.ratios[name]) if name in runs else row
        for name, row in rows.items()
    ]


def _entries(methods: Sequence[Method], engine: str) -> Iterator[tuple[str, Method, str]]:
    """(name, method, engine) of all who take turns; the dense model comes first, in every engine that is used."""
    yield _DENSE, METHODS[_DENSE], engine
    if engine != "eager":
        yield _DENSE_EAGER, METHODS[_DENSE], "eager"
    for method in methods:
        if method.name != _DENSE:
            runs_eagerly = method.shapes == "dynamic" and engine not in EXPORTED
            yield method.name, method, "eager" if runs_eagerly else engine


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---- accuracy


def evaluate_methods(
    backbone: Backbone,
    methods: Sequence[Method],
    targets: Sequence[float],
    photos: Sequence[Path],
    truth: Sequence[int],
    preprocess: Preprocess,
    batch: int = 32,
    watch: Callable[[Iterator, int], Iterator] = lambda batches, _: batches,
) -> tuple[list[Accuracy], int]:
    """(one row for each method and target, photos that could not be read), all on the same photos.

    Knobs that depend on what is seen are settled on a few photos, spread over all of them; labels are not needed
    for that. A method that means nothing without training is left out, and says so.
    """
    reference = next(backbone.parameters())
    sample = _sample(photos, preprocess).to(reference)
    contestants, rows = _contestants(backbone, methods, targets, sample)
    said: dict[tuple[str, float], list[Tensor]] = {key: [] for key in contestants}
    spent = dict.fromkeys(contestants, 0.0)
    labels: list[int] = []
    unread = 0
    steps = -(-len(photos) // batch)
    for loaded in watch(iter(load_batches(photos, preprocess, batch)), steps):
        unread += len(loaded.failures)
        if not loaded.indices:
            continue
        labels += [truth[i] for i in loaded.indices]
        images = loaded.images.to(reference)
        for key, baseline in contestants.items():
            with torch.inference_mode():
                said[key].append(baseline(images).argmax(dim=-1).cpu())
                spent[key] += baseline.flops(images) * len(images)
    return [*_counted(contestants, said, spent, labels, dense_flops(backbone, sample)), *rows], unread


def _contestants(
    backbone: Backbone, methods: Sequence[Method], targets: Sequence[float], sample: Tensor
) -> tuple[dict[tuple[str, float], Baseline], list[Accuracy]]:
    """Everybody who can be evaluated, the dense model first; and rows for those who cannot."""
    baselines: dict[tuple[str, float], Baseline] = {(_DENSE, 1.0): METHODS[_DENSE].build(backbone, 1.0, sample)}
    left_out = []
    for method in methods:
        for target in targets if method.name != _DENSE else ():
            if not method.trained:
                reason = f"its accuracy means nothing untrained ({method.training})"
                left_out.append(Accuracy(method.name, target, left_out=reason))
                continue
            try:
                with torch.inference_mode():
                    baselines[method.name, target] = method.build(backbone, target, sample).eval()
            except (UnsupportedModelError, ConfigError) as error:
                left_out.append(Accuracy(method.name, target, left_out=_reason(error)))
    return baselines, left_out


def _counted(
    contestants: dict[tuple[str, float], Baseline],
    said: dict[tuple[str, float], list[Tensor]],
    spent: dict[tuple[str, float], float],
    labels: list[int],
    whole: int,
) -> list[Accuracy]:
    if not labels:
        raise ConfigError("none of the photos could be read, so there is no accuracy to report")
    answers = {key: torch.cat(parts) for key, parts in said.items()}
    truth, dense = torch.tensor(labels), answers[_DENSE, 1.0]
    return [
        Accuracy(
            name,
            target,
            knob=contestants[name, target].knob,
            flops=spent[name, target] / len(labels) / whole,
            photos=len(labels),
            right=int((answer == truth).sum()),
            agreeing=int((answer == dense).sum()),
        )
        for (name, target), answer in answers.items()
    ]


def _sample(photos: Sequence[Path], preprocess: Preprocess) -> Tensor:
    """Some photos from all over the list, for settling knobs and calibrating."""
    chosen = evenly_spaced(photos, 4 * SOLVE_ON)
    images = [loaded.images for loaded in load_batches(chosen, preprocess, SOLVE_ON) if loaded.indices]
    if not images:
        raise ConfigError("none of the photos could be read, so there is no accuracy to report")
    return torch.cat(images)
