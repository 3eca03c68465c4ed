"""Runs the comparison: all methods on one backbone, timed in turns on one batch, then evaluated on the same photos."""

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
from ..evaluation.agreement import kl_divergence
from ..evaluation.memory import peak_bytes
from ..evaluation.timing import alternate
from .baselines import METHODS, Baseline, Method
from .baselines.base import dense_flops
from .engines import EXPORTED, prepared
from .result import Accuracy, Speed

__all__ = ["evaluate_methods", "time_methods"]

SOLVE_ON = 16
"""Number of images on which knobs are solved whose cost depends on the images."""

_DENSE, _DENSE_EAGER = "dense", "dense-eager"
_TORCH_ONLY = (
    "runs in torch only; {} needs an export with static shapes: dense, no-decision-bound, and ours in fixed mode"
)


# ---- speed


def time_methods(
    backbone: Backbone,
    methods: Sequence[Method],
    images: Tensor,
    target: float,
    engine: str = "eager",
    rounds: int = 20,
    patience: float = 120.0,
    before: Callable[[str], str] = lambda name: "",
) -> list[Speed]:
    """Time all methods at one FLOPs target on one batch, each against the dense model, which comes first.

    A method that cannot run gets a row with the reason in ``left_out``; the others are timed. ``before`` is called with
    the name of each method before it is prepared, and with "" before the timing. A text that it returns is a reason to
    leave the method out.
    """
    batch, device = len(images), images.device
    dense = METHODS[_DENSE].build(backbone, 1.0, images)
    dense_cost = dense.flops(images)
    runs: dict[str, Callable[[], object]] = {}
    rows: dict[str, Speed] = {}
    for name, method, runner in _entries(methods, engine):
        row = Speed(name, batch, target, engine=runner)
        if reason := before(name):
            rows[name] = replace(row, left_out=reason)
            continue
        try:
            with torch.inference_mode():
                if runner in EXPORTED and not method.exports:
                    raise UnsupportedModelError(_TORCH_ONLY.format(runner))
                baseline = method.build(backbone, target, images[:SOLVE_ON]).eval()
                run = prepared(baseline.tensor_module() if runner in EXPORTED else baseline, runner, images)
                run()  # compiled runners compile here
                measurable = run if runner == "compile" and device.type == "cuda" else partial(baseline, images)
                # a CUDA graph allocates when it is recorded, and the memory of an export engine cannot be measured
                memory = None if runner in EXPORTED else peak_bytes(measurable, device)
                rows[name] = replace(row, knob=baseline.knob, flops=baseline.flops(images) / dense_cost, memory=memory)
                runs[name] = run
        except (UnsupportedModelError, ConfigError, ExportError, RuntimeError) as error:
            rows[name] = replace(row, left_out=_reason(error))
    before("")
    if _DENSE not in runs:
        return list(rows.values())
    timing = alternate(runs, rounds=rounds, device=device, patience=patience)
    return [
        replace(row, seconds=timing.seconds[name], ratio=timing.ratios[name]) if name in runs else row
        for name, row in rows.items()
    ]


def _entries(methods: Sequence[Method], engine: str) -> Iterator[tuple[str, Method, str]]:
    """(name, method, engine) of all runs; the dense model comes first, in every engine that is used."""
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
    progress: Callable[[Iterator, int], Iterator] = lambda batches, _: batches,
) -> tuple[list[Accuracy], int]:
    """Evaluate all methods at all FLOPs targets on the same photos.

    Knobs whose cost depends on the images are solved on a few photos, evenly spaced; labels are not used for it. A
    method that needs training and was not trained gets a row with the reason in ``left_out``.

    Args:
        backbone: the dense model's parts. methods, targets: what is evaluated.
        photos: files. truth: class of each photo.
        preprocess: for all methods. batch: in images.
        progress: wraps the iterator of batches, given their number.

    Returns:
        One row for each method and target, and the number of photos that could not be read.

    Raises:
        ConfigError: no photo can be read.
    """
    reference = next(backbone.parameters())
    sample = _sample(photos, preprocess).to(reference)
    baselines, rows = _build_all(backbone, methods, targets, sample)
    predicted: dict[tuple[str, float], list[Tensor]] = {key: [] for key in baselines}
    flops, divergences = dict.fromkeys(baselines, 0.0), dict.fromkeys(baselines, 0.0)
    labels: list[int] = []
    unread = 0
    steps = -(-len(photos) // batch)
    for loaded in progress(iter(load_batches(photos, preprocess, batch)), steps):
        unread += len(loaded.failures)
        if not loaded.indices:
            continue
        labels += [truth[i] for i in loaded.indices]
        images = loaded.images.to(reference)
        dense: Tensor | None = None
        for key, baseline in baselines.items():  # the dense model comes first
            with torch.inference_mode():
                logits = baseline(images).float().cpu()
                dense = logits if dense is None else dense
                predicted[key].append(logits.argmax(dim=-1))
                divergences[key] += kl_divergence(dense, logits).sum().item()
                flops[key] += baseline.flops(images) * len(images)
    return [*_rows(baselines, predicted, flops, divergences, labels, dense_flops(backbone, sample)), *rows], unread


def _build_all(
    backbone: Backbone, methods: Sequence[Method], targets: Sequence[float], sample: Tensor
) -> tuple[dict[tuple[str, float], Baseline], list[Accuracy]]:
    """The baselines that can be evaluated, the dense model first; and rows for the methods that cannot."""
    baselines: dict[tuple[str, float], Baseline] = {(_DENSE, 1.0): METHODS[_DENSE].build(backbone, 1.0, sample)}
    left_out = []
    for method in methods:
        for target in targets if method.name != _DENSE else ():
            if not method.trained:
                reason = f"its accuracy is not meaningful ({method.training})"
                left_out.append(Accuracy(method.name, target, left_out=reason))
                continue
            try:
                with torch.inference_mode():
                    baselines[method.name, target] = method.build(backbone, target, sample).eval()
            except (UnsupportedModelError, ConfigError) as error:
                left_out.append(Accuracy(method.name, target, left_out=_reason(error)))
    return baselines, left_out


def _rows(
    baselines: dict[tuple[str, float], Baseline],
    predicted: dict[tuple[str, float], list[Tensor]],
    flops: dict[tuple[str, float], float],
    divergences: dict[tuple[str, float], float],
    labels: list[int],
    dense_cost: int,
) -> list[Accuracy]:
    """Rows of accuracy from predicted classes, FLOPs and KL summed over the photos, labels, dense FLOPs per image."""
    if not labels:
        raise ConfigError("none of the photos can be read, so no method can be evaluated; check --data")
    classes = {key: torch.cat(parts) for key, parts in predicted.items()}
    truth, dense = torch.tensor(labels), classes[_DENSE, 1.0]
    return [
        Accuracy(
            name,
            target,
            knob=baselines[name, target].knob,
            flops=flops[name, target] / len(labels) / dense_cost,
            photos=len(labels),
            right=int((predictions == truth).sum()),
            agreeing=int((predictions == dense).sum()),
            divergence=divergences[name, target] / len(labels),
        )
        for (name, target), predictions in classes.items()
    ]


def _sample(photos: Sequence[Path], preprocess: Preprocess) -> Tensor:
    """Evenly spaced photos, for solving knobs and for calibration."""
    chosen = evenly_spaced(photos, 4 * SOLVE_ON)
    images = [loaded.images for loaded in load_batches(chosen, preprocess, SOLVE_ON) if loaded.indices]
    if not images:
        raise ConfigError("none of the photos can be read, so no method can be evaluated; check --data")
    return torch.cat(images)
