"""Photos that a Parquet table lists in its column ``path``."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ImageError
from ..extras import need
from .addresses import is_address, list_at, opened, photo_at
from .reading import Sample

__all__ = ["is_path_table", "photos_in_tables"]

_COLUMN = "path"


def is_path_table(argument: str) -> bool:
    """Whether an argument is a Parquet table, or a glob of some."""
    return argument.lower().endswith(".parquet")


def photos_in_tables(argument: str) -> list[Path | Sample]:
    """The photos that a table, a folder of tables or a glob of tables lists, in its order; tables are sorted.

    A path that is not absolute is relative to the folder of its table. Photos are not looked for before they are read.

    Raises ImageError if there is no such table, it cannot be read, or it lists no photo.
    """
    photos = [photo for table in _tables(argument) for photo in _photos_in(table)]
    if not photos:
        raise ImageError(f"{argument}: expected paths of photos, found no row; check the table")
    return photos


def _tables(argument: str) -> list[Path | str]:
    if is_address(argument):
        return [found for found in list_at(argument) if is_path_table(found)]
    path = Path(argument)
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    found = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
    if not found:
        raise ImageError(f"{argument}: expected a Parquet table, found no such file; check the path")
    return [*found]


def _photos_in(table: Path | str) -> Iterator[Path | Sample]:
    parquet = need("pyarrow.parquet", "a table of paths")
    folder = table.parent if isinstance(table, Path) else table.rpartition("/")[0]
    with opened(table) as stream:
        for path in _column(table, stream, parquet):
            if path is None:
                raise ImageError(f"{table}: expected a path in every row, found an empty one; remove the row")
            if is_address(path):
                yield photo_at(path)
            elif isinstance(folder, Path):
                yield folder / path
            else:
                yield Path(path) if path.startswith("/") else photo_at(f"{folder}/{path}")


def _column(table: Path | str, stream: Any, parquet: Any) -> Iterator[str | None]:
    try:
        file = parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        if _COLUMN not in names or str(file.schema_arrow.field(_COLUMN).type) not in ("string", "large_string"):
            raise ImageError(
                f"{table}: expected a text column {_COLUMN!r}, found the columns {', '.join(names)}; rename the column"
            )
        for batch in file.iter_batches(columns=[_COLUMN]):
            yield from batch.column(0).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are kinds of ValueError and OSError
        reason = str(error).partition("\n")[0]
        raise ImageError(f"{table}: expected a Parquet table, found {reason}; check the file") from error
