"""Pick evenly spaced items from a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["evenly_spaced"]

T = TypeVar("T")


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items, evenly spaced over the sequence and in its order."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
