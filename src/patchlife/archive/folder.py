"""The folder that the parts of a run are written to, on this machine or at an address of fsspec.

It holds ``_run.json``, which says what the run is, and the parts ``part-000000.jsonl``, ``part-000001.jsonl``, ... (or
``.parquet``): the records of consecutive photos. A part is complete or absent, so a run continues with the absent ones.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.addresses import file_system, named
from ..errors import ConfigError
from ..io.files import write_atomic
from ..io.jsonl import encode
from ..io.table import Table

__all__ = ["PartFolder", "Run", "photo_list_sum"]

Record = dict[str, Any]
RUN = "_run.json"  # readers of Parquet data sets skip files whose names begin with _
_LOCAL = ("file://", "local://")


@dataclass(frozen=True)
class Run:
    """What a run is. A run is continued only by an equal one.

    Attributes:
        run: identity of the model and the settings.
        photos: number of photos.
        list: SHA-256 of the list of photos, in its order.
        part_size: photos per part; the last part may have fewer.
    """

    run: str
    photos: int
    list: str
    part_size: int

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.photos // self.part_size)

    def photos_of(self, part: int) -> slice:
        """The photos of a part, as a slice of the list."""
        return slice(part * self.part_size, (part + 1) * self.part_size)


def photo_list_sum(photos: Iterable[object]) -> str:
    """SHA-256 of the names of photos, in their order."""
    digest = hashlib.sha256()
    for photo in photos:
        digest.update(encode({"path": str(photo)}).encode())
    return digest.hexdigest()


class PartFolder:
    """The folder of the parts.

    Attributes:
        place: path or address of the folder.
        table: the format of the parts; None for JSON lines.
    """

    def __init__(self, place: Path | str, table: Table | None) -> None:
        local = next((start for start in _LOCAL if str(place).startswith(start)), None)
        self.place: Path | str = Path(str(place)[len(local) :]) if local else place
        self.table = table
        self.suffix = ".parquet" if table else ".jsonl"

    @property
    def local(self) -> bool:
        """Whether it is a path, not an address."""
        return isinstance(self.place, Path)

    def write_part(self, part: int, content: bytes) -> None:
        """Write a part, complete or not at all."""
        self._write(self._name(part), content)

    def encoded(self, records: Sequence[Record]) -> bytes:
        """The content of a part. Equal records give equal bytes."""
        if self.table is None:
            return "".join(map(encode, records)).encode()
        with tempfile.TemporaryDirectory(prefix="patchlife-") as folder:
            path = Path(folder) / "part"
            self.table.write(path, lambda: iter(records), len(records))
            return path.read_bytes()

    def records_of(self, part: int) -> Iterator[Record]:
        """The records of a finished part. Raises ConfigError if it is damaged."""
        content = self._read(self._name(part))
        try:
            if self.table is None:
                if not content.endswith(b"\n"):
                    raise ValueError("its last line is incomplete")
                yield from map(json.loads, content.splitlines())
                return
            with tempfile.TemporaryDirectory(prefix="patchlife-") as folder:
                path = Path(folder) / "part"
                path.write_bytes(content)
                yield from self.table.read(path)
        except (ValueError, ConfigError) as error:
            raise ConfigError(
                f"{self.place}/{self._name(part)} is not a part of this run ({error}); delete it, and continue with "
                "--resume"
            ) from None

    def finished(self) -> set[int]:
        """The parts that are there."""
        start, found = "part-", set()
        for name in self._names():
            number = name.removeprefix(start).removesuffix(self.suffix)
            if name == f"{start}{number}{self.suffix}" and number.isdecimal():
                found.add(int(number))
        return found

    def earlier_run(self, resume: bool) -> Run | None:
        """The run that the folder belongs to, None for a new folder.

        Raises ConfigError for a folder that holds other files, and for a run without ``resume``.
        """
        names = [name for name in self._names() if not name.startswith(".")]
        if not names:
            return None
        if RUN not in names:
            raise ConfigError(f"{self.place} is not empty and holds no parts of patchlife; choose another --out")
        if not resume:
            raise ConfigError(f"{self.place} already exists; continue it with --resume, or choose another --out")
        try:
            run = Run(**json.loads(self._read(RUN)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.place}/{RUN} is damaged ({error}); choose another --out") from None
        if other := sorted(name for name in names if name.startswith("part-") and not name.endswith(self.suffix)):
            raise ConfigError(f"{self.place} holds parts of another format ({other[0]}); choose another --out")
        return run

    def begin(self, run: Run) -> None:
        """Create the folder and write what the run is."""
        if isinstance(self.place, Path):
            self.place.mkdir(parents=True, exist_ok=True)
        else:
            with suppress(Exception):  # object stores have no folders; others tell what is wrong when a file is written
                system, folder = file_system(self.place)
                system.makedirs(folder, exist_ok=True)
        self._write(RUN, (json.dumps(asdict(run)) + "\n").encode())

    def _name(self, part: int) -> str:
        return f"part-{part:06}{self.suffix}"

    def _write(self, name: str, content: bytes) -> None:
        if isinstance(self.place, Path):
            write_atomic(self.place / name, content)
        else:  # an object appears when all of its bytes are there
            with named(self.place, "written and read", ConfigError):
                system, folder = file_system(self.place)
                system.pipe_file(f"{folder.rstrip('/')}/{name}", content)

    def _read(self, name: str) -> bytes:
        if isinstance(self.place, Path):
            return (self.place / name).read_bytes()
        with named(self.place, "written and read", ConfigError):
            system, folder = file_system(self.place)
            content: bytes = system.cat_file(f"{folder.rstrip('/')}/{name}")
        return content

    def _names(self) -> list[str]:
        if isinstance(self.place, Path):
            if self.place.exists() and not self.place.is_dir():
                raise ConfigError(f"--ray writes a folder of parts, got the file {self.place}; choose another --out")
            return sorted(entry.name for entry in self.place.iterdir()) if self.place.is_dir() else []
        with named(self.place, "written and read", ConfigError):
            system, folder = file_system(self.place)
            system.invalidate_cache(folder)
            if not system.exists(folder):
                return []
            return sorted(path.rstrip("/").rpartition("/")[2] for path in system.ls(folder, detail=False))
