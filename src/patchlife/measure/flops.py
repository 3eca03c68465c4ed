"""Counting floating-point operations with torch's own counter.

The counter knows matrix products, convolutions and fused attention; two operations make one multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["counted"]


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts zero for fused attention on the CPU unless it is told (seen in 2.13).
_MORE = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


def counted(run: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """(FLOPs, result) of ``run(*args)``, as torch's FlopCounterMode measures them on what really executes."""
    # The counter's module tracker asks tensors for their graph and trips over views made without one.
    with torch.inference_mode(False), torch.enable_grad():
        with FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
            result = run(*args)
    return counter.get_total_flops(), result
