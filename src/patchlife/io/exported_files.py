"""Recognising exported files and bundles, without opening them in an engine."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, Literal

__all__ = ["BUNDLE", "exported_format", "is_exported"]

BUNDLE = "bundle.json"
"""Name of the file that marks a folder as a bundle of exported graphs."""


def exported_format(file: IO[bytes]) -> Literal["onnx", "openvino", "torch"]:
    """The format of an exported file by its content: a zip with an OpenVINO model, any other zip (torch), or ONNX."""
    if not zipfile.is_zipfile(file):
        return "onnx"
    with zipfile.ZipFile(file) as archive:
        return "openvino" if "model.xml" in archive.namelist() else "torch"


def is_exported(model: str | os.PathLike[str]) -> bool:
    """Whether a user's MODEL argument is an exported file or bundle; otherwise it is a name or an adapter."""
    return Path(model).is_file() or (Path(model) / BUNDLE).is_file()
