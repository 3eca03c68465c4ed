"""Vectors of numbers as text in JSON lines, and as rows of a .npy file with a JSON lines file beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ..errors import ConfigError
from .files import replace_file
from .jsonl import encode, read
from .table import Table

__all__ = ["NPY", "VECTOR", "packed", "unpacked", "width_of"]

Record = dict[str, Any]
_FORMAT = "<f4"  # little-endian 32-bit floats

VECTOR = "embedding"
"""Name of the field that holds the vector; it is absent in the record of a photo that failed."""


def packed(vector: Float[np.ndarray, "width"]) -> str:
    """The vector as text: base64 of little-endian 32-bit floats."""
    return base64.b64encode(np.ascontiguousarray(vector, _FORMAT).tobytes()).decode("ascii")


def unpacked(text: str) -> Float[np.ndarray, "width"]:
    """The inverse of `packed`."""
    return np.frombuffer(base64.b64decode(text), _FORMAT)


def width_of(records: Iterable[Record]) -> int:
    """Length of the vectors; 0 if no record has one. Reads records up to the first that has one."""
    return next((len(unpacked(record[VECTOR])) for record in records if VECTOR in record), 0)


def _sidecar(path: Path) -> Path:
    """The JSON lines file beside a .npy file: a record for each row, in the same order, without the vector."""
    return path.with_suffix(".jsonl")


def _write(path: Path, records: Callable[[], Iterator[Record]], rows: int) -> None:
    """Write the vectors of ``records`` to a .npy file, and the records without vectors to its sidecar.

    A row of a record without a vector is NaN. The sidecar is written first, so a .npy file always has one.
    """
    with replace_file(_sidecar(path)) as temporary, open(temporary, "w", encoding="ascii") as file:
        for record in records():
            file.write(encode({name: value for name, value in record.items() if name != VECTOR}))
    shape = (rows, width_of(records()))
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": _FORMAT, "fortran_order": False, "shape": shape})
        missing = np.full(shape[1], np.nan, _FORMAT).tobytes()
        for record in records():
            file.write(base64.b64decode(record[VECTOR]) if VECTOR in record else missing)


def _read(path: Path) -> Iterator[Record]:
    """The records, one at a time.

    Raises ConfigError for another kind of file.
    """
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        records = read(_sidecar(path))
        for row, record in enumerate(records):
            yield record if "error" in record else record | {VECTOR: packed(vectors[row])}
    except (OSError, EOFError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{path} and {_sidecar(path).name} are not a result of patchlife embed ({error}); they were not changed, "
            "choose another file"
        ) from None


NPY = Table(_write, _read, lambda path: [path, _sidecar(path)])
"""Records of `patchlife embed`, with packed vectors: a .npy file with a row per record, and a JSON lines file."""
