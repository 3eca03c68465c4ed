"""Settings: every option with its default and its documentation. The command line builds its help from these classes.

This package does not import torch, so that ``--help`` is fast.
"""

from .groups import BackboneConfig, ClassOrder, ClusterConfig, Device, EngineName, ModelConfig, Precision, RunConfig
from .measuring import CURVE_BUDGETS, BenchConfig, EvalConfig
from .services import ExploreConfig, ServeConfig
from .shapes import Shape
from .slimming import MODES, RESTORES, LifeConfig, Mode, Restore
from .training import Finetune, TrainingConfig
from .verbs import (
    DemoConfig,
    DrawConfig,
    EmbedConfig,
    ExportConfig,
    FitConfig,
    InfoConfig,
    PredictConfig,
    TuneConfig,
)

__all__ = [
    "CURVE_BUDGETS",
    "MODES",
    "RESTORES",
    "BackboneConfig",
    "BenchConfig",
    "ClassOrder",
    "ClusterConfig",
    "DemoConfig",
    "Device",
    "DrawConfig",
    "EmbedConfig",
    "EngineName",
    "EvalConfig",
    "ExploreConfig",
    "ExportConfig",
    "Finetune",
    "FitConfig",
    "InfoConfig",
    "LifeConfig",
    "Mode",
    "ModelConfig",
    "Precision",
    "PredictConfig",
    "Restore",
    "RunConfig",
    "ServeConfig",
    "Shape",
    "TrainingConfig",
    "TuneConfig",
]
