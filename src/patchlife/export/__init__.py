"""Exporting: one graph file or a bundle of several budgets, int8, and the proof that they answer as the model does."""

from .bundle import ExportedPackage, export_package
from .exporter import Exported, export
from .parity import Parity

__all__ = ["Exported", "ExportedPackage", "Parity", "export", "export_package"]
