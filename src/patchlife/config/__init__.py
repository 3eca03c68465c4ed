"""Every setting, its default and its meaning, once. No torch here: help texts are made from these classes."""

from .slimming import MODES, LifeConfig, Mode
from .training import Finetune, TrainingConfig
from .verbs import (
    BenchConfig,
    ClassOrder,
    DemoConfig,
    Device,
    DrawConfig,
    EngineName,
    EvalConfig,
    ExportConfig,
    FitConfig,
    InfoConfig,
    ModelConfig,
    Precision,
    PredictConfig,
    RunConfig,
)

__all__ = [
    "MODES",
    "BenchConfig",
    "ClassOrder",
    "DemoConfig",
    "Device",
    "DrawConfig",
    "EngineName",
    "EvalConfig",
    "ExportConfig",
    "Finetune",
    "FitConfig",
    "InfoConfig",
    "LifeConfig",
    "Mode",
    "ModelConfig",
    "Precision",
    "PredictConfig",
    "RunConfig",
    "TrainingConfig",
]
