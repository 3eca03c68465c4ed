"""The page of ``patchlife explore``: what the budget does to one photo, and to the answers for a folder of photos."""

from __future__ import annotations

from .explorer import Answer, Explorer, Opened, View
from .folder import FolderCurve, curve_of
from .merges import Merges

__all__ = ["Answer", "Explorer", "FolderCurve", "Merges", "Opened", "View", "curve_of"]
