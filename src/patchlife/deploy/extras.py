"""Packages that only deployment needs: imported when they are used, and asked for by name when they are not there."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingExtraError

__all__ = ["need", "need_for_export", "need_for_run"]

_EXTRA = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "nncf": "int8",
}
_RUNS = {"onnx": "onnxruntime", "openvino": "openvino"}
"""What runs a format; torch needs nothing."""


def need(module: str, what: str) -> Any:
    """Import ``module``. Raises MissingExtraError with the install line when its package is not there."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # its own dependency: not ours to explain
            raise
        raise MissingExtraError(package, _EXTRA[package], what) from None


def need_for_run(format: str | None) -> None:
    """Ask for what runs an exported file of this format. Raises MissingExtraError with the install line."""
    if format in _RUNS:
        need(_RUNS[format], f"running {format} files")


def need_for_export(format: str | None, int8: bool = False) -> None:
    """Ask for all that export to this format takes, before any work; formats and engines that need nothing are fine.

    Raises MissingExtraError with the install line.
    """
    if format in _RUNS:
        for module in ("onnx", "onnxscript", _RUNS[format]):
            need(module, f"export to {format}")
        if int8 and format == "openvino":
            need("nncf", "int8 for OpenVINO")
