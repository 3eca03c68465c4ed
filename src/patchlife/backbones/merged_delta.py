"""A gated weight delta in the weights of a backbone: merged in place, again at each change of the budget.

The parameters stay the same objects, so optimizers, compiled graphs and attached adapters keep working. While a delta
is merged, an exact copy of each changed parameter without it, its base, is kept. At budget 1.0 the bases are written
back bit for bit, and no copies are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError
from .backbone import Backbone
from .gates import channel_gates
from .identity import plain_name
from .weight_delta import WeightDelta

__all__ = ["Factors", "MergedDelta", "has_merged_delta"]

_MERGED: WeakSet[nn.Module] = WeakSet()
"""The models into whose parameters a delta is merged now."""

_SAMPLE = 64  # entries of a parameter that are compared to find changes by other code


class Factors:
    """The gated delta of one parameter, or of one part of a weight that a library stores in several parts.

    Attributes:
        name: of the weight, as in the adapter.
        up: (outputs, channels), or for a vector the transposed shift (entries, gates).
        down: (channels, inputs); None for a vector.
    """

    def __init__(self, name: str, up: Tensor, down: Tensor | None) -> None:
        self.name, self.up, self.down = name, up, down

    def channels(self, values: tuple[float, ...]) -> list[float]:
        """The gate of each channel."""
        return channel_gates(values, self.up.shape[1]) if self.down is not None else list(values)

    def delta(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        """The delta at these gates, on the device of ``like``, in float32 or better."""
        options: Any = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        up, gates = self.up.to(**options), torch.tensor(self.channels(values), **options)
        return up @ gates if self.down is None else (up * gates) @ self.down.to(**options)


class _Merged:
    """A parameter, its factors, and its base while a delta is merged."""

    def __init__(self, parameter: nn.Parameter, factors: Factors) -> None:
        self.parameter, self.factors = parameter, factors
        self.base: Tensor | None = None
        self._written: tuple[Any, ...] = ()

    def write(self, base: Tensor, values: tuple[float, ...]) -> None:
        """Set the parameter to ``base`` with the delta at these gates."""
        if any(values):
            self.base = base.detach().clone() if base is self.parameter else base
            self.parameter.copy_(self._with_delta(self.base, values))
            self._written = self._state()
        elif self.base is not None:
            self.parameter.copy_(base)
            self.base = None

    def present_base(self, values: tuple[float, ...]) -> Tensor:
        """The parameter without the delta, which is merged at these gates.

        If other code changed the parameter since, its change is in the result.
        """
        if self.base is None:
            return self.parameter
        if not _equal(self._written, self._state()):
            expected = self._with_delta(self.base, values).to(self.parameter)
            if torch.equal(expected, self.parameter):  # only copied, moved or cast
                self.base = self.base.to(self.parameter, copy=True)
            else:
                delta = self.factors.delta(values, self.parameter)
                self.base = (self.parameter.detach().to(delta.dtype) - delta).to(self.parameter.dtype)
            self._written = self._state()
        return self.base

    def _with_delta(self, base: Tensor, values: tuple[float, ...]) -> Tensor:
        delta = self.factors.delta(values, base)
        return (base.to(delta.dtype) + delta).to(base.dtype)

    def _state(self) -> tuple[Any, ...]:
        """Changes whenever other code writes the parameter; the sample shows writes through ``.data``."""
        own = self.parameter.detach()
        version = 0 if own.is_inference() else self.parameter._version
        flat = own.flatten()
        return (version, own.data_ptr(), own.dtype, flat[:: max(1, len(flat) // _SAMPLE)].clone())


def _equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[:-1] == other[:-1] and torch.equal(one[-1], other[-1])


def has_merged_delta(model: nn.Module) -> bool:
    """Whether the delta of a budget below 1 is merged into the parameters of ``model``, a backbone's model."""
    return model in _MERGED


class MergedDelta:
    """A gated delta of a backbone's parameters, merged at the gates of one budget. Nothing is merged at first.

    Attributes:
        delta: the weight delta.
        ramps: of its gates.
        values: the gates that are merged.

    Raises:
        AdapterError: the delta does not fit the backbone.
    """

    def __init__(self, backbone: Backbone, delta: WeightDelta) -> None:
        assert delta.gates is not None
        self.delta, self.ramps = delta, delta.gates
        self.values = (0.0,) * len(self.ramps)
        self._parts = list(_parts(backbone, delta))

    def merge(self, model: nn.Module, values: tuple[float, ...]) -> None:
        """Merge the delta at these gates into the parameters of ``model``, the backbone's.

        Weights on the meta device have no values; they get the delta when they have.

        Raises:
            ConfigError: a parameter cannot be written any more; nothing was changed.
        """
        if values == self.values or self._on_meta():
            return
        self._check(model)
        with self._writing():
            for part in self._parts:
                part.write(part.present_base(self.values), values)
        self.values = values
        (_MERGED.add if any(values) else _MERGED.discard)(model)

    @contextmanager
    def unmerged(self, model: nn.Module) -> Iterator[None]:
        """A context in which the parameters are exactly the bases, for conversions of the whole model.

        It does nothing for a model whose parameters cannot be written any more.
        """
        values, names = self.values, {id(p): name for name, p in model.named_parameters()}
        try:
            self._check(model)
        except ConfigError:
            yield
            return
        self.merge(model, (0.0,) * len(values))
        try:
            yield
        finally:
            after = dict(model.named_parameters())
            for part in self._parts:  # conversions may replace parameters
                part.parameter = after.get(names[id(part.parameter)], part.parameter)
            self.merge(model, values)

    def check_separable(self, model: nn.Module) -> None:
        """Raise ConfigError where the weights of ``model`` would be saved with the delta, and the delta beside them."""
        if any(self.values) and not self._on_meta():
            self._check(model)

    def bases(self) -> dict[int, Tensor]:
        """The base of each parameter that a delta is merged into, by the parameter's id."""
        with self._writing():
            return {id(part.parameter): part.present_base(self.values) for part in self._parts if part.base is not None}

    def factors(self) -> list[tuple[nn.Parameter, Tensor, Factors]]:
        """(parameter, its base, factors of its delta) of each parameter that a delta is merged into."""
        bases = self.bases()
        return [(p.parameter, bases[id(p.parameter)], p.factors) for p in self._parts if p.base is not None]

    def _on_meta(self) -> bool:
        return any(part.parameter.is_meta for part in self._parts)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        inference = any(part.parameter.is_inference() for part in self._parts)
        with torch.inference_mode(inference), torch.no_grad():
            yield

    def _check(self, model: nn.Module) -> None:
        """Raise ConfigError unless all parameters still are ordinary parameters of ``model``."""
        present = {id(p): name for name, p in model.named_parameters()}
        for part in self._parts:
            name = present.get(id(part.parameter), "")
            if not name or "parametrizations" in name or name.endswith("_orig"):
                raise ConfigError(
                    f"the weight delta of {part.factors.name} follows the budget and can no longer be merged or "
                    "separated, because this weight was replaced, quantised, sharded, offloaded or parametrised; set "
                    "the budget before that, save at budget 1.0, or load the adapter again"
                )


def _parts(backbone: Backbone, delta: WeightDelta) -> Iterator[_Merged]:
    stored = {plain_name(name): value for name, value in backbone.model.state_dict(keep_vars=True).items()}
    weights, tensors = backbone.shared_names(stored), delta.gated
    for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        if name not in weights:
            raise AdapterError(f"the adapter has a weight delta of {name}, which this backbone does not have")
        parts, down = weights[name], tensors.get(f"{name}.down")
        up = tensors[f"{name}.shift"].T if down is None else tensors[f"{name}.up"]
        rows = [len(part) for part in parts]
        inputs = () if down is None else (down.shape[1],)
        if len(up) != sum(rows) or any(part.shape[1:] != inputs for part in parts):
            shapes = " and ".join(str(tuple(part.shape)) for part in parts)
            raise AdapterError(
                f"the adapter's weight delta of {name} has shape {(len(up), *inputs)} and does not fit this backbone, "
                f"where its shape is {shapes}; load it onto the backbone that it was saved from"
            )
        for parameter, own in zip(parts, up.split(rows), strict=True):
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                raise AdapterError(
                    f"the adapter's weight delta of {name} follows the budget, which needs an ordinary parameter, got "
                    f"{type(parameter).__name__}; load the adapter first, then quantise, shard or prune the model"
                )
            yield _Merged(parameter, Factors(name, own, down))
