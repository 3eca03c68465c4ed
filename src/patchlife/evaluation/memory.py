"""How much memory a run's activations take at their peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


class _Watch(TorchDispatchMode):
    """Adds up the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # weights, the images: there before, not counted
            if isinstance(tensor, torch.Tensor):
                self._know(tensor, counted=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._know(tensor, counted=True)
        self.peak = max(self.peak, self.alive)
        return out

    def _know(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes() if counted else 0
        self.known.add(key)
        self.alive += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that ``run`` holds at its peak, beyond what was there before.

    On CUDA what the allocator says; elsewhere the tensors alive between operations (what a fused operation needs
    inside itself is not seen).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.inference_mode(False), torch.no_grad(), _Watch() as watch:
        run()
    return watch.peak
