"""Opening an exported file or bundle."""

from __future__ import annotations

import io
from pathlib import Path

from ..errors import ConfigError
from ..io.exported_files import exported_format
from .bundle import Bundle
from .engine import Engine, open_file_session, read_verified
from .metadata import Metadata

__all__ = ["open_engine"]


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
    session = open_file_session(path, exported_format(io.BytesIO(content)), content, threads, trust=trust)
    metadata = Metadata.from_json(session.metadata_json, path)
    if budget is not None and abs(budget - metadata.budget) > 1e-9:
        raise ConfigError(
            f"{path} was exported at budget {metadata.budget:g}, got {budget:g}; export the model at that budget"
        )
    return Engine(session, metadata)
