"""PatchLife makes Vision Transformers faster: it decides once, early, how many blocks each image patch takes part in.

The public names are imported on first use, so ``import patchlife`` imports neither torch nor timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .adapters import load as load
    from .adapters import save as save
    from .config import LifeConfig as LifeConfig
    from .config import Shape as Shape
    from .errors import PatchLifeError as PatchLifeError
    from .evaluation.shape_search import tune as tune
    from .runtime import from_hub as from_hub
    from .runtime import push_to_hub as push_to_hub
    from .slimming import Flops as Flops
    from .slimming import Lives as Lives
    from .slimming import Plan as Plan
    from .slimming import Scorer as Scorer
    from .slimming import SlimModel as SlimModel
    from .slimming import flops as flops
    from .slimming import wrap as wrap
    from .visual import draw as draw

_MODULES = {
    "Flops": "slimming",
    "LifeConfig": "config",
    "Scorer": "slimming",
    "Lives": "slimming",
    "PatchLifeError": "errors",
    "Plan": "slimming",
    "Shape": "config",
    "SlimModel": "slimming",
    "draw": "visual",
    "flops": "slimming",
    "from_hub": "runtime",
    "load": "adapters",
    "push_to_hub": "runtime",
    "save": "adapters",
    "tune": "evaluation.shape_search",
    "wrap": "slimming",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module 'patchlife' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
