"""The weights of a slimmed model: those of its backbone, with a weight delta that may follow the budget."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

from torch import Tensor

from ..backbones import Backbone, adapt
from ..backbones.gates import GatedWeights, gate_values, ramps_of
from ..backbones.merged_delta import MergedDelta
from ..backbones.weight_delta import WeightDelta, revert_delta
from ..errors import ConfigError
from .wrapper import BackboneWrapper

__all__ = ["BudgetWeights", "delta_of", "described"]


class BudgetWeights(BackboneWrapper):
    """A wrapped backbone with a weight delta. `SlimSettings` adds the budget.

    Attributes:
        backbone: the wrapped model, as the parts that the method needs.
        delta: the weight delta of an adapter, which is merged into the backbone (see `use_delta`); None without one.
    """

    backbone: Backbone
    delta: WeightDelta | None

    @property
    @abstractmethod
    def spent(self) -> float:
        """The budget that weights follow."""

    @abstractmethod
    def apply_settings(self) -> None:
        """Apply the present settings again, because something that they depend on changed."""

    @abstractmethod
    def temporarily(self, **changes: Any) -> AbstractContextManager[Self]:
        """Change settings inside a ``with`` block."""

    def use_delta(self, delta: WeightDelta | None) -> Self:
        """Record the weight delta of an adapter, and merge its gated part for the present budget.

        The gated part is merged into the parameters of the backbone in place, and again at each change of the budget;
        at budget 1.0 it is zero, and the weights are bit for bit those of the backbone. The rest of the delta must be
        in the weights already (`apply_delta`). Until the budget is 1.0 an exact copy of the changed weights is kept.

        Raises AdapterError if the delta does not fit the backbone.
        """
        merged = MergedDelta(self.backbone, delta) if delta is not None and delta.gates else None
        self._detach_delta()
        self.delta, self.backbone.gated = delta, merged
        self.apply_settings()
        return self

    def dense_backbone(self) -> Backbone:
        """The dense model: a copy where a weight delta that training learned has changed weights, else the backbone."""
        if self.delta is None or not self.delta.learned:
            return self.backbone
        if not self.delta.gates:
            return adapt(revert_delta(self.backbone.model, self.delta.tensors))
        with self.temporarily(budget=1.0):
            return adapt(copy.deepcopy(self.backbone.model))

    def follow_budget(self) -> None:
        """Merge the gated delta for this model's budget; another model of the same backbone may have merged another."""
        gated = self.backbone.gated
        if gated is not None:
            self._check_offloaded(gated)
            gated.merge(self.backbone.model, gate_values(self.spent, gated.ramps))

    def _check_offloaded(self, gated: GatedWeights) -> None:
        """Raise ConfigError if accelerate offloaded a model with a merged delta: it took the weights without it."""
        if "_hf_hook" in self.__dict__ and any(gated.values) and any(p.is_meta for p in self.parameters()):
            raise ConfigError(
                "this model was offloaded while a weight delta that follows the budget was merged, and offloading "
                "loses the delta; keep the model on one device, or call set_budget(1.0) before it is offloaded"
            )

    def _detach_delta(self) -> None:
        """Restore the weights without the gated delta, and forget it."""
        gated = self.backbone.gated
        if gated is not None:
            gated.merge(self.backbone.model, (0.0,) * len(gated.ramps))
            self.backbone.gated = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's, for ``.to``, ``.half`` and others: the weights without the gated delta are converted exactly."""
        gated = self.backbone.gated
        if gated is None:
            return super()._apply(fn, recurse)
        with gated.unmerged(self.backbone.model):
            super()._apply(fn, recurse)
        self.follow_budget()
        return self

    # ---- state dict

    def weight_delta(self) -> dict[str, Tensor]:
        """The tensors of the weight delta; empty without one.

        The backbone's weights in a state dict have the delta, except for its gated part.
        """
        return self.delta.tensors if self.delta else {}

    def base_values(self) -> dict[int, Tensor]:
        """See `BackboneWrapper.base_values`. Raises ConfigError where they are not known."""
        gated = self.backbone.gated
        if gated is None:
            return {}
        gated.check_separable(self.backbone.model)
        return gated.bases()

    def about_to_load(self) -> None:
        """Restore the weights without the gated delta, which a state dict replaces."""
        self._detach_delta()


def described(delta: WeightDelta | None) -> dict[str, Any] | None:
    """A weight delta without its tensors, as JSON values."""
    return {"base": delta.base, "classes": delta.classes, "gates": delta.gates} if delta is not None else None


def delta_of(tensors: dict[str, Tensor], values: dict[str, Any] | None) -> WeightDelta | None:
    """The inverse of `described`. Values of older versions have no gates."""
    if values is None:
        return None
    return WeightDelta(tensors, values["base"], values["classes"], ramps_of(values.get("gates")))
