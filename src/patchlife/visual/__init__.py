"""Draw pictures and write reports: life maps, contact sheets, plots, HTML pages."""

from .maps import draw, strip
from .palette import colours
from .segmentation import segmentation_row
from .sheet import contact_sheet

__all__ = ["colours", "contact_sheet", "draw", "segmentation_row", "strip"]
