"""Running a library's own forward pass with other blocks, without changing the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["RunOnce", "slots", "view"]

RunOnce = Callable[..., Mapping[int, Tensor]]
"""Computes all blocks from the arguments of block 0. Gives the outputs of the last and of requested ones, by index."""


def view(module: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """A shallow copy of ``module`` with another submodule at ``path``; ``module`` itself keeps its own.

    Everything else is shared: parameters, buffers, hooks, settings and all other submodules.
    """
    name, _, rest = path.partition(".")
    child = module._modules[name]
    assert child is not None
    result = object.__new__(type(module))
    result.__dict__ |= module.__dict__
    result.__dict__["_modules"] = module._modules | {name: view(child, rest, replacement) if rest else replacement}
    return result


def slots(kind: Any, depth: int, run: RunOnce) -> nn.ModuleList:
    """Modules that take the places of ``depth`` blocks: the first one runs all blocks, each gives its block's output.

    Where the output of a block was not requested, the output of the last block takes its place.

    They are of a subclass of ``kind``, because libraries look for the class of their blocks.
    """
    slot_kind, outputs = _slot_class(kind), dict[int, Tensor]()
    made = []
    for index in range(depth):
        slot = slot_kind.__new__(slot_kind)
        nn.Module.__init__(slot)
        slot.__dict__ |= {"index": index, "last": depth - 1, "outputs": outputs, "run": run}
        made.append(slot)
    return nn.ModuleList(made)


@functools.cache  # making a class takes longer than the rest of a call
def _slot_class(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"forward": _slot_forward})


def _slot_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.index == 0:
        self.outputs.update(self.run(x, *args, **kwargs))
    return self.outputs.get(self.index, self.outputs[self.last])
