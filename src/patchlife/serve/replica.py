"""A replica of the model: reads photos in threads, and runs the model on batches of one budget."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve

from ..config import ServeConfig
from ..errors import ConfigError, ImageError
from ..malloc import keep_freed_memory
from .loopback import keep_to_loopback
from .questions import Ask

if TYPE_CHECKING:  # the gate imports this module too, and needs no torch
    from torch import Tensor

    from ..runtime.inference import Failure
    from .answering import Answerer

__all__ = ["Model"]

_MOST_FAILURES = 16
_FAILED = "the model gave no answer for this photo; the log of the service has the reason"

Told = tuple[int, Any]
"""A status, with the record of status 200 or the message of another one."""


@dataclass(eq=False)
class _Work:
    """A photo in a batch."""

    ask: Ask
    image: Tensor
    dropped: bool = False


class Model:
    """A replica: reads photos, and runs the model on batches of one budget.

    Args:
        config: of the service.
        threads: CPU threads of the model.
    """

    def __init__(self, config: ServeConfig, threads: int) -> None:
        keep_to_loopback(config)
        keep_freed_memory()  # before torch allocates
        import torch

        from .answering import open_answerer

        torch.set_num_threads(threads)
        self._config, self._answerer = config, open_answerer(config)
        self._readers = ThreadPoolExecutor(max(2, min(4, threads)), "read")
        self._runner = ThreadPoolExecutor(1, "run")  # batches of all budgets, in the order of their completion
        self._failures = 0  # photos without an answer since the last answer
        self._queues: dict[tuple[str, float], Callable[[_Work], Any]] = {}

    async def answer(self, ask: Ask, photo: bytes) -> Told:
        """Answer a photo. Its errors are values, because Ray would send an exception with the trace of its calls."""
        loop = asyncio.get_running_loop()
        try:
            image = await loop.run_in_executor(self._readers, self._answerer.read, photo)
        except ImageError as error:
            return 422, str(error)
        work, key = _Work(ask, image), (ask.task, ask.budget)
        if key not in self._queues:
            self._queues[key] = _batched(self._answerer, self._runner, self._config)
        try:
            found = await self._queues[key](work)
        except ConfigError as error:
            return 422, str(error)
        except asyncio.CancelledError:
            work.dropped = True
            raise
        return self._told(found)

    def _told(self, found: dict[str, Any] | Failure) -> Told:
        """What the gate is told: the record, or that the model failed, whose reason goes to the log."""
        if isinstance(found, dict):
            self._failures = 0
            return 200, found
        self._failures += 1
        logging.getLogger("ray.serve").error(found.error)
        return 500, _FAILED

    async def ready(self) -> bool:
        """True, as soon as it runs."""
        return True

    def check_health(self) -> None:
        """Raise RuntimeError if the model fails on photo after photo; Ray Serve then replaces this replica."""
        if self._failures >= _MOST_FAILURES:
            raise RuntimeError(f"the model failed on {self._failures} photos, one after the other")


def _batched(answerer: Answerer, runner: ThreadPoolExecutor, config: ServeConfig) -> Callable[[_Work], Any]:
    """The batch queue of one task and budget."""

    @serve.batch(max_batch_size=config.max_batch, batch_wait_timeout_s=config.max_wait_ms / 1000)
    async def batch(works: list[_Work]) -> list[Any]:
        wanted = [work for work in works if not work.dropped]
        if not wanted:
            return [None] * len(works)
        run = partial(answerer.answer, [work.ask for work in wanted], [work.image for work in wanted])
        found = dict(zip(wanted, await asyncio.get_running_loop().run_in_executor(runner, run), strict=True))
        return [found.get(work) for work in works]  # None for a client that left

    return batch
