"""Vision Transformers as the parts that the method needs. Only this package uses the model libraries' private names."""

from .adapt import adapt
from .attached import resident
from .backbone import Attend, Backbone, Embedded, sdpa
from .identity import signature
from .loading import Origin, build, check_name, rebuild, source_of
from .timm import FAMILIES

__all__ = [
    "FAMILIES",
    "Attend",
    "Backbone",
    "Embedded",
    "Origin",
    "adapt",
    "build",
    "check_name",
    "rebuild",
    "resident",
    "sdpa",
    "signature",
    "source_of",
]
