"""Checks of numbers that users pass. Each check returns a plain Python value, fit for JSON and for comparisons.

numpy is not imported here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError

__all__ = ["check_at_least", "check_budget", "check_speedup", "check_switch", "check_whole", "check_wholes", "plain"]

_ROUNDING = 1e-6
"""A budget or speedup within this distance of 1 counts as 1: np.arange and divisions round."""


def plain(value: Any) -> Any:
    """The Python number of a numpy or torch scalar; anything else unchanged.

    Floats of less than 64 bits are rounded to 7 decimals: numpy's ``float32(0.6)`` becomes 0.6.
    """
    if isinstance(value, float):  # numpy's float64 is a subclass of float, but prints and pickles as numpy's
        return float(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        number = value.item()
        return round(number, 7) if isinstance(number, float) else number
    return value


def check_budget(budget: Any, name: str = "budget") -> float:
    """``budget`` as a float in (0, 1]; a value that differs from 1 by rounding becomes 1.

    Raises ConfigError, with ``name`` in the message, for anything else.
    """
    number = plain(budget)
    if not _is_finite_number(number):
        raise ConfigError(f"{name} must be a number in (0, 1], got {_digits(number)}")
    if not 0 < number <= 1 + _ROUNDING:
        guess = f"; did you mean {number / 100:g}?" if 2 <= number <= 100 else ""
        raise ConfigError(f"{name} must be in (0, 1], got {_digits(number)}{guess}")
    return 1.0 if abs(number - 1) <= _ROUNDING else float(number)


def check_speedup(speedup: Any) -> float:
    """``speedup`` as a float of at least 1; a value below 1 by rounding becomes 1. Raises ConfigError otherwise."""
    number = plain(speedup)
    if not _is_finite_number(number) or not number >= 1 - _ROUNDING:
        raise ConfigError(f"speedup must be at least 1, got {_digits(number)}; 1.6 means 1.6 times fewer FLOPs")
    return max(float(number), 1.0)


def check_whole(value: Any, name: str) -> int:
    """``value`` as an int. Raises ConfigError, with ``name`` in the message, for floats, booleans and text."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ConfigError(f"{name} must be a whole number, got {_digits(number)}")
    return number


def check_at_least(minimum: int, **values: int | None) -> None:
    """Raise ConfigError, with the name in the message, for a value below ``minimum``; None is allowed."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, got {value}")


def check_wholes(values: Any, name: str) -> tuple[int, ...]:
    """``values`` (a list, tuple or array) as ints. Raises ConfigError, with ``name`` in the message, otherwise."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise ConfigError(f"{name} must be several whole numbers, such as (3, 6), got {_digits(plain(values))}")
    return tuple(check_whole(value, name) for value in values)


def check_switch(value: Any, name: str) -> bool:
    """``value`` as a bool. Raises ConfigError, with ``name`` in the message, for numbers and text."""
    switch = plain(value)
    if not isinstance(switch, bool):
        raise ConfigError(f"{name} must be True or False, got {_digits(switch)}")
    return switch


def _is_finite_number(value: Any) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and finite


def _digits(value: Any) -> str:
    """All significant digits: 1.00001 is not rounded to 1; 60.0 is shown as 60."""
    return repr(value).removesuffix(".0")
