"""A model that answers photos: bytes to images, batches of images to records. It knows neither HTTP nor Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..config import ModelConfig, ServeConfig
from ..data import read_photo
from ..data.reading import Sample
from ..errors import ConfigError
from ..io.exported_files import is_exported
from ..runtime.inference import Failure, Prediction, embed_images, predict_images
from ..runtime.pipeline import Pipeline
from ..slimming import SlimModel
from .questions import Ask, Description, Task

__all__ = ["Answerer", "open_answerer"]

_NAME = Path("photo")  # of every photo, in messages


class _Upload(Sample):
    """A photo that came with a request."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __str__(self) -> str:
        return str(_NAME)

    name = place = property(__str__)
    label = None

    def content(self, max_bytes: int) -> bytes | Image.Image:
        return self.data


class Answerer:
    """Runs a pipeline on batches of photos that all ask for one task and one budget; one batch at a time.

    Args:
        pipeline: of a slimmed model, or of an exported file or bundle.
        budgets: the only ones that can be asked for; None for any.
        pad_to: batches of two and more are filled up to so many images: each batch size is compiled by itself.
    """

    def __init__(self, pipeline: Pipeline, budgets: Sequence[float] | None = None, pad_to: int = 0) -> None:
        self.pipeline, self.pad_to = pipeline, pad_to
        settings = pipeline.model.settings
        only = tuple(sorted(set(budgets), reverse=True)) if budgets is not None else None
        classes = len(pipeline.labels.names)
        embeds = pipeline.model.backbone.pools if isinstance(pipeline.model, SlimModel) else not classes
        tasks: tuple[Task, ...] = (*(("predict",) if classes else ()), *(("embed",) if embeds else ()))
        if not tasks:
            raise ConfigError(
                f"{pipeline.name} gives a vector for each patch, neither classes nor an embedding of the photo; choose "
                "a pooling, for example --model-args global_pool=avg"
            )
        self.description = Description(pipeline.name, tasks, classes, settings.budget, only, settings.mode)
        self._lock = Lock()

    def read(self, data: bytes) -> Float[Tensor, "channels height width"]:
        """The model's input for the bytes of a photo. Raises ImageError if it cannot be read."""
        return self.pipeline.preprocess(read_photo(_Upload(data)))

    def check_budget(self, budget: float) -> None:
        """Raise ConfigError for a budget that this model does not reach."""
        if isinstance(model := self.pipeline.model, SlimModel):
            with self._lock, model.temporarily(budget=budget):
                model.schedule()

    @torch.inference_mode()
    def answer(self, asks: Sequence[Ask], images: Sequence[Tensor]) -> list[dict[str, Any] | Failure]:
        """A record for each image, or the failure of the model on it.

        Raises ConfigError for a budget that the model does not reach.
        """
        task, budget = asks[0].task, asks[0].budget
        missing = max(0, self.pad_to - len(images)) if len(images) > 1 else 0
        batch = torch.stack([*images, *[images[-1]] * missing])
        run = predict_images if task == "predict" else embed_images
        with self._lock:
            if budget != self.pipeline.model.settings.budget:
                self.pipeline.model.set_budget(budget)
            results = run(self.pipeline, batch, [_NAME] * len(batch))[: len(images)]
        return [
            result if isinstance(result, Failure) else self._record(result, ask)
            for result, ask in zip(results, asks, strict=True)
        ]

    def _record(self, result: Any, ask: Ask) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if isinstance(result, Prediction):
            record["top"] = result.top(self.pipeline.labels, ask.top)
        else:
            record["embedding"] = result.vector.tolist()
        record |= {
            "budget": ask.budget,
            "flops": result.flops,
            "fraction_of_dense": round(result.flops / result.dense_flops, 6),
        }
        if isinstance(result, Prediction):
            record["kept"] = result.lives.kept[0].tolist()
            if ask.lives:
                record["lives"] = {"grid": list(result.lives.grid), "life": result.lives.life[0].tolist()}
        return record


def open_answerer(config: ServeConfig, warm_up: bool = True) -> Answerer:
    """Open the model of a service with its engine; with ``warm_up`` run each budget of an engine once.

    Raises the errors of `open_pipeline` and `open_exported`, and ConfigError for budgets of ``config.degrade`` that the
    model does not reach, and for adaptive mode without thresholds.
    """
    steps, model = config.degrade, config.model
    if is_exported(model.model):
        return _open_exported(config, warm_up)
    from ..runtime.opening import open_pipeline

    if steps:
        model = _at(model, steps[0])
    pipeline: Pipeline = open_pipeline(model, config.device, dtype=config.dtype)
    _check_calibrated(pipeline)
    if config.engine in (None, "eager"):
        answerer = Answerer(pipeline)
        for budget in steps:
            answerer.check_budget(budget)
        return answerer
    from ..export.on_the_fly import with_engine

    budgets = steps or (pipeline.model.settings.budget,)
    pad_to = config.max_batch if config.engine == "compile" else 0
    answerer = Answerer(with_engine(pipeline, str(config.engine), config.device), budgets, pad_to)
    if warm_up:
        _run_once(answerer, budgets, config.max_batch)
    return answerer


def _open_exported(config: ServeConfig, warm_up: bool) -> Answerer:
    """An exported file or bundle: only the budgets in it can be asked for."""
    from ..runtime.bundle import Bundle
    from ..runtime.exported import open_exported

    path, model = Path(config.model.model), config.model
    found = Bundle(path).budgets if path.is_dir() else []
    if config.degrade:
        model = _at(model, config.degrade[0])
    elif found and "budget" not in model.life:
        model = _at(model, found[0])
    pipeline = open_exported(model, config.trust)
    budgets = found or [pipeline.model.settings.budget]
    if other := [budget for budget in config.degrade if budget not in budgets]:
        raise ConfigError(
            f"{path} holds the budgets {', '.join(f'{b:g}' for b in budgets)}, got {other[0]:g} in --degrade; export a "
            "bundle with these budgets (--budgets)"
        )
    answerer = Answerer(pipeline, budgets)
    if warm_up:
        _run_once(answerer, config.degrade or (pipeline.model.settings.budget,), 1)
    return answerer


def _at(model: ModelConfig, budget: float) -> ModelConfig:
    return replace(model, life=model.life | {"budget": budget})


def _check_calibrated(pipeline: Pipeline) -> None:
    model = pipeline.model
    if model.settings.mode == "adaptive" and not set(model.starts) <= {start for _, start in model.calibrations}:
        raise ConfigError(
            "adaptive mode needs thresholds, which this model does not have; give an adapter that was saved with them, "
            "or --mode fixed"
        )


def _run_once(answerer: Answerer, budgets: Sequence[float], max_batch: int) -> None:
    """Run each budget for each batch size that is compiled, so that no request waits for it."""
    pipeline, description = answerer.pipeline, answerer.description
    image = torch.zeros(pipeline.preprocess.channels, *pipeline.preprocess.size)
    for budget in (*budgets[1:], budgets[0]):
        for count in {1, max_batch}:
            answerer.answer([Ask(description.tasks[0], budget)] * count, [image] * count)
