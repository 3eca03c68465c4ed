"""What an adapter changes of a backbone: kept apart from it, and merged into a copy when it is loaded.

What stage 2 of a fit learned is small: differences in half precision, as two thin matrices (``up @ down``) or one
(``delta``). Weights that anybody else trained after the model was wrapped are kept as they are (``whole``).
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
from . import Backbone, signature
from .identity import CLASSIFIERS, changed, plain_name, weights_of

__all__ = ["Change", "LowRank", "add_low_rank", "change_of", "change_since", "merged", "undone"]


@dataclass(frozen=True)
class Change:
    """What an adapter changes of its backbone.

    Attributes:
        tensors: by weight and kind, such as ``norm.bias.delta`` (see above).
        base: the signature of the backbone without the change (see `backbones/identity.py`).
        classes: of the classifier, if it is a new one.
    """

    tensors: dict[str, Tensor]
    base: dict[str, Any]
    classes: int | None = None

    @property
    def learned(self) -> bool:
        """Whether the backbone learned to run on fewer patches, so that it is no dense teacher any more."""
        return any(not key.endswith(".whole") for key in self.tensors)

    @property
    def replaced(self) -> set[str]:
        """Names of the weights whose earlier values do not matter."""
        return {_weight(key) for key in self.tensors if key.endswith(".whole")}


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


def change_since(backbone: Backbone, base: dict[str, Any], earlier: Change | None = None) -> Change | None:
    """All that tells ``backbone`` from the one that its adapter will be loaded onto; None for nothing.

    Args:
        backbone: as it is now.
        base: its signature when it was wrapped. What has been trained since is in the change as whole weights.
        earlier: the change that was merged into it before it was wrapped.

    Raises AdapterError when weights came or went, or the architecture changed, other than by another classifier.
    """
    now = signature(backbone)
    names = changed(base, now)
    _check_same_parts(base, now, names)
    weights = weights_of(backbone.vit)
    whole = {f"{name}.whole": weights[name].cpu().clone() for name in names if name in weights}
    if earlier is not None:
        kept = {key: value for key, value in earlier.tensors.items() if _weight(key) not in names}
        return Change(kept | whole, earlier.base, _classes(backbone, names, earlier.classes))
    return Change(whole, base, _classes(backbone, names)) if names else None


def _check_same_parts(base: dict[str, Any], now: dict[str, Any], names: list[str]) -> None:
    """Raise AdapterError unless loading can bring the original backbone to these shapes."""
    before, after = base["weights"], now["weights"]
    facts = [
        f"{key} was {base[key]}, is {now[key]}"
        for key in base
        if key not in ("name", "weights") and base[key] != now[key]
    ]
    for name in names:
        was, now_is = (side[name][0] if side.get(name) else "not there" for side in (before, after))
        if was != now_is and not name.startswith(CLASSIFIERS):
            facts.append(f"{name} was {was}, is {now_is}")
    if facts:
        raise AdapterError(
            f"the backbone was rebuilt after it was wrapped ({shortened(facts)}), so no adapter can bring the original "
            "to that; change its parts first (merge attached adapters, set the image size), then wrap it"
        )


def _classes(backbone: Backbone, names: list[str], earlier: int | None = None) -> int | None:
    """How many classes the new classifier has, if it is a new one."""
    return backbone.vit.num_classes if any(name.startswith(CLASSIFIERS) for name in names) else earlier


def _weight(key: str) -> str:
    """The name of the weight that a tensor of a change is about."""
    return key.rpartition(".")[0]


@torch.no_grad()
def merged(vit: nn.Module, change: dict[str, Tensor], classes: int | None = None) -> nn.Module:
    """A copy of ``vit`` with a change merged into its weights: nothing is left to compute at inference.

    Whole weights are put in first, differences are added to that. ``classes``: of the classifier, if it is a new one.

    Raises AdapterError when the change is of another model.
    """
    result: Any = copy.deepcopy(vit)
    if classes is not None and result.num_classes != classes:
        result.reset_classifier(classes)
        for name, module in result.named_children():
            if f"{name}." in CLASSIFIERS:
                module.to(next(vit.parameters()))
    weights = {plain_name(name): tensor for name, tensor in result.state_dict(keep_vars=True).items()}
    for name in sorted({_weight(key) for key in change}):
        if name not in weights:
            raise AdapterError(f"the adapter changes {name}, which this backbone does not have")
        try:
            _apply(weights[name], name, change)
        except RuntimeError as error:
            raise AdapterError(
                f"the adapter's change of {name} does not fit this backbone, where it is of shape "
                f"{tuple(weights[name].shape)} ({error}); load it onto the backbone that it was saved from"
            ) from None
    return result


def _apply(weight: Tensor, name: str, change: dict[str, Tensor]) -> None:
    """Change one weight in place."""
    whole, delta, up = (change.get(f"{name}.{kind}") for kind in ("whole", "delta", "up"))
    if whole is not None:
        if whole.shape != weight.shape:
            raise RuntimeError(f"the saved one is of shape {tuple(whole.shape)}")
        weight.copy_(whole)
    if up is not None:
        delta = up.float() @ change[f"{name}.down"].float()
    if delta is not None:
        weight.add_(delta.to(weight))


def undone(vit: nn.Module, change: dict[str, Tensor]) -> nn.Module:
    """A copy of ``vit`` with merged differences taken out again, exact up to the rounding of one addition.

    Whole weights stay: they are the dense model's own, trained by its owner.
    """
    differences = {name: value for name, value in change.items() if not name.endswith(".whole")}
    return merged(vit, {name: value if name.endswith(".down") else -value for name, value in differences.items()})
