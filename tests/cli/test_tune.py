"""``patchlife tune`` writes an adapter with shapes for each budget, on a plain model and on an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small
import torch
from families import built

from patchlife import LifeConfig, Shape, wrap
from patchlife.cli.main import main
from patchlife.cli.tune import _calibrate_missing


def test_a_plain_model_and_an_adapter_are_tuned(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small.write_photos(tmp_path / "photos", 4)
    photos, plain, tuned = (str(tmp_path / name) for name in ("photos", "plain", "tuned"))
    assert main(["tune", "demo", photos, "--out", plain, "--budgets", "0.5,0.8", "--photos", "3"]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["budget", "0.5", "0.8"]
    manifest = json.loads(Path(plain, "adapter.json").read_text())
    assert manifest["tuning"]["photos"] == 3
    assert manifest["scorer"]["kind"] == "life-regressors", "the scorer of the adapter stays"
    assert [row["budget"] for row in manifest["tuning"]["rows"]] == [0.5, 0.8]
    shapes = manifest["config"]["shapes"]
    assert shapes[-1]["budget"] == 1.0
    again = [
        "tune",
        "demo",
        photos,
        "--out",
        tuned,
        "--budgets",
        "0.5",
        "--start",
        "1",
    ]  # no scorer
    assert main([*again, "--scorer", "rule"]) == 0
    assert json.loads(Path(tuned, "adapter.json").read_text())["scorer"]["kind"].startswith("attention")
    assert main(again) == 0
    scorer = json.loads(Path(tuned, "adapter.json").read_text())["scorer"]
    assert scorer["kind"] == "life-regressors"
    assert scorer["settings"]["starts"] == sorted({shape["drops"][0] for shape in _shapes(tuned)})


def _shapes(adapter: str) -> list[dict]:
    return json.loads(Path(adapter, "adapter.json").read_text())["config"]["shapes"]


def test_no_readable_photo_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bad.png").write_bytes(b"no photo")
    assert main(["tune", "demo", str(tmp_path / "bad.png"), "--out", str(tmp_path / "out")]) == 2
    assert "none of the 1 photos could be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_budgets_that_were_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small.write_photos(tmp_path / "photos", 2)
    options = ["--out", str(tmp_path / "out"), "--budgets", "0.05,0.8,1"]
    assert main(["tune", "demo", str(tmp_path / "photos"), *options]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["budget", "0.8"]
    assert "no shape was searched for budget 0.05: out of reach" in printed.err


def test_thresholds_that_an_adapter_has_are_kept() -> None:
    model = wrap(built("vit"), LifeConfig(0.8, start=2)).calibrate([torch.randn(3, 3, 48, 48)])
    ((key, earlier),) = model.calibrations.items()
    model.use_shapes((Shape(0.75, (1,)), Shape(1.0, (2,))))
    others = [torch.randn(5, 3, 48, 48)]
    assert _calibrate_missing(model, others) == [1]
    assert model.calibrations[key] is earlier
    assert {(start, found.images) for (_, start), found in model.calibrations.items()} == {(1, 5), (2, 3)}
    assert _calibrate_missing(model, others) == []
