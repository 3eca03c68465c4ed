"""Copies of a module's structure without weights and attachments, for counting FLOPs and for checking blocks.

So FLOPs are counted without copying weights and without firing a user's hooks on artificial inputs.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attached import original

__all__ = ["linear_layers", "randomised", "skeleton"]

M = TypeVar("M", bound=nn.Module)

_HOOK_DICTS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
_PATCHED_ATTRIBUTES = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")  # they replace a module's call


def skeleton(module: M, repeated: Iterable[nn.Module] = ()) -> M:
    """A copy of ``module`` on the meta device, in eval mode, without hooks, patched calls and other attachments.

    Linear layers of any kind (quantised, pruned, parametrised, with LoRA) become plain float32 layers of the same
    size, and so does torch's attention, so that a schedule does not depend on attachments. ``repeated`` are modules
    inside ``module``, such as the blocks; those with the same ``repr`` share one copy, to save time.
    """
    copies: dict[str, nn.Module] = {}
    memo: dict[int, Any] = {}  # of deepcopy: id of an object, and what takes its place in the copy
    for part in repeated:
        description = repr(part)
        copies[description] = copies.get(description) or skeleton(part)
        memo[id(part)] = copies[description]
    for part in _modules(module, memo):
        memo |= {id(vars(part)[name]): OrderedDict() for name in _HOOK_DICTS if name in vars(part)}
        memo |= {id(vars(part)[name]): None for name in _PATCHED_ATTRIBUTES if name in vars(part)}
        tensors = [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]
        memo |= {id(t): _meta(t) for t in tensors if isinstance(t, Tensor)}
        memo |= {id(child): _meta_linear(child) for child in part.children() if _is_linear(child)}
        memo |= {id(m): _meta_attention(m) for m in part.children() if isinstance(m, nn.MultiheadAttention)}
    result = copy.deepcopy(original(module), memo)
    for part in result.modules():
        for name in _PATCHED_ATTRIBUTES:
            vars(part).pop(name, None)
        for name, child in part._modules.items():  # unwrap compiled blocks
            if child is not None:
                part._modules[name] = original(child)
    return result.eval()


def _modules(module: nn.Module, excluded: Mapping[int, Any]) -> Iterator[nn.Module]:
    """``module`` and the modules inside it, without the excluded ones and what is inside these."""
    if id(module) not in excluded:
        yield module
        for child in module.children():
            yield from _modules(child, excluded)


@torch.no_grad()
def randomised(module: M) -> M:
    """Move a `skeleton` to the CPU and give it random weights. Returns the module."""
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_matrix = parameter.ndim > 1
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if is_matrix else 0.5 + 0.2 * noise)
    for buffer in module.buffers():
        buffer.zero_()
    return module


def linear_layers(module: nn.Module) -> Iterator[Any]:
    """Linear layers of any library inside ``module``. Of a layer that wraps another one, only the outer layer."""
    if _is_linear(module):
        yield module
        return
    for child in module.children():
        yield from linear_layers(child)


def _is_linear(module: Any) -> bool:
    """Whether a module is a linear layer: it has the attributes ``in_features`` and ``out_features``."""
    sides = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(side, int) for side in sides)


def _meta_linear(layer: Any) -> nn.Linear:
    bias = getattr(layer, "bias", None)  # in quantised layers it is a method
    return nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta", dtype=torch.float32)


def _meta_attention(layer: nn.MultiheadAttention) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(
        layer.embed_dim,
        layer.num_heads,
        bias=layer.in_proj_bias is not None,
        kdim=layer.kdim,
        vdim=layer.vdim,
        batch_first=layer.batch_first,
        device="meta",
        dtype=torch.float32,
    ).requires_grad_(False)


def _meta(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape on the meta device; floating types become float32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, device="meta", dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
