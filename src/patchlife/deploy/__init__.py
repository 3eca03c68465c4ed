"""Out of PyTorch and into use: exported files, the engines that run them, and the proof that they answer alike."""

from ..files import is_exported
from .about import About
from .compiled import CompiledBudgets
from .compiled_adaptive import CompiledAdaptive
from .engines import Engine, Output, eager_engine, open_engine
from .exporting import Exported, export
from .package import Package
from .packaging import ExportedPackage, export_package
from .parity import Parity

__all__ = [
    "About",
    "CompiledAdaptive",
    "CompiledBudgets",
    "Engine",
    "Exported",
    "ExportedPackage",
    "Output",
    "Package",
    "Parity",
    "eager_engine",
    "export",
    "export_package",
    "is_exported",
    "open_engine",
]
