"""FLOP counter: sums torch's own FLOP formulas over all operations that are executed.

The formulas cover matrix products, convolutions and fused attention. A multiply-add counts as two operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

__all__ = ["counted"]

# torch's table (2.13 to 2.15) has no formula for fused attention on the CPU, which would count as zero
_FORMULAS = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}


class _Counter(TorchDispatchMode):
    """torch's FlopCounterMode without its module tracker, which fails on views of weights without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None:  # with weights made in inference mode a linear layer is one operation: decompose it
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def counted(run: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """(FLOPs, result) of ``run(*args)``, counted as torch's FlopCounterMode counts."""
    with torch.inference_mode(False), torch.no_grad(), _Counter() as counter:
        result = run(*args)
    return counter.total, result
