"""What stage 2 changed of a backbone: small, kept apart from it, and merged into a copy when it is loaded.

A weight's change is stored in half precision, as two thin matrices (``up @ down``) or whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from ..errors import AdapterError

__all__ = ["Change", "LowRank", "add_low_rank", "change_of", "merged", "undone"]


@dataclass(frozen=True)
class Change:
    """What an adapter changes of its backbone.

    Attributes:
        tensors: as `change_of` gives them.
        base: the signature of the backbone without the change (see `adapter.py`).
    """

    tensors: dict[str, Tensor]
    base: dict[str, Any]


class LowRank(nn.Module):
    """A change of low rank on top of a weight matrix; starts as no change at all."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, into = weight.shape
        self.down = nn.Parameter(torch.randn(rank, into, device=weight.device) / into**0.5)
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + self.up @ self.down


def add_low_rank(modules: Iterable[nn.Module], rank: int) -> None:
    """Put a `LowRank` change on every linear layer inside ``modules``; their own weights stop learning."""
    for module in modules:
        for layer in [m for m in module.modules() if isinstance(m, nn.Linear)]:
            layer.weight.requires_grad_(False)
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def change_of(changed: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """The difference between two models of one architecture, by parameter: thin factors where there are any."""
    before = dict(original.named_parameters())
    change: dict[str, Tensor] = {}
    for path, module in changed.named_modules():
        for name in getattr(module, "parametrizations", {}):
            (low,) = module.parametrizations[name]
            change |= {f"{path}.{name}.up": low.up, f"{path}.{name}.down": low.down}
    for name, value in changed.named_parameters():
        if name in before and not torch.equal(value, before[name]):
            change[f"{name}.delta"] = value - before[name]
    return {name: value.detach().half().cpu().contiguous() for name, value in change.items()}


@torch.no_grad()
def merged(vit: nn.Module, change: dict[str, Tensor]) -> nn.Module:
    """A copy of ``vit`` with a change merged into its weights: nothing is left to compute at inference.

    Raises AdapterError when the change is of another model.
    """
    result = copy.deepcopy(vit)
    parameters = dict(result.named_parameters())
    for name in sorted({key.rpartition(".")[0] for key in change}):
        if name not in parameters:
            raise AdapterError(f"the adapter changes {name}, which this backbone does not have")
        weight = parameters[name]
        delta = change.get(f"{name}.delta")
        if delta is None:
            delta = change[f"{name}.up"].float() @ change[f"{name}.down"].float()
        weight.add_(delta.to(weight))
    return result


def undone(vit: nn.Module, change: dict[str, Tensor]) -> nn.Module:
    """A copy of ``vit`` with a merged change taken out again, exact up to the rounding of one addition."""
    return merged(vit, {name: value if name.endswith(".down") else -value for name, value in change.items()})
