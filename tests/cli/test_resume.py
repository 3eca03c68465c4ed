"""An interrupted run can be resumed at any byte, without repeating or losing a photo."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import checkpoint, write_photos


@pytest.fixture(scope="module")
def finished(tmp_path_factory, vit_file):
    """(command line, content of its output file) of a finished run on five photos, one of which cannot be read."""
    from patchlife.cli.main import main

    folder = tmp_path_factory.mktemp("finished")
    photos = write_photos(folder / "photos", 5)
    photos[1].write_bytes(b"no photo")
    line = ["predict", "test_vit", "--checkpoint", str(vit_file), str(photos[0].parent), "--batch-size", "1"]
    line += ["--top", "1"]
    assert main([*line, "--out", str(folder / "whole.jsonl")]) == 1
    return line, (folder / "whole.jsonl").read_bytes()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_at_any_byte_is_completed(data, finished, tmp_path, patchlife):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    assert patchlife(*line, "--out", out, "--resume").code == 1
    assert out.read_bytes() == whole


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path, patchlife):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole)
    result = patchlife(*line, "--out", out, "--resume")
    assert result.code == 1
    assert "5 photos, 1 failed" in result.err
    assert out.read_bytes() == whole


def test_resume_without_a_file_starts_a_run(finished, tmp_path, patchlife):
    line, whole = finished
    assert patchlife(*line, "--out", tmp_path / "out.jsonl", "--resume").code == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_failed_photo_is_run_again_if_its_line_is_deleted(finished, tmp_path, patchlife, photos):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"".join(row for row in whole.splitlines(keepends=True) if b'"error"' not in row))
    assert patchlife(*line, "--out", out, "--resume").code == 1
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_resuming_with_other_settings_is_refused(finished, tmp_path, patchlife):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[:-10])
    result = patchlife(*line, "--out", out, "--resume", "--budget", 0.5)
    assert result.code == 2
    assert "was started with another model or other settings" in result.err
    other = checkpoint(tmp_path / "other.safetensors", seed=1)
    result = patchlife(*line, "--checkpoint", other, "--out", out, "--resume")
    assert result.code == 2
    assert "was started with another model or other settings" in result.err


def test_resuming_another_kind_of_file_is_refused(finished, tmp_path, patchlife):
    line, _ = finished
    out = tmp_path / "precious.jpg"
    out.write_bytes(b"\xff\xd8\xff precious")
    result = patchlife(*line, "--out", out, "--resume")
    assert result.code == 2
    assert "line 1 of" in result.err
    assert "this is another kind of file; it was not changed" in result.err
    assert out.read_bytes() == b"\xff\xd8\xff precious"


def test_ctrl_c_keeps_all_records(finished, tmp_path, patchlife, interrupted):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    with interrupted():
        result = patchlife(*line, "--out", out)
    assert result.code == 130
    assert "3 of 5 photos are done; continue with --resume" in result.err
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    patchlife(*line, "--out", out, "--resume")
    assert out.read_bytes() == whole


def test_a_resumed_adaptive_run_gives_the_same_records(finished, tmp_path, patchlife):
    line, _ = finished
    line = [*line, "--mode", "adaptive"]
    assert patchlife(*line, "--out", tmp_path / "whole.jsonl").code == 1
    whole = (tmp_path / "whole.jsonl").read_bytes()
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[: len(whole) // 2])
    patchlife(*line, "--out", out, "--resume")
    assert [json.loads(row) for row in out.read_bytes().splitlines()] == list(map(json.loads, whole.splitlines()))
