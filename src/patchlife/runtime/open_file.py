"""Opening an exported file or bundle."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO

from ..errors import ConfigError
from .bundle import Bundle
from .engine import Engine, open_file_session, read_verified
from .metadata import Format, Metadata

__all__ = ["format_of", "open_engine"]


def open_engine(
    file: str | Path, threads: int | None = None, budget: float | None = None, trust: bool = False
) -> Engine:
    """The engine for an exported file, or for one graph of a bundle. Checksums are verified first.

    Args:
        file: a file or bundle that `export` or `export_bundle` wrote.
        threads: CPU threads; torch's number of threads if not given.
        budget: selects the graph of a bundle; a single file must have this budget.
        trust: also open a .pt2 file. Opening one can run any code, and the checksum does not prevent this.

    Raises:
        ExportError: the file is damaged, was not exported by patchlife or by a version with another format, or is a
            .pt2 file without ``trust``.
        MissingExtraError: the engine is not installed; the message is the install line.
        ConfigError: there is no graph of this budget.
    """
    path = Path(file)
    if path.is_dir():
        return Bundle(path, threads).engine(budget)
    content = read_verified(path)
    session = open_file_session(path, _kind(io.BytesIO(content)), content, threads, trust=trust)
    metadata = Metadata.from_json(session.metadata_json, path)
    if budget is not None and abs(budget - metadata.budget) > 1e-9:
        raise ConfigError(f"{path} holds one budget, {metadata.budget:g}, got {budget:g}; export it again")
    return Engine(session, metadata)


def format_of(path: Path) -> Format:
    """The format of an exported file or bundle.

    The format of a bundle is read from its verified metadata. The format of a file, which is not verified here, follows
    from its content, not its name: a zip with an OpenVINO model, any other zip (torch), or else ONNX.
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
