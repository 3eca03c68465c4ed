"""Out of PyTorch and into use: exported files, the engines that run them, and the proof that they answer alike."""

from .about import About
from .engines import Engine, Output, eager_engine, is_exported, open_engine
from .exporting import Exported, export
from .parity import Parity

__all__ = ["About", "Engine", "Exported", "Output", "Parity", "eager_engine", "export", "is_exported", "open_engine"]
