"""Adapters on disk: settings, scorer, calibrations and weight deltas of a slimmed model, never the backbone itself."""

from .format import check_free, read_adapter
from .load import load
from .save import save

__all__ = ["check_free", "load", "read_adapter", "save"]
