"""Low-rank weight deltas without gates, as adapters of older versions have them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from patchlife.backbones import Backbone
from patchlife.backbones.gated_training import add_gated_delta
from patchlife.backbones.gates import Ramp
from patchlife.backbones.weight_delta import delta_between as gated_delta_between


def add_low_rank(modules: Iterable[nn.Module], rank: int) -> None:
    """Add a low-rank delta to every linear layer in ``modules``: one gate, which is always open."""
    add_gated_delta(modules, rank, (Ramp(0.0, 0.5, 1.0),)).merge(nn.Module(), (1.0,))


def delta_between(trained: Backbone, original: Backbone) -> dict[str, Tensor]:
    """The weight delta, without the vectors, which had full deltas."""
    delta = gated_delta_between(trained, original)
    return {name: value for name, value in delta.items() if not name.endswith(".shift")}
