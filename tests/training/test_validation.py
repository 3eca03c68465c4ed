"""Watching: what it says is true, is said once, and changes nothing of what is learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_targets import PREPROCESS, QUICK, small_model, some_photos

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.config import TrainingConfig
from patchlife.data import read_photo
from patchlife.errors import ConfigError, MissingExtraError
from patchlife.slimming.regressor import LifeRegressor
from patchlife.training import loop
from patchlife.training.fit import Fitted, accelerator_for, fit, work_folder
from patchlife.training.log import Log
from patchlife.training.report import agreements, write_report
from patchlife.training.stage import StageConfig
from patchlife.training.stages import Regression
from patchlife.training.validation import Validation, set_names

BOTH = replace(QUICK, finetune="full")


def run(folder: Path, out: str, config: TrainingConfig = BOTH, validation: bool = True) -> Fitted:
    photos = some_photos(folder / "photos", 16)
    sets = {"some": photos[12:], "most": photos[2:]} if validation else None
    return fit(small_model(), photos[:12], PREPROCESS, folder / out, config, accelerator_for("cpu"), sets)


def metrics(folder: Path, out: str) -> list[dict]:
    lines = [json.loads(line) for line in (work_folder(folder / out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("photos_per_s", "seconds")} for line in lines]


def validated(folder: Path, out: str) -> list[dict]:
    return [line for line in metrics(folder, out) if "validation" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SlimModel]:
    """The folder of a run that validated and was never interrupted, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, "out").model


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *given: None)


def test_the_adapter_is_the_same_to_the_bit(whole: tuple, tmp_path: Path, no_report: None) -> None:
    run(tmp_path, "out", validation=False)
    ours, theirs = whole[0] / "out", tmp_path / "out"
    names = sorted(path.name for path in ours.iterdir())
    assert names == sorted(path.name for path in theirs.iterdir())
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    learned = [line for line in metrics(whole[0], "out") if "validation" not in line]
    assert learned == metrics(tmp_path, "out")


def test_lines_tell_what_the_model_does(whole: tuple[Path, SlimModel]) -> None:
    tmp_path, model = whole
    lines = validated(tmp_path, "out")
    assert [(line["stage"], line["step"], line["epoch"]) for line in lines if line["validation"] == "some"] == [
        (stage, 3 * epoch, epoch) for stage in ("regression", "slimming-full") for epoch in (0, 1, 2)
    ]
    assert {line["budget"] for line in lines} == {0.61}  # this model cannot save as much as 0.45 wants
    photos = some_photos(tmp_path / "photos", 16)[2:]
    images = torch.stack([PREPROCESS(read_photo(photo.path)) for photo in photos])
    labels = torch.tensor([photo.label for photo in photos])
    with torch.no_grad():
        answer, dense = model.set_mode("fixed").set_budget(0.61)(images), small_model().backbone.vit(images)
    last = [line for line in lines if line["validation"] == "most"][-1]
    assert last["top1"] == pytest.approx((answer.argmax(1) == labels).double().mean().item(), 1e-5)
    assert last["dense_top1"] == pytest.approx((dense.argmax(1) == labels).double().mean().item(), 1e-5)
    assert last["agreement"] == pytest.approx((answer.argmax(1) == dense.argmax(1)).double().mean().item(), 1e-5)
    kl = torch.nn.functional.kl_div(answer.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
    assert last["kl"] == pytest.approx(kl.item(), rel=0.05, abs=1e-4)  # half precision is what is cached
    report = (work_folder(tmp_path / "out") / "report.html").read_text()
    assert report.count("validated photos, over") == 2 * 2  # caption and alternative text of a figure for each stage
    assert json.loads((work_folder(tmp_path / "out") / "fit.json").read_text())["validated"] == {"some": 4, "most": 14}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_keeps_each_line_once(
    whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None, stop: int
) -> None:
    real = loop.save_checkpoint

    def save_then_die(path: Path, step: int, *state) -> None:
        real(path, step, *state)
        if path.name.startswith("slimming") and step == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "parts")
    file = work_folder(tmp_path / "parts") / "metrics.jsonl"
    cut = file.read_text().splitlines(keepends=True)
    monkeypatch.setattr(loop, "save_checkpoint", real)
    run(tmp_path, "parts")
    assert metrics(tmp_path, "parts") == metrics(whole[0], "out")
    again = file.read_text()
    run(tmp_path, "parts")  # nothing is left to be done or said
    assert file.read_text() == again
    assert again.startswith("".join(cut[:9]))


def test_a_few_photos_are_looked_at_twice_an_epoch_of_stage_two(tmp_path: Path, no_report: None) -> None:
    photos, once = some_photos(tmp_path / "photos", 13), replace(BOTH, epochs=1, finetune_epochs=1)
    sets = {"one": photos[12:]}
    fit(small_model(), photos[:12], PREPROCESS, tmp_path / "out", once, accelerator_for("cpu"), sets)
    assert [(line["stage"], line["step"]) for line in validated(tmp_path, "out")] == [
        ("regression", 0),
        ("regression", 3),
        ("slimming-full", 0),
        ("slimming-full", 1),
        ("slimming-full", 3),
    ]


def test_seconds_go_on_over_runs_and_stages(tmp_path: Path) -> None:
    def line(**values: object) -> str:
        return json.dumps(values) + "\n"

    path = tmp_path / "metrics.jsonl"
    path.write_text(
        line(stage="a", step=0, photos_per_s=2.0)
        + line(stage="b", step=0, validation="w", budget=0.6)
        + line(stage="b", step=0, photos_per_s=4.0)
        + line(stage="b", step=1, validation="w", budget=0.6)
        + line(stage="b", step=1, photos_per_s=4.0)
        + '{"stage": "b", "st'
    )
    assert Log(path, "a", 1, True, 8).seconds == 4
    with Log(path, "b", 1, True, 8, after=("a",)) as log:
        assert log.seconds == 6
        assert log.has(1, "w", 0.6)
        assert not log.has(1, "w", 0.5)
        log.write({"step": 1, "photos_per_s": 8.0})
        assert log.seconds == 7
    assert len(path.read_text().splitlines()) == 5
    assert Log(path, "c", 0, True, 8, after=("a", "b")).seconds == 7
    assert Log(path, "c", 0, True, 8, after=("a",)).seconds == 4  # "b" is of another run
    assert Log(path, "b", 0, True, 8).seconds == 0  # and when it begins again, none of its own lines are left
    path.write_text(
        line(stage="a", step=0, photos_per_s=2.0) + line(stage="b", step=0, photos_per_s=2.0) + line(stage="b", step=1)
    )
    assert Log(path, "b", 2, True, 8, after=("a",)).seconds == 8
    assert Log(path, "b", 0, False, 8).seconds == 0
    assert len(path.read_text().splitlines()) == 3  # another process leaves the file alone


def test_a_look_leaves_the_model_as_it_is(whole: tuple[Path, SlimModel], tmp_path: Path) -> None:
    config = LifeConfig(kept=(36, 36, 30, 20, 9), start=2, drops=(2, 3))
    model = patchlife.wrap(small_model().backbone.vit, config).eval()
    photos = some_photos(tmp_path / "photos")
    validation = Validation.collected(model, {"some": photos[:4]}, PREPROCESS, tmp_path / "cache", QUICK)
    stage_config = StageConfig("line", epochs=1, batch_size=4, learning_rate=0.5)
    with Log(tmp_path / "metrics.jsonl", "line", 0, True) as log:
        validation.look(Regression(LifeRegressor(48, 1)), stage_config, 12, 0, log)
    assert model.config is config
    model.calibrate([torch.randn(4, 3, 48, 48)])
    assert [row[0] for row in agreements(model, validation.sets["some"])] == [1.0, 0.8, 0.6]
    assert model.config is config
    summary = {
        "photos": 4,
        "seconds": 1.0,
        "skipped": [],
        "config": {},
        "conditions": {},
        "stages": [],
        "validated": {},
    }
    write_report(tmp_path / "report.html", model, validation.sets["some"], PREPROCESS, tmp_path / "none", summary)
    assert model.config is config


def test_names_of_sets() -> None:
    assert set_names(["a/val", "b/train"]) == ["val", "train"]
    assert set_names(["a/val", "b/val/"]) == ["a/val", "b/val"]
    assert set_names([]) == []
    with pytest.raises(ConfigError, match="expected folders that differ"):
        set_names(["a", "a"])


def test_without_tensorboard_the_install_line_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'patchlife\[tensorboard\]'"):
        run(tmp_path, "out", replace(BOTH, tensorboard=True))
    assert not work_folder(tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_says_what_the_lines_say(tmp_path: Path, no_report: None) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(BOTH, tensorboard=True)
    for _ in range(2):  # the second run finds everything done
        run(tmp_path, "out", config)
    for stage in ("regression", "slimming-full"):
        events = EventAccumulator(str(work_folder(tmp_path / "out") / "tensorboard" / stage)).Reload()
        lines = [line for line in metrics(tmp_path, "out") if line["stage"] == stage]
        for tag, wanted in (
            ("loss", [(line["step"], line["loss"]) for line in lines if "loss" in line]),
            ("some at 0.61/top1", [(line["step"], line["top1"]) for line in lines if line.get("validation") == "some"]),
        ):
            written = [(event.step, event.value) for event in events.Scalars(tag)]
            assert written == [(step, pytest.approx(value)) for step, value in wanted]
