"""Choosing the `Backbone` of a model by its library, or refusing the model with advice."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .backbone import Backbone

__all__ = ["adapt"]

_LIBRARIES = ("transformers", "open_clip")
"""Top packages of the classes of models, and the modules here that know them; the module of timm is the default."""


class _Container(NamedTuple):
    """Classes that hold a Vision Transformer, and what to do instead of wrapping them."""

    classes: tuple[str, ...]
    advice: str


_CONTAINERS = {  # by the name of the submodule that is the Vision Transformer
    "_orig_mod": _Container(
        ("OptimizedModule",), "wrap the model before torch.compile: torch.compile(patchlife.wrap(model._orig_mod))"
    ),
    "module": _Container(
        ("DataParallel", "DistributedDataParallel"),
        "wrap the model inside first: DistributedDataParallel(patchlife.wrap(model.module))",
    ),
    "_fsdp_wrapped_module": _Container(
        ("FullyShardedDataParallel",), "wrap the model before it is sharded: fully_shard(patchlife.wrap(vit))"
    ),
    "base_model": _Container(
        ("PeftModel",), "wrap the model with the LoRA layers: patchlife.wrap(model.base_model.model)"
    ),
    "timm_model": _Container(
        ("TimmWrapperModel", "TimmWrapperForImageClassification"),
        "wrap the timm model in its place: model.timm_model = patchlife.wrap(model.timm_model)",
    ),
    "trunk": _Container(
        ("TimmModel",), "wrap the timm model in its place: visual.trunk = patchlife.wrap(visual.trunk)"
    ),
    "model": _Container(("FeatureGetterNet",), "wrap the model inside: model.model = patchlife.wrap(model.model)"),
    "visual": _Container(
        ("CLIP", "CustomTextCLIP", "CoCa"),
        "wrap the vision encoder in its place: model.visual = patchlife.wrap(model.visual)",
    ),
}


def adapt(model: Any) -> Backbone:
    """The `Backbone` of a Vision Transformer of timm, transformers or open_clip.

    Raises UnsupportedModelError for models whose patches cannot be dropped exactly.
    """
    if (advice := _advice(model)) is not None:
        raise UnsupportedModelError(advice)
    with torch.autocast("cpu", enabled=False):  # blocks are compared with their parts in full precision
        for kind in type(model).__mro__:  # a user's subclass comes from another package
            library = kind.__module__.partition(".")[0]
            if library in _LIBRARIES:
                return importlib.import_module(f".{library}", __package__).adapt(model)
        from .timm import adapt_timm

        return adapt_timm(model)


def _advice(model: Any) -> str | None:
    """Error text for a model that contains a Vision Transformer or is wrapped already; None for other models."""
    if not isinstance(model, nn.Module):
        return f"expected a Vision Transformer (an nn.Module), got {type(model).__name__}"
    if _is_wrapped(model):
        return "this model is wrapped already; use set_budget and set_mode, or wrap(model.unwrap(), ...)"
    if inner := next((path for path, part in model.named_modules() if _is_wrapped(part)), None):
        return (
            f"{inner} of this {type(model).__name__} is wrapped already; use the {type(model).__name__} as it is, or "
            f"unwrap that part first: model.{inner} = model.{inner}.unwrap()"
        )
    for name, container in _CONTAINERS.items():
        if model._modules.get(name) is not None and type(model).__name__ in container.classes:
            return f"expected a Vision Transformer, got one inside a {type(model).__name__}: {container.advice}"
    return None


def _is_wrapped(module: nn.Module) -> bool:
    return hasattr(type(module), "unwrap") and hasattr(type(module), "set_budget")
