"""Weight deltas: learned differences of a backbone's weights. Adapters store them; loading merges them into a copy.

Stage 2 of a fit stores differences in half precision, of low rank (``up @ down``) or full (``delta``). Weights that
other code trained after the model was wrapped are stored with their new values (``whole``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from ..errors import AdapterError, shortened
from .adapt import adapt
from .attached import compute_weights
from .backbone import Backbone
from .comparison import changed_weights
from .identity import CLASSIFIERS, plain_name, signature, weights_of

__all__ = ["LowRank", "WeightDelta", "add_low_rank", "apply_delta", "delta_between", "delta_since", "revert_delta"]


@dataclass(frozen=True)
class WeightDelta:
    """Differences of a backbone's weights from those it was built with.

    Attributes:
        tensors: by name of the weight and kind of the tensor, such as ``norm.bias.delta`` (see above).
        base: signature of the backbone without the delta (see `identity.py`).
        classes: number of classes, if the classifier was replaced.
    """

    tensors: dict[str, Tensor]
    base: dict[str, Any]
    classes: int | None = None

    @property
    def learned(self) -> bool:
        """Whether stage 2 of a fit trained the backbone. It then differs from the dense model."""
        return any(not key.endswith(".whole") for key in self.tensors)

    @property
    def replaced(self) -> set[str]:
        """Names of the weights stored with their new values, so that their old values have no effect."""
        return {_weight(key) for key in self.tensors if key.endswith(".whole")}


class LowRank(nn.Module):
    """Parametrization of a weight matrix: the weight plus ``up @ down``, which is 0 at the start."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.down = nn.Parameter(torch.randn(rank, inputs, device=weight.device) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight plus the delta."""
        return weight + self.up @ self.down


def add_low_rank(modules: Iterable[nn.Module], rank: int) -> None:
    """Add a `LowRank` delta to every linear layer in ``modules`` and freeze the weights of these layers.

    The queries, keys and values of nn.MultiheadAttention are a layer too.
    """
    for module in modules:
        for layer in list(module.modules()):
            name = "weight" if isinstance(layer, nn.Linear) else "in_proj_weight"
            weight = getattr(layer, name, None)
            if weight is not None:
                weight.requires_grad_(False)
                parametrize.register_parametrization(layer, name, LowRank(weight, rank))


def delta_between(trained: Backbone, original: Backbone) -> dict[str, Tensor]:
    """Tensors of the weight delta from ``original`` to ``trained``; factors for parameters with a `LowRank` delta."""
    ups, downs = {}, {}
    for path, module in trained.model.named_modules():
        for name in getattr(module, "parametrizations", {}):
            (low,) = module.parametrizations[name]
            ups[f"{path}.{name}"], downs[f"{path}.{name}"] = low.up, low.down
    # of a weight in several parts, the factors are a block diagonal and a stack
    delta = {f"{name}.up": torch.block_diag(*parts) for name, parts in trained.shared_names(ups).items()}
    delta |= {f"{name}.down": torch.cat(parts) for name, parts in trained.shared_names(downs).items()}
    before, after = dict(original.model.named_parameters()), dict(trained.model.named_parameters())
    before, after = ({name: side[name] for name in before if name in after} for side in (before, after))
    old, new = original.shared_names(before), trained.shared_names(after)
    for name, parts in new.items():
        if not all(map(torch.equal, parts, old[name])):
            delta[f"{name}.delta"] = torch.cat(parts) - torch.cat(old[name])
    return {name: value.detach().half().cpu().contiguous() for name, value in delta.items()}


def delta_since(backbone: Backbone, base: dict[str, Any], earlier: WeightDelta | None = None) -> WeightDelta | None:
    """The weight delta that restores ``backbone`` from the original backbone; None if no weight changed.

    Args:
        backbone: the backbone with its present weights.
        base: signature of the backbone when it was wrapped. Weights that changed since are stored whole.
        earlier: the delta that was merged into the backbone before it was wrapped.

    Raises:
        AdapterError: weights were added or removed, or the architecture changed, except for the classifier.
    """
    now = signature(backbone)
    names = changed_weights(base, now)
    _check_same_architecture(base, now, names)
    weights = weights_of(backbone)
    whole = {f"{name}.whole": weights[name].cpu().clone() for name in names if name in weights}
    if earlier is not None:
        kept = {key: value for key, value in earlier.tensors.items() if _weight(key) not in names}
        return WeightDelta(kept | whole, earlier.base, _classes(backbone, names, earlier.classes))
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
