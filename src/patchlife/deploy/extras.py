"""Packages that only deployment needs: imported when they are used, and asked for by name when they are not there."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingExtraError

__all__ = ["need"]

_EXTRA = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "nncf": "int8",
}


def need(module: str, what: str) -> Any:
    """Import ``module``. Raises MissingExtraError with the install line when its package is not there."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # its own dependency: not ours to explain
            raise
        raise MissingExtraError(package, _EXTRA[package], what) from None
