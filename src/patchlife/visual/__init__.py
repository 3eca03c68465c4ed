"""Draw pictures and write reports: life maps, contact sheets, plots, HTML pages."""

from .maps import draw, strip
from .palette import colours
from .sheet import contact_sheet

__all__ = ["colours", "contact_sheet", "draw", "strip"]
