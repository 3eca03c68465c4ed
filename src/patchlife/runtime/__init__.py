"""Running models on photos: opening a model by name, engines for exported files, compiled models, pipelines."""

from .bundle import Bundle
from .compiled import CompiledBudgets
from .engine import Engine, Output, eager_engine
from .experimental_compiled_adaptive import ExperimentalCompiledAdaptive
from .hub import download_adapter, from_hub, push_to_hub
from .metadata import Metadata
from .open_file import open_engine

__all__ = [
    "Bundle",
    "CompiledBudgets",
    "Engine",
    "ExperimentalCompiledAdaptive",
    "Metadata",
    "Output",
    "download_adapter",
    "eager_engine",
    "from_hub",
    "open_engine",
    "push_to_hub",
]
