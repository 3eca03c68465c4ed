"""Numbers that a user gives, checked and made plain Python ones: they go into JSON and are compared. No numpy here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError

__all__ = ["check_budget", "check_speedup", "check_switch", "check_whole", "check_wholes", "plain"]

_ROUNDING = 1e-6
"""How far from 1 a budget may lie and still mean 1: np.arange and divisions end there."""


def plain(value: Any) -> Any:
    """The Python number that a scalar of numpy or torch stands for; anything else as it is.

    A float of less than 64 bits is rounded to the 7 digits that it holds: numpy's float32 of 0.6 is 0.6 again.
    """
    if isinstance(value, float):  # numpy's float64 is one, but prints and pickles as numpy's
        return float(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        number = value.item()
        return round(number, 7) if isinstance(number, float) else number
    return value


def check_budget(budget: Any, name: str = "budget") -> float:
    """``budget`` as a float in (0, 1]; one that differs from 1 by a rounding is 1.

    Raises ConfigError, calling it ``name``, for anything else.
    """
    number = plain(budget)
    if not _is_number(number):
        raise ConfigError(f"{name} must be a number in (0, 1], got {_shown(number)}")
    if not 0 < number <= 1 + _ROUNDING:
        guess = f"; did you mean {number / 100:g}?" if 2 <= number <= 100 else ""
        raise ConfigError(f"{name} must be in (0, 1], got {_shown(number)}{guess}")
    return 1.0 if abs(number - 1) <= _ROUNDING else float(number)


def check_speedup(speedup: Any) -> float:
    """``speedup`` as a float of at least 1; one that is below 1 by a rounding is 1. Raises ConfigError."""
    number = plain(speedup)
    if not _is_number(number) or not number >= 1 - _ROUNDING:
        raise ConfigError(f"speedup must be at least 1, got {_shown(number)}; 1.6 means 1.6 times fewer FLOPs")
    return max(float(number), 1.0)


def check_whole(value: Any, name: str) -> int:
    """``value`` as an int. Raises ConfigError, calling it ``name``, for floats, booleans, text."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ConfigError(f"{name} must be a whole number, got {_shown(number)}")
    return number


def check_wholes(values: Any, name: str) -> tuple[int, ...]:
    """``values`` (a list, a tuple, an array) as ints. Raises ConfigError, calling them ``name``."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise ConfigError(f"{name} must be several whole numbers, such as (3, 6), got {_shown(plain(values))}")
    return tuple(check_whole(value, name) for value in values)


def check_switch(value: Any, name: str) -> bool:
    """``value`` as a bool. Raises ConfigError, calling it ``name``, for numbers and text."""
    switch = plain(value)
    if not isinstance(switch, bool):
        raise ConfigError(f"{name} must be True or False, got {_shown(switch)}")
    return switch


def _is_number(value: Any) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and finite


def _shown(value: Any) -> str:
    """All digits that matter: 1.00001 is not shown as 1, and 60.0 is shown as 60."""
    return repr(value).removesuffix(".0")
