"""The structure of a module without its weights, for looking at it: counting FLOPs, checking blocks.

Nothing that a user attached is called on made-up inputs, and no weight is copied.
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
_ON_THE_OBJECT = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")  # what patches a module's call


def skeleton(module: M, alike: Iterable[nn.Module] = ()) -> M:
    """A copy of ``module`` on the meta device, in eval mode, without hooks, patched calls and other attachments.

    Linear layers of any kind (quantised, pruned, parametrised, with LoRA) become plain float32 ones of their size, so
    that a schedule does not depend on what is attached. Of modules inside that are ``alike`` by their description one
    copy serves all: a Vision Transformer's blocks, say.
    """
    twins: dict[str, nn.Module] = {}
    memo: dict[int, Any] = {}
    for part in alike:
        description = repr(part)
        twins[description] = twins.get(description) or skeleton(part)
        memo[id(part)] = twins[description]
    for part in _modules(module, memo):
        memo |= {id(vars(part)[name]): OrderedDict() for name in _HOOK_DICTS if name in vars(part)}
        memo |= {id(vars(part)[name]): None for name in _ON_THE_OBJECT if name in vars(part)}
        tensors = [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]
        memo |= {id(t): _meta(t) for t in tensors if isinstance(t, Tensor)}
        memo |= {id(child): _meta_linear(child) for child in part.children() if _is_linear(child)}
    twin = copy.deepcopy(original(module), memo)
    for part in twin.modules():
        for name in _ON_THE_OBJECT:
            vars(part).pop(name, None)
        for name, child in part._modules.items():  # compiled blocks and the like: what is inside
            if child is not None:
                part._modules[name] = original(child)
    return twin.eval()


def _modules(module: nn.Module, without: Mapping[int, Any]) -> Iterator[nn.Module]:
    """Modules inside ``module``, but for some and those inside them."""
    if id(module) not in without:
        yield module
        for child in module.children():
            yield from _modules(child, without)


@torch.no_grad()
def randomised(module: M) -> M:
    """A `skeleton` brought to the CPU with random weights, so that it computes something; returns it."""
    module.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        matrix = parameter.ndim > 1
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if matrix else 0.5 + 0.2 * noise)
    for buffer in module.buffers():
        buffer.zero_()
    return module


def linear_layers(module: nn.Module) -> Iterator[Any]:
    """Linear layers inside ``module``, whatever library they come from; of a layer around a layer the outer one."""
    if _is_linear(module):
        yield module
        return
    for child in module.children():
        yield from linear_layers(child)


def _is_linear(module: Any) -> bool:
    """Whether a module stands for the product with one matrix: it names the matrix's sides."""
    sides = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(side, int) for side in sides)


def _meta_linear(layer: Any) -> nn.Linear:
    bias = getattr(layer, "bias", None)  # a method where the layer is quantised
    return nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta", dtype=torch.float32)


def _meta(tensor: Tensor) -> Tensor:
    """Its shape alone; floating types become float32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, device="meta", dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
