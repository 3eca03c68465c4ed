from __future__ import annotations

import pytest

from patchlife.errors import ConfigError
from patchlife.io.jsonl import encode, recover

RECORDS = [{"path": "a.jpg", "x": [1, 2]}, {"path": "Zürich\udce9\n.png", "error": "é"}, {"path": "b", "y": {}}]
LINES = [encode(record).encode("ascii") for record in RECORDS]
WHOLE = b"".join(LINES)


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_cut_anywhere_the_whole_lines_survive(cut, tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_bytes(WHOLE[:cut])
    kept = WHOLE[:cut].count(b"\n")
    assert recover(file, "path") == RECORDS[:kept]
    assert file.read_bytes() == b"".join(LINES[:kept])


@pytest.mark.parametrize("place", ["none", "/dev/zero"])
def test_no_file_is_an_empty_one(place, tmp_path):
    assert recover(tmp_path / place, "path") == []


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
def test_another_kind_of_file_is_left_alone(content, line, tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"line {line} of .* is no record that begins with 'path'"):
        recover(file, "path")
    assert file.read_bytes() == content
