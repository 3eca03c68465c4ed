"""What users attach to a model's modules: hooks, adapters, parametrisations, sharding, offloading.

Blocks are called as modules, so most attachments take effect without further code. There are two exceptions. The
scorer reads a block's projections *before* the block runs; it applies them without firing hooks, so that each hook
fires once a forward pass. Adaptive mode calls the modules inside a block but not the block itself; attachments of
modules that are not called are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["attachments", "compute_weights", "gathered", "is_plain_linear", "original", "resident", "without_hooks"]

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_INERT_HOOKS = ("output_capturing_hook",)  # transformers', on layers; they do nothing unless it asks for hidden states
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)  # pre-hooks that only compute the weight
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile's and torch's own checkpoint wrapper


def attachments(module: nn.Module) -> str:
    """Description of what is attached to ``module`` itself, not to modules inside it; empty for nothing."""
    found = [
        description
        for name, description in _HOOKS.items()
        if any(getattr(hook, "__name__", "") not in _INERT_HOOKS for hook in getattr(module, name).values())
    ]
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
        found.append("a replaced forward")
    if module.__dict__.get("_compiled_call_impl") is not None:
        found.append("a compiled call")
    if original(module) is not module:
        found.append(f"a wrapper ({type(module).__name__})")
    return " and ".join(found)


def original(module: Any) -> Any:
    """The module inside wrappers that do not change its result (torch.compile, activation checkpointing)."""
    for name in _WRAPPERS:
        if name in getattr(module, "_modules", ()):
            return original(module._modules[name])
    return module


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` is an nn.Linear that computes exactly ``x @ weight.T + bias``, with an ordinary weight.

    Hooks are ignored, because the scorer does not fire them.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and not is_traceable_wrapper_subclass(weight)  # quantised or sharded tensors


def without_hooks(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` without firing its hooks, except those that compute its weights.

    A layer whose weights are distributed tensors is called with its hooks: they distribute its input.
    """
    if _is_distributed(module):
        return module(x)
    compute_weights(module)
    return module.forward(x)


def compute_weights(module: nn.Module) -> None:
    """Run the hooks of ``module`` that compute its weights, such as those of torch.nn.utils.prune."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _WEIGHT_HOOKS):
            hook(module, ())


def gathered(block: nn.Module) -> AbstractContextManager[object]:
    """Context in which all weights of ``block`` are loaded, if FSDP shards them or accelerate offloads them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in block.modules():
            if isinstance(module, FSDPModule):
                module.unshard()  # freed by the block, which runs next
    if "accelerate" not in sys.modules:  # nothing else attaches these hooks; looking for them costs 40 us a call
        return nullcontext()
    offloaded = [module for module in block.modules() if "_hf_hook" in module.__dict__ and module._parameters]
    return _fetched(offloaded) if offloaded else nullcontext()


def resident(module: nn.Module) -> AbstractContextManager[object]:
    """Context in which the weights of ``module``, without submodules, are loaded, if accelerate offloads them."""
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
