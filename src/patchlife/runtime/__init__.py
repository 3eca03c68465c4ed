"""Running models on photos: opening a MODEL, engines for exported files, compiled runs, one classifier protocol."""

from .bundle import Bundle
from .compiled import CompiledBudgets
from .engine import Engine, Output, eager_engine
from .experimental_compiled_adaptive import CompiledAdaptive
from .metadata import Metadata
from .open_file import open_engine

__all__ = [
    "Bundle",
    "CompiledAdaptive",
    "CompiledBudgets",
    "Engine",
    "Metadata",
    "Output",
    "eager_engine",
    "open_engine",
]
