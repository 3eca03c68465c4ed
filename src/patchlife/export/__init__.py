"""Exporting a slimmed model to one file, or to a bundle of several budgets, and comparing it with the model."""

from .bundle import ExportedBundle, export_bundle
from .exporter import Exported, export
from .parity import Parity

__all__ = ["Exported", "ExportedBundle", "Parity", "export", "export_bundle"]
