"""The only folder that knows timm's private names."""

from .attached import resident
from .backbone import FAMILIES, Backbone, Embedded, adapt
from .blocks import Attend, sdpa
from .loading import Origin, build

__all__ = ["FAMILIES", "Attend", "Backbone", "Embedded", "Origin", "adapt", "build", "resident", "sdpa"]
