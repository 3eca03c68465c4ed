"""Optional dependencies. They are checked before any work is done; the error holds the install command."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .errors import MissingExtraError

__all__ = ["installed", "need", "require", "require_engine", "require_export"]

_EXTRA = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "nncf": "int8",
    "pyarrow": "parquet",
    "transformers": "transformers",
    "open_clip": "open_clip",
    "ray": "ray",
}
_WRITERS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_RUNNERS = {"onnx": "onnxruntime", "openvino": "openvino"}


def installed(package: str) -> bool:
    """Whether a package can be imported. The package is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(package: str, extra: str, what: str) -> None:
    """Raise MissingExtraError with the install command of ``extra`` unless ``package`` is installed.

    ``what`` names the feature that needs the package.
    """
    if not installed(package):
        raise MissingExtraError(package, extra, what)


def require_export(format: str, int8: bool = False, what: str = "") -> None:
    """Raise MissingExtraError unless the packages for exporting to ``format`` and verifying the file are installed."""
    what = what or f"export to {format}"
    extra = "onnx,openvino" if format == "openvino" else format
    for package in _WRITERS.get(format, ()):
        require(package, extra, what)
    if int8 and format == "openvino":
        require("nncf", "int8", "int8 for OpenVINO")


def require_engine(kind: str, what: str) -> None:
    """Raise MissingExtraError unless the engine for files of this kind is installed (onnx, openvino; else torch)."""
    if kind in _RUNNERS:
        require(_RUNNERS[kind], kind, what)


def need(module: str, what: str) -> Any:
    """Import and return ``module``. Raises MissingExtraError with the install command if it is not installed."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # a dependency of the package is missing
            raise
        raise MissingExtraError(package, _EXTRA[package], what) from None
