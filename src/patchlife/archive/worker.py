"""A worker opens the model once and turns parts into records.

A photo may kill its worker: a decoder crashes, or the process needs more memory than there is. Ray then restarts the
worker and runs the part again. Before a worker begins a part it notes so in the journal, an actor that outlives it. A
part that has killed a worker is run with care: each photo alone, noted before and after. A photo that has killed
`TRIES` workers alone is given up: its record is an error. The part is then run as a whole again, without it, so the
records of the other photos are those of a run in which this photo cannot be read. A part whose worker was killed for
another reason takes this longer way, too, and gives the same records.
"""

from __future__ import annotations

import os
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..data import AnyPhoto, Sample
from ..errors import ImageError, PatchLifeError

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline

__all__ = ["TRIES", "Done", "Journal", "Part", "Work", "Worker"]

Record = dict[str, Any]

TRIES = 2
"""Number of workers that a photo alone may kill before it is given up."""

_WHOLE, _WITHOUT = "whole", "without the given up"


@dataclass(frozen=True)
class Part:
    """Consecutive photos.

    Attributes:
        number: of the part.
        photos: paths or samples.
    """

    number: int
    photos: tuple[AnyPhoto, ...]


@dataclass(frozen=True)
class Done:
    """What a worker returns for a part.

    Attributes:
        number: of the part.
        summaries: the fields of each record that `Work.summary` keeps.
        content: of the file; None if the worker has written it.
        failure: the message of an error that ends the run; empty if there is none.
    """

    number: int
    summaries: tuple[Record, ...] = ()
    content: bytes | None = None
    failure: str = ""


@dataclass(frozen=True)
class Work:
    """What the workers do. Functions are of modules that the workers can import.

    Attributes:
        folder: working folder of the command, to which paths are relative.
        opened: opens the model; raises ConfigError if it is not the one of the run.
        records: the records of photos, in their order.
        summary: the fields of a record that the command needs.
        encoded: the content of a file from its records.
        write: writes the file of a part; None if the command writes it.
    """

    folder: str
    opened: Callable[[], Pipeline]
    records: Callable[[Pipeline, Sequence[AnyPhoto]], Iterator[Record]]
    summary: Callable[[Record], Record]
    encoded: Callable[[Sequence[Record]], bytes]
    write: Callable[[int, bytes], None] | None = None


class Journal:
    """What has begun and not ended; an actor."""

    def __init__(self) -> None:
        self._begun: dict[int, Counter[object]] = defaultdict(Counter)
        self._ended: dict[int, set[object]] = defaultdict(set)

    def begin(self, part: int, what: object) -> int | None:
        """Note a beginning. Returns how many times it had begun before; None if it has ended."""
        if what in self._ended[part]:
            return None
        self._begun[part][what] += 1
        return self._begun[part][what] - 1

    def end(self, part: int, what: object) -> None:
        """Note an end."""
        self._ended[part].add(what)

    def forget(self, part: int) -> None:
        """Drop the notes of a part that is done."""
        self._begun.pop(part, None)
        self._ended.pop(part, None)


class Notes(Protocol):
    """What a worker needs of a `Journal`, which may be in another process."""

    def begin(self, part: int, what: object) -> int | None:
        """As in `Journal`."""

    def end(self, part: int, what: object) -> None:
        """As in `Journal`."""

    def forget(self, part: int) -> None:
        """As in `Journal`."""


@dataclass(frozen=True, slots=True)
class _GivenUp(Sample):
    """A photo that is not read again."""

    photo: AnyPhoto

    def __str__(self) -> str:
        return str(self.photo)

    @property
    def name(self) -> str:
        """The name of the photo."""
        return self.photo.name if isinstance(self.photo, Sample) else Path(self.photo).name

    @property
    def place(self) -> str:
        """The location of the photo."""
        return self.photo.place if isinstance(self.photo, Sample) else str(self.photo)

    @property
    def label(self) -> None:
        """None: it is not read."""
        return None

    def content(self, max_bytes: int) -> bytes:
        """Raise the error that is the record of this photo."""
        raise ImageError(
            f"{self}: expected a photo that can be read and run, found that it ended {TRIES} worker processes; check "
            "the file, and the memory of the workers"
        )


class Worker:
    """Turns parts into records."""

    def __init__(self, work: Work, notes: Notes) -> None:
        self.work, self.notes, self.failure = work, notes, ""
        self.elsewhere = False
        try:
            os.chdir(work.folder)
        except OSError:
            self.elsewhere = True
        try:
            self.pipeline = work.opened()
        except (PatchLifeError, OSError) as error:
            self.failure = f"the model cannot be opened on machine {platform.node()}: {error}"

    def done(self, part: Part) -> Done:
        """Compute a part; write it if the command does not."""
        if failure := self.failure or self._without_folder(part):
            return Done(part.number, failure=failure)
        records = self._records(part)
        summaries = tuple(map(self.work.summary, records))
        content: bytes | None = self.work.encoded(records)
        if self.work.write is not None and content is not None:
            try:
                self.work.write(part.number, content)
            except (PatchLifeError, OSError) as error:
                return Done(part.number, failure=f"part {part.number} cannot be written: {error}")
            content = None
        self.notes.forget(part.number)
        return Done(part.number, summaries, content)

    def _without_folder(self, part: Part) -> str:
        """What is wrong if paths are relative to a folder that is not on this machine; empty if nothing is."""
        if not self.elsewhere or all("://" in str(p) or Path(str(p)).is_absolute() for p in part.photos):
            return ""
        return (
            f"machine {platform.node()} has no folder {self.work.folder}, to which paths of photos are relative; give "
            "absolute paths or addresses, or share the folder"
        )

    def _records(self, part: Part) -> list[Record]:
        if not self.notes.begin(part.number, _WHOLE):
            return self._run(part.photos)
        photos = [self._tried(part.number, row, photo) for row, photo in enumerate(part.photos)]
        if (self.notes.begin(part.number, _WITHOUT) or 0) < TRIES:
            return self._run(photos)
        return [record for photo in photos for record in self._run([photo])]  # together they need too much memory

    def _tried(self, part: int, row: int, photo: AnyPhoto) -> AnyPhoto:
        """The photo if a worker survives it; else what stands for it."""
        begun = self.notes.begin(part, row)
        if begun is None:
            return photo
        if begun >= TRIES:
            return _GivenUp(photo)
        self._run([photo])
        self.notes.end(part, row)
        return photo

    def _run(self, photos: Sequence[AnyPhoto]) -> list[Record]:
        return list(self.work.records(self.pipeline, photos))
