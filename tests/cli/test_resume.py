"""An interrupted run is continued without repeating or losing a photo, wherever it was cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import checkpoint, write_photos

import patchlife.runtime.inference as inference


@pytest.fixture(scope="module")
def finished(tmp_path_factory, vit_file):
    """A finished run on five photos, one of them bad: (command line, its file's content)."""
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
def test_killed_at_any_byte(data, finished, tmp_path, patchlife):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    assert patchlife(*line, "--out", out, "--resume").code == 1
    assert out.read_bytes() == whole


def test_a_finished_file_stays_as_it_is(finished, tmp_path, patchlife):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole)
    said = patchlife(*line, "--out", out, "--resume")
    assert said.code == 1
    assert "5 photos, 1 failed" in said.err
    assert out.read_bytes() == whole


def test_resume_may_be_the_beginning(finished, tmp_path, patchlife):
    line, whole = finished
    assert patchlife(*line, "--out", tmp_path / "out.jsonl", "--resume").code == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_failed_photo_is_tried_again_when_its_line_is_deleted(finished, tmp_path, patchlife, photos):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"".join(row for row in whole.splitlines(keepends=True) if b'"error"' not in row))
    assert patchlife(*line, "--out", out, "--resume").code == 1
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_other_settings_are_not_mixed_in(finished, tmp_path, patchlife):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[:-10])
    said = patchlife(*line, "--out", out, "--resume", "--budget", 0.5)
    assert said.code == 2
    assert "was begun with another model or other settings" in said.err
    other = checkpoint(tmp_path / "other.safetensors", seed=1)
    said = patchlife(*line, "--checkpoint", other, "--out", out, "--resume")
    assert said.code == 2
    assert "was begun with another model or other settings" in said.err


def test_another_kind_of_file_is_left_alone(finished, tmp_path, patchlife):
    line, _ = finished
    out = tmp_path / "precious.jpg"
    out.write_bytes(b"\xff\xd8\xff precious")
    said = patchlife(*line, "--out", out, "--resume")
    assert said.code == 2
    assert "line 1 of" in said.err
    assert "this is another kind of file" in said.err
    assert out.read_bytes() == b"\xff\xd8\xff precious"


def test_ctrl_c_loses_nothing(finished, tmp_path, patchlife, monkeypatch):
    line, whole = finished
    out = tmp_path / "out.jsonl"
    real = inference.predict_photos

    def interrupted(*args):
        for count, answer in enumerate(real(*args)):
            if count == 3:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patched:
        patched.setattr(inference, "predict_photos", interrupted)
        said = patchlife(*line, "--out", out)
    assert said.code == 130
    assert "3 of 5 photos are done; go on with --resume" in said.err
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    patchlife(*line, "--out", out, "--resume")
    assert out.read_bytes() == whole


def test_adaptive_runs_resume_to_the_same_results(finished, tmp_path, patchlife):
    line, _ = finished
    line = [*line, "--mode", "adaptive"]
    assert patchlife(*line, "--out", tmp_path / "whole.jsonl").code == 1
    whole = (tmp_path / "whole.jsonl").read_bytes()
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[: len(whole) // 2])
    patchlife(*line, "--out", out, "--resume")
    assert [json.loads(row) for row in out.read_bytes().splitlines()] == list(map(json.loads, whole.splitlines()))
