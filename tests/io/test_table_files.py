"""Records survive a table: numbers exactly, in parts larger than a row group, with missing fields."""

from __future__ import annotations

import numpy as np
import pytest

from patchlife.errors import ConfigError
from patchlife.io.parquet import EMBEDDINGS, PREDICTIONS
from patchlife.io.vectors import NPY, packed, unpacked

COST = {"flops": 2**40, "fraction_of_dense": 0.1}


def records(count: int, width: int = 3) -> list[dict]:
    """Every third record is an error; the first one, too."""
    draw = np.random.default_rng(0)
    good = [
        {"path": f"{i}.jpg", "embedding": packed(draw.normal(size=width)), **COST, "run": "0"} for i in range(count)
    ]
    return [{"path": r["path"], "error": "é", "run": "0"} if i % 3 == 0 else r for i, r in enumerate(good)]


def test_a_vector_is_packed_as_32_bit_floats():
    vector = np.array([1.5, -np.pi, np.inf, 1e-42], np.float32)
    assert unpacked(packed(vector)).tobytes() == vector.tobytes()
    assert unpacked(packed(vector[::2])).tolist() == [1.5, np.inf]  # not contiguous


@pytest.mark.parametrize(("table", "name"), [(EMBEDDINGS, "e.parquet"), (NPY, "e.npy")])
@pytest.mark.parametrize("count", [1, 2, 5000])
def test_embeddings_are_read_back_as_they_were_written(table, name, count, tmp_path):
    rows = records(count)
    table.write(tmp_path / name, lambda: iter(rows), count)
    assert list(table.read(tmp_path / name)) == records(count)


def test_predictions_are_read_back_as_they_were_written(tmp_path):
    top = [{"class": 3, "label": "café", "probability": 0.1 + 0.2}]
    rows = [{"path": "a", "top": top, **COST, "kept": [9, 4], "run": "0"}, {"path": "b", "error": "x", "run": "0"}]
    PREDICTIONS.write(tmp_path / "p.parquet", lambda: iter([dict(row) for row in rows]), 2)
    assert list(PREDICTIONS.read(tmp_path / "p.parquet")) == rows


@pytest.mark.parametrize(("table", "name"), [(EMBEDDINGS, "e.parquet"), (NPY, "e.npy")])
@pytest.mark.parametrize("content", [b"", b"mine", b"\x93NUMPY\x01\x00"])
def test_another_kind_of_file_is_refused(table, name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"not a result of patchlife .* not changed, choose another file"):
        list(table.read(tmp_path / name))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    out = tmp_path / "e.npy"
    NPY.write(out, lambda: iter(records(2)), 2)
    before = out.read_bytes()

    def broken():
        yield from records(2)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        NPY.write(out, broken, 3)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.jsonl", "e.npy"]
