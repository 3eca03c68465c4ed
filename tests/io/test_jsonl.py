from __future__ import annotations

import pytest

from patchlife.errors import ConfigError
from patchlife.io.jsonl import encode, read, recover

RECORDS = [{"path": "a.jpg", "x": [1, 2]}, {"path": "Zürich\udce9\n.png", "error": "é"}, {"path": "b", "y": {}}]
LINES = [encode(record).encode("ascii") for record in RECORDS]
WHOLE = b"".join(LINES)


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_a_file_cut_anywhere_keeps_its_complete_lines(cut, tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_bytes(WHOLE[:cut])
    kept = WHOLE[:cut].count(b"\n")
    assert recover(file, "path") == RECORDS[:kept]
    assert file.read_bytes() == b"".join(LINES[:kept])


def test_a_large_field_is_left_out_and_stays_in_the_file(tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_bytes(WHOLE)
    assert recover(file, "path", without="error") == [RECORDS[0], {"path": RECORDS[1]["path"]}, RECORDS[2]]
    assert list(read(file)) == RECORDS


@pytest.mark.parametrize("path", ["none", "/dev/zero"])
def test_a_missing_file_counts_as_empty(path, tmp_path):
    assert recover(tmp_path / path, "path") == []


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xff\xd8\xff\xe0 a photo", 1),
        (b'{"name": "a"}\n', 1),
        (LINES[0] + b"[1, 2]\n", 2),
        (LINES[0] + b"{}\n", 2),
        (LINES[0] + b'"path"\n', 2),
        (LINES[0] + b"\n", 2),
        (LINES[0] + b"notes", 2),
        (LINES[0] + b'{"path": "half\n' + LINES[2], 2),
    ],
)
def test_another_kind_of_file_is_refused_unchanged(content, line, tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"line {line} of .* is not a record that begins with 'path'"):
        recover(file, "path")
    assert file.read_bytes() == content
