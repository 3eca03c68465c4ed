"""Packages that only some verbs need: looked for before any work is done, and asked for by name."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .errors import MissingExtraError

__all__ = ["installed", "need", "require", "require_engine", "require_export"]

_EXTRA = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino", "nncf": "int8"}
_WRITERS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_RUNNERS = {"onnx": "onnxruntime", "openvino": "openvino"}


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(package: str, extra: str, what: str) -> None:
    """Raise MissingExtraError, with the install line of ``extra``, unless ``package`` is there for ``what``."""
    if not installed(package):
        raise MissingExtraError(package, extra, what)


def require_export(format: str, int8: bool = False, what: str = "") -> None:
    """Raise MissingExtraError unless a model can be exported to ``format`` and compared there."""
    what = what or f"export to {format}"
    extra = "onnx,openvino" if format == "openvino" else format
    for package in _WRITERS.get(format, ()):
        require(package, extra, what)
    if int8 and format == "openvino":
        require("nncf", "int8", "int8 for OpenVINO")


def require_engine(kind: str, what: str) -> None:
    """Raise MissingExtraError unless a file of this kind (onnx, openvino; others run in torch) can be run."""
    if kind in _RUNNERS:
        require(_RUNNERS[kind], kind, what)


def need(module: str, what: str) -> Any:
    """Import ``module``. Raises MissingExtraError with the install line when its package is not there."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # its own dependency: not ours to explain
            raise
        raise MissingExtraError(package, _EXTRA[package], what) from None
