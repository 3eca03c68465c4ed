"""Adapters on disk: what was decided or learned about a backbone, never the unchanged backbone itself."""

from .adapter import check_free, load, read_adapter, save

__all__ = ["check_free", "load", "read_adapter", "save"]
