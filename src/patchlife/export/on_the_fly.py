"""A model that was opened from its weights, run by another engine: compiled, or exported now and kept in a cache."""

from __future__ import annotations

from typing import cast

from ..config import Device, LifeConfig
from ..errors import ConfigError
from ..runtime.engine import Engine, eager_engine
from ..runtime.exported import EngineClassifier, EnginePipeline
from ..runtime.metadata import Format
from ..runtime.opening import Pipeline
from ..slimming import SlimModel
from .cache import cached_engine

__all__ = ["with_engine"]


def with_engine(pipeline: Pipeline, engine: str, device: Device) -> Pipeline:
    """``pipeline`` run by another engine: compile, or onnx and openvino through an export kept in a cache.

    What it takes is made now for the model's budget, and for others when they are first run.
    """
    model = pipeline.model
    if model.config.mode != "fixed":
        raise ConfigError(f"--engine {engine} runs fixed mode only, got adaptive; drop one of the two")
    if engine != "compile" and device == "cuda":
        raise ConfigError(f"--engine {engine} runs on the CPU, got --device cuda; drop one of the two")

    def open_at(settings: LifeConfig) -> Engine:
        slim = model
        if settings != model.config:
            slim = SlimModel(model.backbone, settings, model.scorer).eval()
        if engine == "compile":
            return eager_engine(slim, compiled=True)
        return cached_engine(slim, cast(Format, engine), pipeline.labels, pipeline.preprocess)

    runs = EngineClassifier(open_at, model.config, model.state_dict())
    runs.open_at(model.config)  # made here, and kept: what goes wrong is no photo's fault
    return EnginePipeline(pipeline.name, cast(SlimModel, runs), pipeline.preprocess, pipeline.labels)
