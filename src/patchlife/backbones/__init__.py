"""The only folder that knows timm's private names."""

from .backbone import FAMILIES, Backbone, Embedded, adapt
from .blocks import Attend, sdpa
from .identity import pretrained_cfg, signature
from .loading import Origin, build

__all__ = [
    "FAMILIES",
    "Attend",
    "Backbone",
    "Embedded",
    "Origin",
    "adapt",
    "build",
    "pretrained_cfg",
    "sdpa",
    "signature",
]
