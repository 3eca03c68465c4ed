"""The only folder that knows timm's private names."""

from .backbone import FAMILIES, Backbone, Embedded, adapt
from .blocks import Attend, sdpa

__all__ = ["FAMILIES", "Attend", "Backbone", "Embedded", "adapt", "sdpa"]
