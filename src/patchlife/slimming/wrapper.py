"""A wrapper that optimizers, trainers, checkpoints, LoRA, FSDP and offloading handle as the backbone itself.

Those libraries use the names of attributes, child modules, parameters and state-dict keys. The wrapper has the same
names because it shares the backbone's own registries of children, parameters and buffers (the same dicts); a layer
replaced in one is replaced in the other. It adds a child module, ``scorer``, and to the state dict ``scorer.*``,
``weight_delta.*`` and one tensor of settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BackboneWrapper", "from_bytes", "to_bytes"]

_EXTRA = "_extra_state"  # torch's key for what `get_extra_state` gives
_REGISTRIES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class BackboneWrapper(nn.Module):
    """A backbone and a scorer, under the names of the backbone.

    Attributes:
        wrapped: the backbone; shared, not copied, not changed.
        scorer: the module that scores patches.
    """

    wrapped: Any
    scorer: nn.Module

    def __init__(self, vit: nn.Module, scorer: nn.Module) -> None:
        nn.Module.__init__(self)
        copied = _shadowing(vit, set(self.__dict__)) if isinstance(self, type(vit)) else set()
        self.__dict__ |= {name: vit.__dict__[name] for name in copied} | {"_copied": copied}
        self.__dict__ |= {name: vit.__dict__[name] for name in _REGISTRIES}
        self.__dict__ |= {"wrapped": vit, "scorer": scorer}  # not registered: the registries are the backbone's
        self.train(vit.training)
        self.register_load_state_dict_post_hook(_call_loaded)

    def unwrap(self) -> Any:
        """The backbone. A gated weight delta stays in its weights, and changes with this model's budget (1.0: none)."""
        return self.wrapped

    # ---- attributes

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "wrapped" not in self.__dict__:
                raise
            return getattr(self.__dict__["wrapped"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scorer":
            self.__dict__[name] = value
        elif name in self.__dict__.get("_copied", ()):
            setattr(self.wrapped, name, value)
            self.__dict__[name] = value
        elif self._is_a_property_of_the_backbone(name):
            setattr(self.wrapped, name, value)  # the library's forward runs on the backbone
            super().__setattr__(name, value)
        elif self._is_the_backbones(name) and not isinstance(value, Tensor | nn.Module):
            setattr(self.wrapped, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.wrapped)})

    def _is_the_backbones(self, name: str) -> bool:
        """Whether to set this attribute on the backbone: the backbone has it and the wrapper does not."""
        own = name in self.__dict__ or hasattr(type(self), name) or name.startswith("_")
        return not own and "wrapped" in self.__dict__ and hasattr(self.wrapped, name)

    def _is_a_property_of_the_backbone(self, name: str) -> bool:
        """Whether the name is a property of the backbone's class that can be set, such as ``loss_function``."""
        found = getattr(type(self.__dict__.get("wrapped")), name, None)
        return isinstance(found, property) and found.fset is not None and getattr(type(self), name, None) is found

    # ---- the scorer as a child module, and training mode

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As torch's, with the scorer."""
        yield from super().named_children()
        yield "scorer", self.scorer

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As torch's, with the scorer. ``parameters`` and ``buffers`` use this method too."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        yield from self.scorer.named_modules(memo, f"{prefix}.scorer" if prefix else "scorer", remove_duplicate)

    def train(self, mode: bool = True) -> Any:
        """As torch's."""
        super().train(mode)
        self.wrapped.training = mode
        return self

    # ---- state dict

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The backbone's, with ``scorer.*``, ``weight_delta.*`` and the settings as a tensor of bytes.

        Weights with a gated weight delta have their values without it.
        """
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        settings = state.pop(prefix + _EXTRA)
        if bases := self.base_values():
            of_names = {f"{prefix}{name}": id(p) for name, p in self.named_parameters(remove_duplicate=False)}
            state.update({name: bases[p] for name, p in of_names.items() if p in bases and name in state})
        self.scorer.state_dict(destination=state, prefix=f"{prefix}scorer.", keep_vars=keep_vars)
        state.update({f"{prefix}weight_delta.{name}": value for name, value in self.weight_delta().items()})
        state[prefix + _EXTRA] = settings
        return state

    def weight_delta(self) -> dict[str, Tensor]:
        """The tensors of a weight delta that is merged into the backbone; empty without one."""
        return {}

    def base_values(self) -> dict[int, Tensor]:
        """The values without a gated weight delta of the parameters that one is merged into, by the parameter's id."""
        return {}

    def about_to_load(self) -> None:
        """Called before a state dict is loaded."""

    def loaded(self, delta: dict[str, Tensor], bare: bool) -> None:
        """Called after a state dict was loaded; ``bare``: it was the backbone's own, without entries of this class."""

    def _load_from_state_dict(
        self,
        state: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """Load; a checkpoint of the backbone alone leaves scorer and settings as they are."""
        self.about_to_load()
        scorer, delta = _taken(state, f"{prefix}scorer."), _taken(state, f"{prefix}weight_delta.")
        bare = prefix + _EXTRA not in state
        if bare:
            state[prefix + _EXTRA] = self.get_extra_state()
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if scorer or not bare:
            found = _load(self.scorer, scorer, bool(metadata.get("assign_to_params_buffers")), errors)
            missing += [f"{prefix}scorer.{name}" for name in found.missing_keys]
            unexpected += [f"{prefix}scorer.{name}" for name in found.unexpected_keys]
        self.__dict__["_awaited"] = (delta, bare)


def _shadowing(vit: nn.Module, own: set[str]) -> set[str]:
    """Attributes of ``vit`` that `BackboneWrapper.__getattr__` would not find in a wrapper of a subclass of its class.

    They are private, or a class attribute hides them. Attributes that every module has (``own``) are not among them.
    """
    return {name for name in vit.__dict__ if name not in own and (name.startswith("_") or hasattr(type(vit), name))}


def _taken(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Entries under ``prefix``, taken out of ``state``."""
    return {key[len(prefix) :]: state.pop(key) for key in list(state) if key.startswith(prefix)}


def _load(module: nn.Module, state: dict[str, Any], assign: bool, errors: list[str]) -> Any:
    try:
        return module.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:  # shapes
        errors.append(str(error))
        return nn.modules.module._IncompatibleKeys([], [])


def _call_loaded(module: BackboneWrapper, _: Any) -> None:
    """torch's hook after loading a module and its children."""
    awaited = module.__dict__.pop("_awaited", None)
    if awaited is not None:
        module.loaded(*awaited)


def to_bytes(text: str) -> Tensor:
    """A text as a tensor, for files that hold tensors only."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def from_bytes(tensor: Tensor) -> str:
    """The inverse of `to_bytes`."""
    return bytes(tensor.to("cpu", torch.uint8).tolist()).decode()
