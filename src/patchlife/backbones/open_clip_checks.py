"""Why a model of open_clip is refused."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import Transformer, VisionTransformer

from ..errors import UnsupportedModelError

__all__ = ["check_class"]

_RELIED_ON = ("forward", "forward_intermediates", "_embeds", "_pool", "_global_pool")


def check_class(model: Any) -> None:
    """Raise UnsupportedModelError, with the reason, for models other than open_clip's ``VisionTransformer``."""
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(f"expected open_clip's VisionTransformer, got {type(model).__name__}{_why(model)}")
    replaced = [
        name
        for name in _RELIED_ON
        if name in vars(model) or getattr(type(model), name) is not getattr(VisionTransformer, name)
    ]
    transformer = model.transformer
    if type(transformer).forward is not Transformer.forward or "forward" in vars(transformer):
        replaced.append("transformer.forward")
    if replaced:
        raise UnsupportedModelError(
            f"{type(model).__name__} replaces {', '.join(replaced)} of open_clip's VisionTransformer, so what it "
            "computes is unknown"
        )


def _why(model: Any) -> str:
    """Why patches of another model of open_clip cannot be dropped."""
    name = type(model).__name__
    if name == "ModifiedResNet":
        return ": it is a convolutional network, and its attention pooling needs the full grid"
    if "Text" in name:
        return ": it has no patches"
    if getattr(model, "visual", None) is not None:
        return "; wrap the image tower in its place: model.visual = patchlife.wrap(model.visual)"
    return ". Image towers of timm (TimmModel) are wrapped by visual.trunk = patchlife.wrap(visual.trunk)"
