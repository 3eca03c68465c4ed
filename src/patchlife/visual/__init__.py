"""Draw pictures and write reports: life maps, contact sheets, plots, HTML pages."""

from .answers import class_colours, class_map, draw_answers
from .maps import draw, strip
from .palette import colours
from .sheet import contact_sheet

__all__ = ["class_colours", "class_map", "colours", "contact_sheet", "draw", "draw_answers", "strip"]
