"""Running models on photos: opening a MODEL, engines for exported files, compiled runs, one classifier protocol."""

from .bundle import Package
from .compiled import CompiledBudgets
from .engine import Engine, Output, eager_engine
from .experimental_compiled_adaptive import CompiledAdaptive
from .metadata import About
from .open_file import open_engine

__all__ = ["About", "CompiledAdaptive", "CompiledBudgets", "Engine", "Output", "Package", "eager_engine", "open_engine"]
