"""Running a library's own forward pass with other blocks, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["RunOnce", "Slots", "is_current", "slots", "view"]

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


def is_current(seen: nn.Module, module: nn.Module, path: str, except_for: frozenset[str] = frozenset()) -> bool:
    """Whether ``seen``, a `view` of ``module`` at ``path``, still has the module's attributes and other submodules.

    ``except_for`` are names of attributes that may differ.
    """
    name, _, rest = path.partition(".")
    pairs = [(module._modules, seen._modules, {name}), (vars(module), vars(seen), {"_modules", *except_for})]
    for own, others, skipped in pairs:
        if any(key not in skipped and others.get(key, seen) is not value for key, value in own.items()):
            return False
    inner: Any = module._modules[name]
    inner_seen: Any = seen._modules[name]
    return not rest or is_current(inner_seen, inner, rest, except_for)


class Slots:
    """The state of one call of a model whose blocks are replaced: how its blocks run, and their outputs."""

    def __init__(self) -> None:
        self.run: RunOnce | None = None
        self.outputs: Mapping[int, Tensor] = {}


def slots(kind: Any, depth: int, run: RunOnce | None, state: Slots | None = None) -> nn.ModuleList:
    """Modules that take the places of ``depth`` blocks: the first one runs all blocks, each gives its block's output.

    Where the output of a block was not requested, the output of the last block takes its place.

    They are of a subclass of ``kind``, because libraries look for the class of their blocks.
    """
    slot_kind, state = _slot_class(kind), state or Slots()
    state.run = run
    made = []
    for index in range(depth):
        slot = slot_kind.__new__(slot_kind)
        nn.Module.__init__(slot)
        slot.__dict__ |= {"index": index, "last": depth - 1, "state": state}
        made.append(slot)
    return nn.ModuleList(made)


_slot_classes: dict[Any, Any] = {}
"""By class of block, because making a class takes longer than the rest of a call. torch.compile warns of functools."""


def _slot_class(kind: Any) -> Any:
    if kind not in _slot_classes:
        own = next(k for k in kind.__mro__ if "FSDPModule" not in (base.__name__ for base in k.__mro__))  # not sharded
        _slot_classes[kind] = type(own.__name__, (own,), {"forward": _slot_forward})
    return _slot_classes[kind]


def _slot_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    state = self.state
    if self.index == 0:
        state.outputs = state.run(x, *args, **kwargs)
    return state.outputs.get(self.index, state.outputs[self.last])
