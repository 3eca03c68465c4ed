"""PatchLife: one small module decides, once, how many blocks each image patch should live.

Names load when they are first used: importing patchlife imports neither torch nor timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LifeConfig as LifeConfig
    from .errors import PatchLifeError as PatchLifeError
    from .life import Flops as Flops
    from .life import LifeHead as LifeHead
    from .life import Lives as Lives
    from .life import Plan as Plan
    from .life import SlimModel as SlimModel
    from .life import flops as flops
    from .life import wrap as wrap
    from .life.adapter import load as load
    from .show import draw as draw

__version__ = "0.1.0"

_HOME = {
    "Flops": "life",
    "LifeConfig": "config",
    "LifeHead": "life",
    "Lives": "life",
    "PatchLifeError": "errors",
    "Plan": "life",
    "SlimModel": "life",
    "draw": "show",
    "flops": "life",
    "load": "life.adapter",
    "wrap": "life",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module 'patchlife' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
