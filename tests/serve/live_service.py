"""The service with Ray that the slow tests share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WORDS = ("demo", "--device", "cpu", "--threads", "1", "--degrade", "1.0,0.8,0.6,0.45")
LIMITS = ("--max-batch", "4", "--max-queue", "24", "--max-body", "2", "--deadline", "20")


def wait_until(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until ``check`` is true; an assertion error that says ``what`` after so many seconds."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, what
        time.sleep(0.2)


class Shared:
    """The service of the slow tests. A test may end it; the next one starts it again."""

    def __init__(self) -> None:
        self._service: Any = None

    def service(self) -> Any:
        from serve_load import started

        if self._service is None or self._service.process.poll() is not None:
            self._service = started([*WORDS, *LIMITS])
        return self._service

    def end(self) -> None:
        if self._service is not None and self._service.process.poll() is None:
            self._service.end()
