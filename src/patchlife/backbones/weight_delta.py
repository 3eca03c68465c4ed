"""Weight deltas: learned differences of a backbone's weights. Adapters store them; loading merges them into a copy.

Stage 2 of a fit stores differences in half precision. They are gated or full. A gated difference depends on the budget
(`gates.gate_values`), and at budget 1.0 it is zero: ``up`` and ``down`` of a matrix, ``shift`` of a vector. A full
difference (``delta``) is the same at every budget. Weights that other code trained after the model was wrapped are
stored with their new values (``whole``). Adapters of older versions have differences of low rank (``up @ down``)
without gates.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, shortened
from .adapt import adapt
from .attached import compute_weights
from .backbone import Backbone
from .comparison import changed_weights
from .gated_training import GatedLowRank
from .gates import Ramps, channel_gates
from .identity import CLASSIFIERS, plain_name, signature, weights_of

__all__ = [
    "WeightDelta",
    "apply_delta",
    "begin_with",
    "delta_between",
    "delta_since",
    "revert_delta",
]

_GATED_ENDINGS = (".up", ".down", ".shift")  # of the names of tensors that gates apply to


@dataclass(frozen=True)
class WeightDelta:
    """Differences of a backbone's weights from those it was built with.

    Attributes:
        tensors: by name of the weight and kind of the tensor, such as ``norm.bias.delta`` (see above).
        base: signature of the backbone without the delta (see `identity.py`).
        classes: number of classes, if the classifier was replaced.
        gates: the ramps of the gates (see `gates.gate_values`); None for a delta that is the same at every budget.
    """

    tensors: dict[str, Tensor]
    base: dict[str, Any]
    classes: int | None = None
    gates: Ramps | None = None

    @property
    def gated(self) -> dict[str, Tensor]:
        """The tensors that gates apply to; empty without gates."""
        return {key: value for key, value in self.tensors.items() if self.gates and key.endswith(_GATED_ENDINGS)}

    @property
    def static(self) -> dict[str, Tensor]:
        """The tensors that are the same at every budget."""
        return {key: value for key, value in self.tensors.items() if key not in self.gated}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())

    @property
    def learned(self) -> bool:
        """Whether stage 2 of a fit trained the backbone. It then differs from the dense model."""
        return any(not key.endswith(".whole") for key in self.tensors)

    @property
    def replaced(self) -> set[str]:
        """Names of the weights stored with their new values, so that their old values have no effect."""
        return {_weight(key) for key in self.tensors if key.endswith(".whole")}


def delta_between(trained: Backbone, original: Backbone) -> dict[str, Tensor]:
    """Tensors of the weight delta from ``original`` to ``trained``; those of gated deltas where it has them."""
    own, delta = _trained(trained), dict[str, Tensor]()
    for name, parts in own.ups.items():
        delta[f"{name}.up"], delta[f"{name}.down"] = _joined(parts, own.downs[name], own.gates)
    delta |= {f"{name}.shift": torch.cat(parts, dim=1) for name, parts in own.shifts.items()}
    before, after = dict(original.model.named_parameters()), dict(trained.model.named_parameters())
    before, after = ({name: side[name] for name in before if name in after} for side in (before, after))
    old, new = original.shared_names(before), trained.shared_names(after)
    for name, parts in new.items():
        if not all(map(torch.equal, parts, old[name])):
            delta[f"{name}.delta"] = torch.cat(parts) - torch.cat(old[name])
    return {name: value.detach().half().cpu().contiguous() for name, value in delta.items()}


@torch.no_grad()
def begin_with(student: Backbone, gated: dict[str, Tensor]) -> None:
    """Set the gated delta that ``student`` trains to ``gated``, the tensors of an earlier one (see `delta_between`).

    Raises ConfigError if they are of other layers, or of other channels.
    """
    own = _trained(student)
    ours, theirs = {*own.ups, *own.shifts}, {_weight(key) for key in gated}
    if ours != theirs:
        raise ConfigError(
            "the weight delta of this adapter is of other layers than those that are trained now "
            f"({shortened(sorted(ours ^ theirs))}); fit one from the adapter's scorer, with the original backbone"
        )
    for name, parts in own.shifts.items():
        for part, value in zip(parts, gated[f"{name}.shift"].split([p.shape[1] for p in parts], dim=1), strict=True):
            part.copy_(value)
    for name, parts in own.ups.items():
        rank, up, down = parts[0].shape[1], gated[f"{name}.up"], gated[f"{name}.down"]
        order = _channel_order(len(parts), rank, own.gates)
        if len(down) not in (rank, len(order)):
            raise ConfigError(
                f"the weight delta of {name} has {len(down)} channels, others {rank}: this adapter was trained in a "
                "library that stores the weight in other parts; train it further there"
            )
        rows = up.split([len(part) for part in parts])
        for index, (part, part_down) in enumerate(zip(parts, own.downs[name], strict=True)):
            channels = list(range(rank))
            if len(down) == len(order):
                channels = [order.index(index * rank + channel) for channel in channels]
            part.copy_(rows[index][:, channels])
            part_down.copy_(down[channels])


class _Trained(NamedTuple):
    """What a gated delta trains, by name of the weight: ``up`` and ``down`` of matrices, ``shift`` of vectors."""

    ups: dict[str, list[Tensor]]
    downs: dict[str, list[Tensor]]
    shifts: dict[str, list[Tensor]]
    gates: int


def _trained(student: Backbone) -> _Trained:
    ups, downs, shifts = {}, {}, {}
    gates = 1
    for path, module in student.model.named_modules():
        for name in getattr(module, "parametrizations", {}):
            (own,) = module.parametrizations[name]
            gates = len(own.gates.values)
            if isinstance(own, GatedLowRank):
                ups[f"{path}.{name}"], downs[f"{path}.{name}"] = own.up, own.down
            else:
                shifts[f"{path}.{name}"] = own.shift
    by_name = student.shared_names
    return _Trained(by_name(ups), by_name(downs), by_name(shifts), gates)


def _joined(
    ups: list[Float[Tensor, "outputs rank"]], downs: list[Float[Tensor, "rank inputs"]], gates: int
) -> tuple[Float[Tensor, "all_outputs channels"], Float[Tensor, "channels inputs"]]:
    """Factors of a weight in several parts: its ``up`` has one block for each part."""
    if len(ups) == 1:
        return ups[0], downs[0]
    order = _channel_order(len(downs), len(downs[0]), gates)
    up, down = torch.block_diag(*ups), torch.cat(downs)
    up, down = (torch.cat((up, up.new_zeros(len(up), 1)), 1), torch.cat((down, torch.zeros_like(down[:1]))))
    return up[:, order], down[order]


def _channel_order(parts: int, rank: int, gates: int) -> list[int]:
    """Which channel of which part, ``part * rank + channel``, each channel of all parts together is.

    They are sorted by their gates. Channels of zeros, ``parts * rank``, fill up where a gate has fewer than the others,
    so that `channel_gates` gives every channel the gate that it was trained with.
    """
    of_gate = channel_gates(range(gates), rank)
    order: list[int] = []
    for gate in range(gates):
        own = [part * rank + c for part in range(parts) for c in range(rank) if of_gate[c] == gate]
        order += own + [parts * rank] * (parts * -(-rank // gates) - len(own) if parts > 1 else 0)
    return order


def delta_since(backbone: Backbone, base: dict[str, Any], earlier: WeightDelta | None = None) -> WeightDelta | None:
    """The weight delta that restores ``backbone`` from the original backbone; None if no weight changed.

    Args:
        backbone: the backbone with its present weights.
        base: signature of the backbone when it was wrapped. Weights that changed since are stored whole.
        earlier: the delta that was merged into the backbone before it was wrapped. If it has gates, it still applies
            to weights that changed since, because it is added to their new values.

    Raises:
        AdapterError: weights were added or removed, or the architecture changed, except for the classifier.
        ConfigError: a gated delta is merged into weights that it can no longer be separated from.
    """
    if backbone.gated is not None:
        backbone.gated.check_separable(backbone.model)
    now = signature(backbone)
    names = changed_weights(base, now)
    _check_same_architecture(base, now, names)
    weights = weights_of(backbone)
    whole = {f"{name}.whole": weights[name].cpu().clone() for name in names if name in weights}
    if earlier is not None:
        gated = earlier.gated
        kept = {key: value for key, value in earlier.tensors.items() if key in gated or _weight(key) not in names}
        return WeightDelta(kept | whole, earlier.base, _classes(backbone, names, earlier.classes), earlier.gates)
    return WeightDelta(whole, base, _classes(backbone, names)) if names else None


def _check_same_architecture(base: dict[str, Any], now: dict[str, Any], names: list[str]) -> None:
    """Raise AdapterError if the architecture or a shape changed, except for the classifier."""
    before, after = base["weights"], now["weights"]
    changes = [
        f"{key} was {base[key]}, is {now[key]}"
        for key in base
        if key not in ("name", "weights") and base[key] != now[key]
    ]
    for name in names:
        old, new = (side[name][0] if side.get(name) else "missing" for side in (before, after))
        if old != new and not name.startswith(CLASSIFIERS):
            changes.append(f"{name} was {old}, is {new}")
    if changes:
        raise AdapterError(
            f"the backbone was rebuilt after it was wrapped ({shortened(changes)}), and an adapter cannot store that; "
            "change the backbone first (merge attached adapters, set the image size), then wrap it"
        )


def _classes(backbone: Backbone, names: list[str], earlier: int | None = None) -> int | None:
    """Number of classes, if the classifier was replaced; otherwise ``earlier``."""
    return backbone.num_classes if any(name.startswith(CLASSIFIERS) for name in names) else earlier


def _weight(key: str) -> str:
    """Name of the weight that a tensor of a delta belongs to."""
    return key.rpartition(".")[0]


@torch.no_grad()
def apply_delta(model: nn.Module, delta: dict[str, Tensor], classes: int | None = None) -> nn.Module:
    """A copy of ``model`` with a delta merged into its weights.

    Whole weights are set first, then differences are added. ``classes``: number of classes, if the classifier was
    replaced.

    Raises AdapterError if the delta is of another model.
    """
    for module in model.modules():
        compute_weights(module)  # without a graph: torch copies no tensor that a hook computed with one
    result = copy.deepcopy(model)
    backbone = adapt(result)
    if classes is not None and backbone.num_classes != classes and not _fits_head(backbone, delta):
        backbone.reset_classifier(classes)
    stored = {plain_name(name): tensor for name, tensor in result.state_dict(keep_vars=True).items()}
    weights = backbone.shared_names(stored)
    for name in sorted({_weight(key) for key in delta}):
        if name not in weights:
            raise AdapterError(f"the adapter has a weight delta of {name}, which this backbone does not have")
        try:
            _apply(weights[name], name, delta)
        except RuntimeError as error:
            shapes = " and ".join(str(tuple(part.shape)) for part in weights[name])
            raise AdapterError(
                f"the adapter's weight delta of {name} does not fit this backbone, where its shape is {shapes} "
                f"({error}); load it onto the backbone that it was saved from"
            ) from None
    return result


def _fits_head(backbone: Backbone, delta: dict[str, Tensor]) -> bool:
    """Whether the delta's new head has the shape of the present one, as a projection of another library does."""
    new, old = delta.get("head.weight.whole"), weights_of(backbone).get("head.weight")
    return new is not None and old is not None and new.shape == old.shape


def _apply(parts: list[Tensor], name: str, tensors: dict[str, Tensor]) -> None:
    """Add the delta of one weight in place."""
    whole, delta, up = (tensors.get(f"{name}.{kind}") for kind in ("whole", "delta", "up"))
    rows = [len(part) if part.ndim else 1 for part in parts]
    if whole is not None:
        if whole.shape[1:] != parts[0].shape[1:] or (whole.ndim and len(whole) != sum(rows)):
            raise RuntimeError(f"its shape in the adapter is {tuple(whole.shape)}")
        for part, value in zip(parts, whole.split(rows) if whole.ndim else [whole], strict=True):
            part.copy_(value)
    if up is not None:
        delta = up.float() @ tensors[f"{name}.down"].float()
    if delta is not None:
        for part, value in zip(parts, delta.split(rows) if delta.ndim else [delta], strict=True):
            part.add_(value.to(part))


def revert_delta(model: nn.Module, delta: dict[str, Tensor]) -> nn.Module:
    """A copy of ``model`` with the merged differences subtracted, exact up to the rounding of one addition.

    Whole weights are not reverted: they belong to the dense model.
    """
    differences = {name: value for name, value in delta.items() if not name.endswith(".whole")}
    return apply_delta(
        model, {name: value if name.endswith(".down") else -value for name, value in differences.items()}
    )
