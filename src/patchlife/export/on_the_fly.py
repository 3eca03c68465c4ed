"""Running a model by another engine: compiled, or exported on first use and kept in a cache."""

from __future__ import annotations

from typing import cast

from ..config import Device, LifeConfig
from ..errors import ConfigError
from ..runtime.engine import Engine, eager_engine
from ..runtime.exported import EngineClassifier
from ..runtime.metadata import Format
from ..runtime.pipeline import Pipeline
from ..slimming import SlimModel, variant
from .cache import cached_engine

__all__ = ["with_engine"]


def with_engine(pipeline: Pipeline[SlimModel], engine: str, device: Device) -> Pipeline[EngineClassifier]:
    """``pipeline`` run by ``engine``: compile, or onnx and openvino through an export kept in a cache.

    The engine for the model's own budget is created here, those for other budgets on first use.

    Raises ConfigError in adaptive mode, and for onnx and openvino on a GPU.
    """
    model = pipeline.model
    if model.settings.mode != "fixed":
        raise ConfigError(f"--engine {engine} runs fixed mode only, got adaptive; add --mode fixed, or drop --engine")
    if engine != "compile" and device == "cuda":
        raise ConfigError(f"--engine {engine} runs on the CPU, got --device cuda; drop one of the two")

    def engine_for(settings: LifeConfig) -> Engine:
        slim = model
        if settings != model.settings:
            slim = variant(model, settings).eval()
        if engine == "compile":
            return eager_engine(slim, compiled=True, image_size=pipeline.preprocess.size)
        return cached_engine(slim, cast(Format, engine), pipeline.labels, pipeline.preprocess)

    classifier = EngineClassifier(engine_for, model.settings, model.state_dict())
    classifier.engine_for(model.settings)  # created now: an error here is not the error of a photo
    return Pipeline(pipeline.name, classifier, pipeline.preprocess, pipeline.labels, pipeline.multi_label)
