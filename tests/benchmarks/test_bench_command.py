"""``patchlife bench`` from end to end, on a small timm model."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import checkpoint, write_photos
from test_result import a_result

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.benchmarks import fastest_within_drop
from patchlife.benchmarks.result import Result
from patchlife.cli import main as cli
from patchlife.config import BenchConfig, ModelConfig
from patchlife.errors import ConfigError
from patchlife.runtime.opening import open_pipeline
from patchlife.slimming.regressor import LifeRegressor

TINY = ["test_vit", "--batch-sizes", "1", "--flops", "0.7", "--rounds", "5", "--device", "cpu"]


def test_speed_of_a_timm_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = "no-decision-bound,tome,ours-fixed"
    assert cli.main(["bench", *TINY, "--methods", methods, "--advice", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.glob("bench-test_vit-eager-*.json")
    result = Result.load(path)
    assert [r.method for r in result.speed] == ["dense", "no-decision-bound", "tome", "ours-fixed"]
    assert result.complete
    assert result.weights == "random"
    assert result.conditions["threads"]
    assert "Advice, batch 1" in shown
    assert path.with_suffix(".html").exists()
    assert path.with_suffix(".png").exists()


def test_advice_within_a_drop_of_top1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every schedule is made to pay, so that all are evaluated on any machine."""
    monkeypatch.setattr(fastest_within_drop, "pays", lambda ratio: True)
    weights = checkpoint(tmp_path / "vit.safetensors")
    write_photos(tmp_path / "photos" / "0", 3)
    write_photos(tmp_path / "photos" / "1", 3)
    options = [*TINY, "--checkpoint", str(weights), "--methods", "ours-fixed", "--data", str(tmp_path / "photos")]
    assert cli.main(["bench", *options, "--advice", "--max-drop", "100", "--out", str(tmp_path / "out")]) == 0
    assert "Advice, batch 1, at most 100 points of top-1 lost: start" in capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("*.json")
    (entry,) = Result.load(path).within_max_drop
    assert entry["chosen"] in entry["candidates"]
    assert {row["accuracy"]["photos"] for row in entry["candidates"]} == {6}


def test_accuracy_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = checkpoint(tmp_path / "vit.safetensors")
    write_photos(tmp_path / "photos" / "0", 3)
    options = ["--checkpoint", str(weights), "--methods", "ours-fixed,tome", "--data", str(tmp_path / "photos")]
    assert cli.main(["bench", *TINY, *options, "--no-speed", "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    result = Result.load(path)
    assert result.complete
    assert not result.speed
    assert {(row.method, row.photos) for row in result.accuracy} == {("dense", 3), ("ours-fixed", 3), ("tome", 3)}
    assert "top-1 on 3 photos" in capsys.readouterr().out
    assert path.with_suffix(".png").exists()


def test_advice_for_an_adapter_uses_the_scorer_of_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest_within_drop, "pays", lambda ratio: True)
    weights = checkpoint(tmp_path / "vit.safetensors")
    write_photos(tmp_path / "photos" / "0", 2)
    plain = open_pipeline(ModelConfig("test_vit", weights)).model
    scorer = LifeRegressor(plain.backbone.dim, plain.backbone.prefix, 8, 4)
    model = SlimModel(plain.backbone, LifeConfig(0.8, start=2, drops=(2, 4)), scorer)
    model.origin = plain.origin
    adapter = patchlife.save(model, tmp_path / "adapter")
    options = ["--methods", "ours-learned-fixed", "--data", str(tmp_path / "photos"), "--advice"]
    assert cli.main(["bench", str(adapter), *TINY[1:], *options, "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    (entry,) = Result.load(path).within_max_drop
    assert {row["start"] for row in entry["candidates"]} == {2}, "a learned scorer works at its own start block only"
    assert entry["candidates"][0]["drops"] == [2, 4]


def test_a_report_is_drawn_from_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = a_result().save(tmp_path / "old.json")
    before = path.read_bytes()
    assert cli.main(["bench", "--report", str(path), str(path), "--out", str(tmp_path / "out")]) == 0
    assert "ToMe (77.0 %) is ahead of ours" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "got neither"),
        (["test_vit", "--flops", "60"], "did you mean 0.6"),
        (["test_vit", "--methods", "limit"], "--methods must be of dense, no-decision-bound"),
        (["test_vit", "--methods", "evil"], "got evil"),
        (["test_vit", "--data", "."], "got random weights; add --checkpoint FILE or --pretrained"),
        (
            ["test_vit", "--engine", "onnx", "--dtype", "bfloat16"],
            "--engine onnx runs float32 on the CPU, got bfloat16",
        ),
        (["test_vit", "--engine", "openvino", "--device", "cuda"], "got float32 on cuda; drop --dtype and --device"),
        ([__file__], "is an exported model"),
        (["--report", "nowhere.json"], "nowhere.json is not a result file"),
        (["test_vit", "--no-speed"], "--no-speed measures accuracy only, which needs labelled photos"),
    ],
)
def test_invalid_options_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least 5"):
        BenchConfig("a", rounds=1)
    with pytest.raises(ConfigError, match=r"max_drop must be .* 0 to 100, got -1"):
        BenchConfig("a", max_drop=-1)
    with pytest.raises(ConfigError, match="at least 1"):
        BenchConfig("a", batch_sizes=(0,))
