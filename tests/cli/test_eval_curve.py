"""``patchlife eval --curve``: accuracy and KL divergence against the budget, with the points of other results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file
from small import NAME, weights, write_photos

from patchlife.cli.eval_curve import read_points, within_reach
from patchlife.config import CURVE_BUDGETS, EvalConfig, ModelConfig
from patchlife.errors import ConfigError

CPU = ["--device", "cpu"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Photos of two classes of the small model."""
    for name in ("0", "1"):
        write_photos(tmp_path / "photos" / name, 4, first=10 * int(name))
    return tmp_path / "photos"


def scores_of(path: Path) -> dict[float, dict[str, object]]:
    """The scores by budget, without the throughput, which differs from run to run."""
    scores = json.loads(path.read_text())["scores"]
    return {score["budget"]: {key: value for key, value in score.items() if key != "photos_per_s"} for score in scores}


def test_the_points_of_a_curve_equal_separate_runs(patchlife, model, data: Path, tmp_path: Path) -> None:
    page, whole = tmp_path / "curve.html", tmp_path / "whole.json"
    run = patchlife("eval", *model, data, *CPU, "--curve", page, "--out", whole)
    assert run.code == 0, run.err
    curve = scores_of(whole)
    assert set(curve) <= set(CURVE_BUDGETS)
    assert len(curve) >= 7
    assert (curve[1.0]["agreement"], curve[1.0]["divergence"]) == (1, pytest.approx(0, abs=1e-9))
    assert curve[0.45]["divergence"] > 1e-3
    for budget in (0.45, 0.8):
        alone = tmp_path / f"{budget}.json"
        assert patchlife("eval", *model, data, *CPU, "--budgets", budget, "--out", alone).code == 0
        assert scores_of(alone) == {budget: curve[budget]}
        assert f">{curve[budget]['divergence']:.4f}</td>" in page.read_text()
    assert whole.with_suffix(".png").exists()


def test_budgets_out_of_reach_are_left_out_and_named(patchlife, model, data: Path, tmp_path: Path) -> None:
    picture, late = tmp_path / "curve.png", ["--start", 3, *CPU]
    run = patchlife("eval", *model, data, *late, "--modes", "fixed,adaptive", "--curve", picture)
    assert run.code == 0, run.err
    assert "left out of the curve: budget 0.3, 0.35, 0.4, 0.45, 0.5 (budget 0.3 is out of reach" in run.err
    assert run.out.count("fixed ") == run.out.count("adaptive ") == 5
    with Image.open(picture) as drawn:
        assert drawn.width > 900
    run = patchlife("eval", *model, data, *late, "--budgets", "0.5", "--curve", picture)
    assert (run.code, "none of the budgets of the curve can be reached" in run.err) == (2, True)
    run = patchlife("eval", *model, data, *late, "--budgets", "1.0,0.5")
    assert (run.code, "left out" in run.err) == (2, False)


def test_the_points_of_bench_equal_those_of_eval(patchlife, model, data: Path, tmp_path: Path) -> None:
    others, out = tmp_path / "others", tmp_path / "scores.json"
    options = ["--no-speed", "--data", data, "--every", 2, "--methods", "ours-fixed,tome", "--flops", "0.6,0.45,0.1"]
    assert patchlife("bench", *model, *CPU, *options, "--out", others).code == 0
    page = ["--points", others / "*.json", "--curve", tmp_path / "curve.html"]
    run = patchlife("eval", *model, data, *CPU, "--every", 2, "--budgets", "0.6,0.45", "--out", out, *page)
    assert run.code == 0, run.err
    assert "left out of the curve: ours, fixed at 0.1 (" in run.err
    (found,) = others.glob("*.json")
    points = read_points([found], NAME, data, 4)
    for point, score in zip(points["ours, fixed"], json.loads(out.read_text())["scores"], strict=True):
        assert point == {name: pytest.approx(score[name], rel=1e-4, abs=1e-6) for name in point}
    assert all(0.4 < point["fraction"] < 0.65 for point in points["ToMe"][:2])
    text = (tmp_path / "curve.html").read_text()
    assert all(f"<td>{label}</td>" in text for label in ("this model, fixed", "ours, fixed", "ToMe"))


def test_the_points_of_another_eval(patchlife, model, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    assert patchlife("eval", *model, data, *CPU, "--budgets", "0.6", "--out", other).code == 0
    assert list(read_points([other], NAME, data, 8)) == ["other, fixed"]
    for model_name, folder, photos in (("vit", data, 8), (NAME, data / "0", 8), (NAME, data, 4)):
        message = f"expected {model_name} on {photos} photos of .*, got {NAME} on 8 photos"
        with pytest.raises(ConfigError, match=message):
            read_points([other], model_name, folder, photos)


@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"kind": "patchlife-bench", "data": {}, "accuracy": []}'])
def test_a_file_without_accuracy_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"points.json (is not a result file|has no accuracy)"):
        read_points([path], NAME, tmp_path, 8)


def test_points_and_curves_need_a_plot(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--points are drawn in a plot, got none; add --curve FILE\.png"):
        EvalConfig(ModelConfig("demo"), tmp_path, points=(tmp_path,))
    with pytest.raises(ConfigError, match=r"--curve must end in \.png or \.html, got curve\.jpg"):
        EvalConfig(ModelConfig("demo"), tmp_path, curve=Path("curve.jpg"))


def test_default_budgets(tmp_path: Path) -> None:
    assert EvalConfig(ModelConfig("demo"), tmp_path).budgets == (1.0, 0.8, 0.6, 0.45)
    assert EvalConfig(ModelConfig("demo"), tmp_path, curve=Path("a.png")).budgets == CURVE_BUDGETS
    assert EvalConfig(ModelConfig("demo"), tmp_path, curve=Path("a.png"), budgets=(0.5,)).budgets == (0.5,)


def test_only_with_a_curve_budgets_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def attempt(budget: float) -> None:
        if budget in (0.45, 0.6):
            raise ConfigError(f"no graph of budget {budget:g}")

    config = EvalConfig(ModelConfig("demo"), tmp_path, budgets=(1.0, 0.6, 0.5, 0.45))
    with pytest.raises(ConfigError, match=r"no graph of budget 0\.6"):
        within_reach(config, attempt)
    drawn = EvalConfig(ModelConfig("demo"), tmp_path, budgets=config.budgets, curve=Path("a.png"))
    assert within_reach(drawn, attempt).budgets == (1.0, 0.5)
    assert "budget 0.6, 0.45 (no graph of budget 0.6)" in capsys.readouterr().err


def test_photos_without_labels_have_agreement_and_no_top1(patchlife, model, data: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "holiday", 4)
    write_photos(tmp_path / "labelled" / "0", 4)
    out, labelled = tmp_path / "scores.json", tmp_path / "labelled.json"
    options = [*CPU, "--budgets", "1.0,0.5"]
    run = patchlife("eval", *model, tmp_path / "holiday", *options, "--out", out, "--curve", tmp_path / "curve.html")
    assert run.code == 0, run.err
    assert "folder holiday is not a class of this model, so its photos count as unlabelled" in run.err
    assert "top-1" not in run.out
    assert "same class as the dense model, %" in (tmp_path / "curve.html").read_text()
    assert patchlife("eval", *model, tmp_path / "labelled", *options, "--out", labelled).code == 0
    for score, same in zip(scores_of(out).values(), scores_of(labelled).values(), strict=True):
        assert score == same | {"top1": None, "top5": None, "drop": None, "drop_interval": None}
    write_photos(data / "zebra", 1)
    run = patchlife("eval", *model, data, *options)
    assert (run.code, "folder zebra is not a class of this model" in run.err) == (2, True)
    run = patchlife("eval", *model, tmp_path / "holiday", *options, "--class-order", "number")
    assert (run.code, "folder holiday is not a class of this model" in run.err) == (2, True)


def test_a_model_without_a_classifier_has_neighbours_and_cosine(patchlife, data: Path, tmp_path: Path) -> None:
    save_file(weights(num_classes=0), tmp_path / "headless.safetensors")
    headless = [NAME, "--checkpoint", tmp_path / "headless.safetensors", "--model-args", "num_classes=0"]
    page = tmp_path / "curve.html"
    words = ["eval", *headless[:3], data, *headless[3:], *CPU, "--budgets", "1.0,0.5,0.1", "--curve", page]
    run = patchlife(*words)
    assert run.code == 0, run.err
    assert "left out of the curve: budget 0.1" in run.err
    assert "accuracy of nearest neighbours, %" in page.read_text()
    words[4] = data / "0"
    assert patchlife(*words).code == 0
    assert "accuracy of nearest neighbours, %" not in page.read_text()
    assert ">1.0000</td>" in page.read_text()  # the cosine at budget 1.0


def test_a_multi_label_model_has_its_precision_only(patchlife, model, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "curve.html"
    run = patchlife("eval", *model, data, *CPU, "--multi-label", "--budgets", "1.0,0.5", "--curve", page)
    assert run.code == 0, run.err
    text = page.read_text()
    assert "mean average precision, %" in text
    assert "KL divergence" not in text


def test_results_of_the_same_name_are_all_drawn(tmp_path: Path) -> None:
    paths = [tmp_path / name / "curve.json" for name in ("first", "second")]
    for top1, path in enumerate(paths):
        path.parent.mkdir()
        score = {"mode": "fixed", "fraction": 0.5, "top1": top1}
        result = {"model": NAME, "data": str(tmp_path), "photos": 8, "failures": [], "scores": [score]}
        path.write_text(json.dumps(result))
    curves = read_points(paths, NAME, tmp_path, 8)
    assert list(curves) == ["curve, fixed", f"curve, fixed ({paths[1]})"]
    assert [scores[0]["top1"] for scores in curves.values()] == [0, 1]
