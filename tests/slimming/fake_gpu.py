"""A model on a GPU that does not exist: torch's fake tensors have the shapes and the device, and no values.

So the calls of a forward pass on a GPU can be counted on any machine. Reading a value raises an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)

_NO_KERNEL = ("prim::device", "aten::promote_types", "aten::detach", "aten::_unsafe_view")
_FROM_HOST = ("aten::lift_fresh", "aten::_local_scalar_dense", "aten::item", "aten::nonzero")


class Calls(TorchDispatchMode):
    """Counts the kernels that run within a ``with`` block, by name.

    Attributes:
        kernels: calls that start a kernel; views and allocations do not.
        waits: calls for which the host and a GPU wait for each other. A CUDA graph can record none of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = function(*args, **(kwargs or {})), function.name()
        view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not view and "empty" not in name and name not in _NO_KERNEL:
            self.kernels[name] += 1
        inputs = [a for a in args if isinstance(a, Tensor)]
        moved = isinstance(result, Tensor) and any(a.device != result.device and a.ndim for a in inputs)
        indexed = any(a.device.type == "cpu" for a in _tensors(args)) and isinstance(result, Tensor) and result.is_cuda
        if name in _FROM_HOST or moved or (indexed and "index" in name):
            self.waits[name] += 1
        return result


def _tensors(args: Any) -> list[Tensor]:
    return [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]


def on_fake_gpu(mode: FakeTensorMode, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Put fake tensors on the GPU in the place of all parameters and buffers."""
    with mode:
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, held in list(store.items()):
                    if held is not None:
                        kind = dtype if held.is_floating_point() else held.dtype
                        fake = torch.empty(held.shape, dtype=kind, device=GPU)
                        is_parameter = isinstance(held, nn.Parameter)
                        store[name] = nn.Parameter(fake, held.requires_grad) if is_parameter else fake


def calls_of(mode: FakeTensorMode, run: Callable[[], object]) -> Calls:
    """The calls of the second run of a function; what the first run keeps is not made again."""
    with mode:
        run()
        with Calls() as calls:
            run()
    return calls
