"""Where the records of many photos go: standard output, a JSON lines file, or a table. Interrupted runs can continue.

A table (.parquet, .npy) cannot grow photo by photo. Until all photos are done, the records are in a JSON lines file
beside it, the journal; it is then converted to the table, which is complete or absent, and removed.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..extras import require
from ..io.files import replace_file
from ..io.jsonl import encode, read, recover
from ..io.table import Table

__all__ = ["KEY", "Record", "Results", "results_in"]

Record = dict[str, Any]
KEY = "path"
"""The first field of every record."""
LARGE = "embedding"
"""A field that is not kept in memory when a run is continued."""


class Results(ABC):
    """The records of a run.

    Attributes:
        out: the output file; None for standard output.
        files: the files that hold the records when the run has ended.
    """

    out: Path | None
    files: list[Path]

    @abstractmethod
    def earlier(self, resume: bool) -> list[Record]:
        """The records of an interrupted or finished run, without large fields.

        Raises ConfigError for another kind of file, and for existing files without ``resume``.
        """

    @abstractmethod
    def appending(self, sync_every: int) -> AbstractContextManager[Callable[[Record], None]]:
        """A function that writes one record and flushes it; every ``sync_every`` records reach the disk together."""

    @abstractmethod
    def finish(self, rows: int) -> None:
        """Complete the output, which has ``rows`` records."""

    def _check_absent(self) -> None:
        for path in self.files:
            if path.exists() and path.stat().st_size:
                raise ConfigError(f"{path} already exists; continue it with --resume, or choose another --out")


class JsonLines(Results):
    """Records as JSON lines, in a file or on standard output."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.files = out, [out] if out else []

    def earlier(self, resume: bool) -> list[Record]:
        """As in `Results`."""
        if self.out is not None and resume:
            return recover(self.out, KEY)
        self._check_absent()
        return []

    @contextmanager
    def appending(self, sync_every: int) -> Iterator[Callable[[Record], None]]:
        """As in `Results`. Records are not forced to the disk: the file may be a pipe or a device."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out, "a", encoding="ascii") if self.out else nullcontext(sys.stdout) as stream:

            def write(record: Record) -> None:
                stream.write(encode(record))
                stream.flush()

            yield write

    def finish(self, rows: int) -> None:
        """Do nothing: the file is complete."""


class TableFile(Results):
    """Records as a table, with a journal until the run ends.

    Attributes:
        journal: the JSON lines file to which records are appended.
        complete: whether the table has all records so far.
    """

    out: Path

    def __init__(self, out: Path, table: Table) -> None:
        self.out, self.table, self.files = out, table, table.files(out)
        self.journal = out.with_name(f"{out.name}.partial.jsonl")
        self.complete = False

    def earlier(self, resume: bool) -> list[Record]:
        """As in `Results`."""
        interrupted, finished = self.journal.exists(), self.out.exists()
        if interrupted and not resume:
            raise ConfigError(
                f"{self.journal} holds the results of an interrupted run; continue it with --resume, or delete it"
            )
        if not resume or not (interrupted or finished):
            self._check_absent()
            return []
        self.complete = not interrupted
        if interrupted:
            return recover(self.journal, KEY, without=LARGE)
        return [{name: record[name] for name in record if name != LARGE} for record in self.table.read(self.out)]

    @contextmanager
    def appending(self, sync_every: int) -> Iterator[Callable[[Record], None]]:
        """As in `Results`."""
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        if self.complete:  # photos were added to a finished run
            with replace_file(self.journal) as temporary, open(temporary, "w", encoding="ascii") as file:
                file.writelines(encode(record) for record in self.table.read(self.out))
            self.complete = False
        written = 0
        with open(self.journal, "a", encoding="ascii") as stream:

            def write(record: Record) -> None:
                nonlocal written
                written += 1
                stream.write(encode(record))
                stream.flush()
                if written % sync_every == 0:
                    os.fsync(stream.fileno())

            yield write

    def finish(self, rows: int) -> None:
        """Convert the journal to the table, and remove it."""
        if not self.complete:
            self.table.write(self.out, lambda: read(self.journal), rows)
            self.journal.unlink()


def results_in(out: Path | None, embeddings: bool = False) -> Results:
    """The results of a run that writes to ``out``; its suffix says how. None: JSON lines on standard output.

    Raises MissingExtraError if the format needs a package that is not installed.
    """
    if out is not None and out.suffix == ".parquet":
        require("pyarrow", "parquet", f"--out {out.name}")
        from ..io.parquet import EMBEDDINGS, PREDICTIONS

        return TableFile(out, EMBEDDINGS if embeddings else PREDICTIONS)
    if out is None or not embeddings:
        return JsonLines(out)
    from ..io.vectors import NPY

    return TableFile(out, NPY)
