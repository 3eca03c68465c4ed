"""Vision encoders inside larger models of transformers: where the encoder is, or why it is refused."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import nn

__all__ = ["reason_of", "tower_advice"]


def reason_of(name: str, refused: Mapping[str, str]) -> str:
    """Why models of the class ``name`` are refused; empty if ``refused`` (by beginnings of names) does not say it."""
    return next((reason for start, reason in refused.items() if name.startswith(start)), "")


def tower_advice(model: nn.Module, supported: Container[str], refused: Mapping[str, str]) -> str:
    """Error text for a model that holds a vision encoder: how to wrap the encoder, or why it is refused.

    Args:
        model: such as a vision-language model.
        supported: names of the classes of encoders that can be wrapped.
        refused: reasons, by the beginning of the name of a class.

    Returns:
        The text, or an empty one if no vision encoder is found.
    """
    holder, inner = type(model).__name__, [(path, type(part)) for path, part in model.named_modules() if path]
    for path, kind in inner:
        if any(base.__name__ in supported for base in kind.__mro__):
            return (
                f"expected a Vision Transformer, got a {holder} that holds one: wrap the vision encoder in its place: "
                f"model.{path} = patchlife.wrap(model.{path})"
            )
    for path, kind in inner:
        if _is_encoder(kind) and (reason := reason_of(kind.__name__, refused)):
            return f"the vision encoder of {holder}, model.{path}, is a {kind.__name__}; it is refused: {reason}"
    return ""


def _is_encoder(kind: Any) -> bool:
    return "Vision" in kind.__name__ and "PreTrainedModel" in (base.__name__ for base in kind.__mro__)
