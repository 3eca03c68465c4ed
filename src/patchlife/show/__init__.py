"""Pictures of lives: which patches live, how long, and where. Pillow and numpy only."""

from .maps import draw, strip
from .palette import colours
from .sheet import contact_sheet

__all__ = ["colours", "contact_sheet", "draw", "strip"]
