"""Vision Transformers as the parts that the method needs. Only this package uses timm's private names."""

from .attached import resident
from .backbone import FAMILIES, Backbone, Embedded, adapt
from .blocks import Attend, sdpa
from .identity import pretrained_cfg, signature
from .loading import Origin, build, check_name, rebuild, source_of

__all__ = [
    "FAMILIES",
    "Attend",
    "Backbone",
    "Embedded",
    "Origin",
    "adapt",
    "build",
    "check_name",
    "pretrained_cfg",
    "rebuild",
    "resident",
    "sdpa",
    "signature",
    "source_of",
]
