"""Exporting: one graph file or a bundle of several budgets, int8, and the proof that they answer as the model does."""

from .bundle import ExportedBundle, export_bundle
from .exporter import Exported, export
from .parity import Parity

__all__ = ["Exported", "ExportedBundle", "Parity", "export", "export_bundle"]
