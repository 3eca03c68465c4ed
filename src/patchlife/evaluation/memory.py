"""Measures the peak memory of a run's activations."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


class _StorageCounter(TorchDispatchMode):
    """Counts the bytes of storages that operations create, until they are freed.

    Attributes:
        current: bytes now. peak: the largest ``current`` after an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # weights and images existed before: not counted
            if isinstance(tensor, torch.Tensor):
                self._track(tensor, counted=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor, counted=True)
        self.peak = max(self.peak, self.current)
        return out

    def _track(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes() if counted else 0
        self.known.add(key)
        self.current += size
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.current -= size


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Peak bytes that ``run`` allocates, beyond those allocated before.

    On CUDA the allocator counts them. On other devices they are the tensors that exist between operations; memory
    inside one operation is not counted.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.inference_mode(False), torch.no_grad(), _StorageCounter() as counter:
        run()
    return counter.peak
