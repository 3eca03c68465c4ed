"""Records of photos as a Parquet file, written and read in parts, so that a large file is never in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..extras import need
from .files import replace_file
from .jsonl import printable
from .table import Table
from .vectors import VECTOR, packed, unpacked

__all__ = ["EMBEDDINGS", "PREDICTIONS"]

Record = dict[str, Any]
_ROWS = 4096  # in memory at a time, and in a row group of the file
_WHAT = "a .parquet file"


def _write_predictions(path: Path, records: Callable[[], Iterator[Record]], _: int) -> None:
    """Write a column for each field; it is null where a record lacks the field."""
    pa = need("pyarrow", _WHAT)
    top = pa.struct([("class", pa.int32()), ("label", pa.string()), ("probability", pa.float64())])
    _write(path, records(), [("top", pa.list_(top)), *_cost(pa), ("kept", pa.list_(pa.int32())), *_outcome(pa)])


def _write_embeddings(path: Path, records: Callable[[], Iterator[Record]], _: int) -> None:
    """Write packed vectors as lists, null for a photo that failed (before pyarrow 26 not possible in fixed sizes)."""
    pa = need("pyarrow", _WHAT)
    vectors = pa.list_(pa.float32())
    unpacked_records = (r | {VECTOR: unpacked(r[VECTOR])} if VECTOR in r else r for r in records())
    _write(path, unpacked_records, [(VECTOR, vectors), *_cost(pa), *_outcome(pa)])


def _read(path: Path) -> Iterator[Record]:
    """The records of a file one at a time; a field that is null is left out.

    Raises ConfigError for another kind of file.
    """
    for batch in _opened(path).iter_batches(_ROWS):
        vectors = batch.column(VECTOR) if VECTOR in batch.schema.names else None
        plain = batch.drop_columns([VECTOR]) if vectors is not None else batch
        for row, record in enumerate(plain.to_pylist()):
            found = {name: value for name, value in record.items() if value is not None}
            if vectors is not None and vectors[row].is_valid:
                found[VECTOR] = packed(vectors[row].values.to_numpy())
            yield found


def _cost(pa: Any) -> list[tuple[str, Any]]:
    return [("flops", pa.int64()), ("fraction_of_dense", pa.float64())]


def _outcome(pa: Any) -> list[tuple[str, Any]]:
    return [("error", pa.string()), ("run", pa.string())]


def _write(path: Path, records: Iterable[Record], columns: list[tuple[str, Any]]) -> None:
    pa, parquet = need("pyarrow", _WHAT), need("pyarrow.parquet", _WHAT)
    schema = pa.schema([("path", pa.string()), *columns])
    with replace_file(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for rows in _parts(records):
            for row in rows:
                row["path"] = printable(row["path"])
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))


def _parts(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while rows := list(islice(iterator, _ROWS)):
        yield rows


def _opened(path: Path) -> Any:
    pa, parquet = need("pyarrow", _WHAT), need("pyarrow.parquet", _WHAT)
    try:
        file = parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise _another_kind(path, str(error).partition("\n")[0]) from None
    if not {"path", "error", "run"} <= set(file.schema_arrow.names):
        raise _another_kind(path, f"its columns are {', '.join(file.schema_arrow.names)}")
    return file


def _another_kind(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} is not a result of patchlife ({reason}); it was not changed, choose another file")


PREDICTIONS = Table(_write_predictions, _read)
"""Records of `patchlife predict`."""

EMBEDDINGS = Table(_write_embeddings, _read)
"""Records of `patchlife embed`, with packed vectors."""
