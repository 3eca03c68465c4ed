"""Why a model of transformers, or a batch for it, is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from .backbone import Backbone
from .transformers_models import CORES, HEADS, REFUSED, SUPPORTED, class_name
from .transformers_towers import reason_of, tower_advice

__all__ = [
    "check_all_present",
    "check_attention",
    "check_class",
    "check_countable",
    "check_images",
    "check_not_dispatched",
    "check_one_device",
]


def check_class(model: Any) -> None:
    """Raise UnsupportedModelError, with the reason, for classes that are not supported or that replace ``forward``."""
    name, known = type(model).__name__, class_name(model, CORES) or class_name(model, HEADS)
    reason = "" if known else reason_of([kind.__name__ for kind in type(model).__mro__], REFUSED)
    if not known and not reason:
        if advice := tower_advice(model, CORES, REFUSED):
            raise UnsupportedModelError(advice)
        is_text = getattr(model, "main_input_name", "") == "input_ids"
        reason = "it is a text model" if is_text else "its forward pass is not known to patchlife"
    if reason:
        raise UnsupportedModelError(
            f"patches of transformers' {name} cannot be dropped: {reason}. Supported of transformers: {SUPPORTED}"
        )
    _check_forward(model, known)
    if known in HEADS:
        core = getattr(model, HEADS[known].core)
        known_core = class_name(core, CORES)
        if not known_core:
            raise UnsupportedModelError(
                f"expected a {HEADS[known].core} of transformers inside {name}, got {type(core).__name__}; put the "
                "original one in its place"
            )
        _check_forward(core, known_core)


def _check_forward(model: Any, known: str) -> None:
    """Raise UnsupportedModelError if ``model`` does not have the ``forward`` of transformers' class ``known``."""
    defined: Any = next(kind for kind in type(model).__mro__ if kind.__name__ == known)
    replaced = "forward" in vars(model) and "_hf_hook" not in vars(model)  # accelerate's has its own check
    if type(model).forward is not defined.forward or replaced:
        raise UnsupportedModelError(
            f"{type(model).__name__} replaces forward of transformers' {known}, so what it computes is unknown"
        )


def check_countable(backbone: Backbone) -> None:
    """Raise UnsupportedModelError if the embedding needs values, so that its FLOPs cannot be counted without weights.

    Idefics encoders of older releases of transformers choose positions by a boolean index.
    """
    copy = backbone.skeleton()
    try:
        copy.embed(copy.blank())
    except NotImplementedError:
        raise UnsupportedModelError(
            f"{type(backbone.model).__name__} of the installed transformers {version('transformers')} cannot be "
            "counted; upgrade transformers: pip install -U 'transformers>=5.24'"
        ) from None


def check_attention(core: Any) -> None:
    """Raise UnsupportedModelError for attention implementations other than eager and sdpa."""
    implementation = core.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} is not supported; call model.set_attn_implementation('sdpa')"
        )


def check_not_dispatched(containers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise UnsupportedModelError if accelerate moves the inputs of one of these named modules to its device."""
    for name, module in containers:
        if "_hf_hook" in module.__dict__:
            raise UnsupportedModelError(
                f"{name} is dispatched over devices by accelerate; load the model on one device (without device_map) "
                "and wrap it there"
            )


def check_one_device(model: nn.Module) -> None:
    """Raise UnsupportedModelError if not all weights are on one device."""
    counts = Counter(str(parameter.device) for parameter in model.parameters())
    if len(counts) > 1:
        (most, _), (other, _) = counts.most_common(2)
        example = next(name for name, parameter in model.named_parameters() if str(parameter.device) == other)
        raise UnsupportedModelError(
            f"the weights are on several devices, most on {most} but {example} on {other}; move the model to one "
            "device first (a weight on meta was never loaded)"
        )


def check_images(backbone: Backbone, images: Tensor) -> None:
    """Raise ConfigError if the model does not take images of this size, or if its weights were not loaded."""
    height, width = images.shape[-2:]
    if (height, width) != backbone.image_size and not backbone.any_size:
        raise ConfigError(
            f"this model takes images of {backbone.image_size[0]} x {backbone.image_size[1]} pixels only, because "
            f"transformers interpolates square tables of positions only; got {height} x {width}"
        )
    if 0 in backbone.grid_of(images):
        raise ConfigError(
            f"images of {height} x {width} pixels are smaller than a patch of {backbone.patch_size[0]} x "
            f"{backbone.patch_size[1]}; resize them"
        )
    if backbone.device.type == "meta" != images.device.type:
        raise ConfigError(
            "the weights of this model are on the meta device, which holds no values: only FLOPs can be computed. "
            "Load the weights (from_pretrained without device_map='meta') and wrap that model"
        )


def check_all_present(mask: Tensor | None) -> None:
    """Raise ConfigError for a ``patch_attention_mask`` (batch, rows, cols) that marks some patches as padding."""
    if mask is not None and not mask.all():
        padding = 1 - mask.float().mean().item()
        raise ConfigError(
            f"expected images without padding, got a patch_attention_mask that marks {padding:.0%} of the patches as "
            "padding: a slimmed model has no mask. Give images of one size (such as the square tiles of the image "
            "processor with do_image_splitting), or one image at a time, or call set_budget(1.0)"
        )
