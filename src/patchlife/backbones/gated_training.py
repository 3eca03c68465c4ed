"""Training of a gated weight delta: parametrizations of a student's weights that follow the budget of each step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.utils.parametrize as parametrize
from jaxtyping import Float
from torch import Tensor, nn

from .gates import Ramps

__all__ = ["GatedLowRank", "GatedVector", "Gates", "add_gated_delta"]


class Gates:
    """The present values of the gates, shared by all parametrizations of a model.

    Attributes:
        ramps: of removed FLOPs, see `gates.gate_values`.
        values: of each gate, in [0, 1]; all 0 at first.
    """

    def __init__(self, ramps: Ramps) -> None:
        self.ramps = ramps
        self.values: tuple[float, ...] = (0.0,) * len(self.ramps)
        self._tensors: dict[torch.device, Tensor] = {}

    def merge(self, model: nn.Module, values: tuple[float, ...]) -> None:
        """Use these values from now on."""
        self.values, self._tensors = values, {}

    def unmerged(self, model: nn.Module) -> AbstractContextManager[object]:
        """As `MergedDelta.unmerged`: nothing to do, because the parametrizations keep the weights apart."""
        return nullcontext()

    def check_separable(self, model: nn.Module) -> None:
        """As `MergedDelta.check_separable`: they always are."""

    def bases(self) -> dict[int, Tensor]:
        """As `MergedDelta.bases`: none."""
        return {}

    def on(self, device: torch.device) -> Float[Tensor, "gates"]:
        """The values on a device, copied once for each change and without waiting for the device."""
        if device not in self._tensors:
            with torch.inference_mode(False):  # gradients may be computed with it later
                self._tensors[device] = torch.tensor(self.values).to(device, non_blocking=True)
        return self._tensors[device]


class GatedLowRank(nn.Module):
    """Parametrization of a weight matrix: the weight plus ``(up * gate of the channel) @ down``; ``up`` starts at 0."""

    gate_of_channel: Tensor

    def __init__(self, weight: Float[Tensor, "outputs inputs"], rank: int, gates: Gates) -> None:
        super().__init__()
        (outputs, inputs), device = weight.shape, weight.device
        self.gates = gates
        self.down = nn.Parameter(torch.randn(rank, inputs, device=device) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=device))
        gate_of_channel = torch.arange(rank, device=device) * len(gates.ramps) // rank
        self.register_buffer("gate_of_channel", gate_of_channel, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight plus the delta, in the precision of the weight also under autocast."""
        if weight.is_meta:  # counting of FLOPs: those of the merged model
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            gates = self.gates.on(weight.device)[self.gate_of_channel]
            return weight + (self.up * gates) @ self.down


class GatedVector(nn.Module):
    """Parametrization of a vector, such as a bias: the vector plus ``gates @ shift``; ``shift`` starts at 0."""

    def __init__(self, weight: Float[Tensor, "n"], gates: Gates) -> None:
        super().__init__()
        self.gates = gates
        self.shift = nn.Parameter(torch.zeros(len(gates.ramps), *weight.shape, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The vector plus the delta, in the precision of the vector also under autocast."""
        if weight.is_meta:  # counting of FLOPs: those of the merged model
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.gates.on(weight.device) @ self.shift


def add_gated_delta(modules: Iterable[nn.Module], rank: int, ramps: Ramps) -> Gates:
    """Add a gated delta to the linear layers and vectors in ``modules``, and freeze all their weights.

    Vectors are biases, weights of norms, and scales of layers. The queries, keys and values of nn.MultiheadAttention
    are a linear layer too.

    Returns:
        The gates of all deltas together.
    """
    gates = Gates(ramps)
    for module in modules:
        module.requires_grad_(False)
        for layer in list(module.modules()):
            for name, weight in list(layer.named_parameters(recurse=False)):
                if weight.ndim == 1:
                    parametrize.register_parametrization(layer, name, GatedVector(weight, gates))
                elif name == "in_proj_weight" or (isinstance(layer, nn.Linear) and name == "weight"):
                    parametrize.register_parametrization(layer, name, GatedLowRank(weight, rank, gates))
    return gates
