"""``patchlife predict --out x.parquet``: the same records as JSON lines, in a table."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small import NAME, write_photos


@pytest.fixture(scope="module")
def finished(tmp_path_factory, vit_file) -> tuple[list[str], Path, list[dict]]:
    """(command line, table, the same records as JSON lines) for five photos; one cannot be read."""
    from patchlife.cli.main import main

    folder = tmp_path_factory.mktemp("finished")
    photos = write_photos(folder / "photos", 5)
    photos[1].write_bytes(b"no photo")
    line = ["predict", NAME, "--checkpoint", str(vit_file), str(photos[0].parent), "--batch-size", "1", "--top", "2"]
    assert main([*line, "--out", str(folder / "p.parquet")]) == 1
    assert main([*line, "--out", str(folder / "p.jsonl")]) == 1
    records = [json.loads(text) for text in (folder / "p.jsonl").read_text().splitlines()]
    return line, folder / "p.parquet", records


def test_a_table_has_the_records_of_the_json_lines(finished):
    _, file, records = finished
    table = pq.read_table(file)
    assert table.column_names == ["path", "top", "flops", "fraction_of_dense", "kept", "error", "run"]
    rows = [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]
    assert rows == records
    assert len(records[0]["top"]) == 2


def test_an_interrupted_run_leaves_a_journal_and_continues(finished, tmp_path, patchlife, interrupted):
    line, file, records = finished
    out = tmp_path / "p.parquet"
    with interrupted():
        result = patchlife(*line, "--out", out)
    assert result.code == 130
    assert "3 of 5 photos are done; continue with --resume" in result.err
    journal = tmp_path / "p.parquet.partial.jsonl"
    assert [json.loads(text) for text in journal.read_text().splitlines()] == records[:3]
    assert patchlife(*line, "--out", out, "--resume").code == 1
    assert out.read_bytes() == file.read_bytes()
    assert not journal.exists()
    assert "5 photos, 1 failed" in patchlife(*line, "--out", out, "--resume").err
    assert out.read_bytes() == file.read_bytes()


def test_a_table_of_embeddings_is_not_continued_with_predictions(finished, tmp_path, patchlife):
    line, _, _ = finished
    out = tmp_path / "p.parquet"
    assert patchlife("embed", *line[1:-2], "--out", out).code == 1
    result = patchlife(*line, "--out", out, "--resume")
    assert result.code == 2
    assert "was started with another model or other settings" in result.err


def test_a_path_that_is_not_utf_8_is_written_with_escapes_and_done_once(patchlife, model, tmp_path):
    photo = write_photos(tmp_path / "photos", 1)[0]
    try:
        photo.rename(photo.with_name("caf\udce9.png"))
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    line = ["predict", *model, photo.parent, "--out", tmp_path / "p.parquet"]
    assert patchlife(*line).code == 0
    paths = pq.read_table(tmp_path / "p.parquet")["path"].to_pylist()
    assert paths == [f"{photo.parent}/caf\\xe9.png"]
    assert patchlife(*line, "--resume").code == 0
    assert pq.read_table(tmp_path / "p.parquet")["path"].to_pylist() == paths
