"""What users attach to a model's modules: hooks, adapters, parametrisations, sharding, offloading.

Blocks are called, so what is attached to them takes effect by itself. Two places need more care. The scorer looks at
a block's projections *before* the block runs: it applies them without firing hooks, which belong to the block's own
run. And adaptive mode opens blocks: what is attached to a module that it does not call has to be refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["attachments", "gathered", "is_plain_linear", "original", "resident", "without_hooks"]

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)  # pre-hooks that compute the weight, and do nothing else
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile's and torch's own checkpoint wrapper


def attachments(module: nn.Module) -> str:
    """What is attached to ``module`` itself (not to modules inside it), in words; empty where nothing is."""
    found = [words for name, words in _HOOKS.items() if getattr(module, name)]
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
        found.append("a replaced forward")
    if module.__dict__.get("_compiled_call_impl") is not None:
        found.append("a compiled call")
    if original(module) is not module:
        found.append(f"a wrapper ({type(module).__name__})")
    return " and ".join(found)


def original(module: Any) -> Any:
    """The module inside wrappers that change how it runs and not what it computes."""
    for name in _WRAPPERS:
        if name in getattr(module, "_modules", ()):
            return original(module._modules[name])
    return module


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear layer whose weight says all: nothing computes the weight, nothing is added to it.

    Hooks that look on do not count: the scorer does not fire them.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and not is_traceable_wrapper_subclass(weight)  # quantised or sharded tensors


def without_hooks(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` without its hooks, except those that compute its weights.

    A layer whose weights are distributed tensors is called as usual, for hooks bring its input there.
    """
    if _is_distributed(module):
        return module(x)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _WEIGHT_HOOKS):
            hook(module, (x,))
    return module.forward(x)


def gathered(block: nn.Module) -> AbstractContextManager[object]:
    """Within it the weights of ``block`` are there, though FSDP shards them or accelerate keeps them elsewhere."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in block.modules():
            if isinstance(module, FSDPModule):
                module.unshard()  # the block, which runs next, frees them
    away = [module for module in block.modules() if "_hf_hook" in module.__dict__ and module._parameters]
    return _fetched(away) if away else nullcontext()


def resident(module: nn.Module) -> AbstractContextManager[object]:
    """Within it the own weights of ``module`` (not of modules inside it) are there, brought by accelerate's hook."""
    return _fetched([module]) if "_hf_hook" in module.__dict__ else nullcontext()


@contextmanager
def _fetched(modules: list[nn.Module]) -> Iterator[None]:
    for module in modules:
        module.__dict__["_hf_hook"].pre_forward(module)
    try:
        yield
    finally:
        for module in modules:
            module.__dict__["_hf_hook"].post_forward(module, None)


def _is_distributed(module: nn.Module) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in module.parameters(recurse=False))
