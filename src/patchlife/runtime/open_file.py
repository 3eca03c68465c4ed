"""Opening what was exported: a file, or a bundle of several budgets."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO

from ..errors import ConfigError
from .bundle import Bundle
from .engine import Engine, opened, verified
from .metadata import Format, Metadata

__all__ = ["format_of", "open_engine"]


def open_engine(
    file: str | Path, threads: int | None = None, budget: float | None = None, trust: bool = False
) -> Engine:
    """The engine for an exported file, or for one graph of a package, after checksums were verified.

    Args:
        file: as `export` or `export_bundle` wrote it.
        threads: CPU threads; as many as torch uses if not given.
        budget: which graph of a package; a file fails unless it is of this budget.
        trust: open a .pt2 file, too. It can run any code when it is opened, and no checksum tells whether it does.

    Raises:
        ExportError: damaged, not exported by patchlife, or by a newer one; a .pt2 file that is not trusted.
        MissingExtraError: the engine is not installed; the message is the install line.
        ConfigError: there is no graph of this budget.
    """
    path = Path(file)
    if path.is_dir():
        return Bundle(path, threads).engine(budget)
    content = verified(path)
    session = opened(path, _kind(io.BytesIO(content)), content, threads, trust=trust)
    metadata = Metadata.from_json(session.description, path)
    if budget is not None and abs(budget - metadata.budget) > 1e-9:
        raise ConfigError(f"{path} holds one budget, {metadata.budget:g}, got {budget:g}; export it again")
    return Engine(session, metadata)


def format_of(path: Path) -> Format:
    """What an exported file or package is made for.

    A package, which is verified, says so itself. A file, which is not verified, is known by its content, not its name:
    a zip with an OpenVINO model, a zip of torch's, or else ONNX.
    """
    if path.is_dir():
        return Bundle(path).kind
    with open(path, "rb") as file:
        return _kind(file)


def _kind(file: IO[bytes]) -> Format:
    if not zipfile.is_zipfile(file):
        return "onnx"
    with zipfile.ZipFile(file) as archive:
        return "openvino" if "model.xml" in archive.namelist() else "torch"
