"""Vision Transformers as the parts that the method needs. Only this package uses the model libraries' private names."""

from .adapt import adapt
from .attached import resident
from .attention import Attend, sdpa
from .backbone import Backbone, Embedded
from .identity import signature
from .loading import (
    Origin,
    brings_weights,
    build,
    check_name,
    check_weights,
    local_folder,
    preprocess_of,
    rebuild,
    short_name,
    source_of,
)
from .timm import FAMILIES

__all__ = [
    "FAMILIES",
    "Attend",
    "Backbone",
    "Embedded",
    "Origin",
    "adapt",
    "brings_weights",
    "build",
    "check_name",
    "check_weights",
    "local_folder",
    "preprocess_of",
    "rebuild",
    "resident",
    "sdpa",
    "short_name",
    "signature",
    "source_of",
]
