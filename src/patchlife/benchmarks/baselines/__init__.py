"""The methods of the comparison, one file each, all on the same backbone.

Each method is written from its paper and calls the backbone's blocks; no backbone is changed.
"""

from __future__ import annotations

from .ats import ATS
from .avit import AVIT
from .base import Baseline, Method
from .class_attention import CLASS_ATTENTION
from .dense import DENSE
from .diffrate import DIFFRATE
from .dynamicvit import DYNAMICVIT, trained_dynamicvit
from .evit import EVIT
from .mame import MAME
from .no_decision_bound import NO_DECISION_BOUND
from .ours import OURS_ADAPTIVE, OURS_FIXED, OURS_SLICES, learned
from .ppt import PPT
from .random import RANDOM
from .tnt import TNT
from .tome import TOME

__all__ = ["METHODS", "Baseline", "Method", "learned", "trained_dynamicvit"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        DENSE,
        NO_DECISION_BOUND,
        RANDOM,
        CLASS_ATTENTION,
        EVIT,
        DYNAMICVIT,
        TNT,
        TOME,
        DIFFRATE,
        PPT,
        MAME,
        ATS,
        AVIT,
        OURS_FIXED,
        OURS_SLICES,
        OURS_ADAPTIVE,
    )
}
"""All methods by name, as in ``patchlife bench --methods``."""
