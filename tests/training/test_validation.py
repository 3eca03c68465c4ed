"""Validation: its numbers are correct, are logged once, and do not change what is trained; trackers get them too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from made_targets import PREPROCESS, QUICK, small_model, some_photos

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.config import TrainingConfig
from patchlife.data import read_photo
from patchlife.errors import ConfigError
from patchlife.slimming.regressor import LifeRegressor
from patchlife.training import loop
from patchlife.training.budget_curve import agreements
from patchlife.training.fit import Fitted, accelerator_for, fit, work_folder
from patchlife.training.log import Log
from patchlife.training.report import write_report
from patchlife.training.stage import StageConfig
from patchlife.training.stages import Regression
from patchlife.training.validation import Validation, set_names

BOTH = replace(QUICK, finetune="full")


def run(folder: Path, out: str, config: TrainingConfig = BOTH, validate: bool = True) -> Fitted:
    photos = some_photos(folder / "photos", 16)
    sets = {"some": photos[12:], "most": photos[2:]} if validate else None
    return fit(small_model(), photos[:12], PREPROCESS, folder / out, config, accelerator_for("cpu"), sets)


def metrics(folder: Path, out: str) -> list[dict]:
    lines = [json.loads(line) for line in (work_folder(folder / out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("photos_per_s", "seconds")} for line in lines]


def validation_lines(folder: Path, out: str) -> list[dict]:
    return [line for line in metrics(folder, out) if "validation" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SlimModel]:
    """The folder of an uninterrupted run with validation, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, "out").model


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)


def test_validation_does_not_change_the_adapter(whole: tuple, tmp_path: Path, no_report: None) -> None:
    run(tmp_path, "out", validate=False)
    with_it, without = whole[0] / "out", tmp_path / "out"
    names = sorted(path.name for path in with_it.iterdir())
    assert names == sorted(path.name for path in without.iterdir())
    assert all((with_it / name).read_bytes() == (without / name).read_bytes() for name in names)
    training = [line for line in metrics(whole[0], "out") if "validation" not in line]
    assert training == metrics(tmp_path, "out")


def test_validation_lines_have_the_accuracy_of_the_model(whole: tuple[Path, SlimModel]) -> None:
    tmp_path, model = whole
    lines = validation_lines(tmp_path, "out")
    assert [(line["stage"], line["step"], line["epoch"]) for line in lines if line["validation"] == "some"] == [
        (stage, 3 * epoch, epoch) for stage in ("regression", "slimming-full") for epoch in (0, 1, 2)
    ]
    assert {line["budget"] for line in lines} == {0.61}  # 0.45 is out of reach of this model
    photos = some_photos(tmp_path / "photos", 16)[2:]
    images = torch.stack([PREPROCESS(read_photo(photo.path)) for photo in photos])
    labels = torch.tensor([photo.label for photo in photos])
    with torch.no_grad():
        logits, dense = model.set_mode("fixed").set_budget(0.61)(images), small_model().backbone.model(images)
    last = [line for line in lines if line["validation"] == "most"][-1]
    assert last["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), 1e-5)
    assert last["dense_top1"] == pytest.approx((dense.argmax(1) == labels).double().mean().item(), 1e-5)
    assert last["agreement"] == pytest.approx((logits.argmax(1) == dense.argmax(1)).double().mean().item(), 1e-5)
    kl = torch.nn.functional.kl_div(logits.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
    assert last["kl"] == pytest.approx(kl.item(), rel=0.05, abs=1e-4)  # cached in half precision
    report = (work_folder(tmp_path / "out") / "report.html").read_text()
    assert (
        report.count("accuracy on validation photos, which") == 2 * 2
    )  # caption and alternative text of a figure for each stage
    assert json.loads((work_folder(tmp_path / "out") / "fit.json").read_text())["validation"] == {"some": 4, "most": 14}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_keeps_each_line_once(
    whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None, stop: int
) -> None:
    original = loop.save_checkpoint

    def save_then_interrupt(path: Path, step: int, *state) -> None:
        original(path, step, *state)
        if path.name.startswith("slimming") and step == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "parts")
    file = work_folder(tmp_path / "parts") / "metrics.jsonl"
    cut = file.read_text().splitlines(keepends=True)
    monkeypatch.setattr(loop, "save_checkpoint", original)
    run(tmp_path, "parts")
    assert metrics(tmp_path, "parts") == metrics(whole[0], "out")
    again = file.read_text()
    run(tmp_path, "parts")  # nothing is left to do or to log
    assert file.read_text() == again
    assert again.startswith("".join(cut[:9]))


def test_a_small_set_is_measured_twice_an_epoch_of_stage_two(tmp_path: Path, no_report: None) -> None:
    photos, once = some_photos(tmp_path / "photos", 13), replace(BOTH, epochs=1, finetune_epochs=1)
    sets = {"one": photos[12:]}
    fit(small_model(), photos[:12], PREPROCESS, tmp_path / "out", once, accelerator_for("cpu"), sets)
    assert [(line["stage"], line["step"]) for line in validation_lines(tmp_path, "out")] == [
        ("regression", 0),
        ("regression", 3),
        ("slimming-full", 0),
        ("slimming-full", 1),
        ("slimming-full", 3),
    ]


def test_seconds_add_up_over_runs_and_stages(tmp_path: Path) -> None:
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
    log = Log(path, "b", 1, True, 8, prior_stages=("a",))
    assert log.seconds == 6
    assert log.has(1, "w", 0.6)
    assert not log.has(1, "w", 0.5)
    log.write({"step": 1, "photos_per_s": 8.0})
    assert log.seconds == 7
    assert len(path.read_text().splitlines()) == 5
    assert Log(path, "c", 0, True, 8, prior_stages=("a", "b")).seconds == 7
    assert Log(path, "c", 0, True, 8, prior_stages=("a",)).seconds == 4  # "b" is of another run
    assert Log(path, "b", 0, True, 8).seconds == 0  # it begins again, so its own lines are removed
    path.write_text(
        line(stage="a", step=0, photos_per_s=2.0) + line(stage="b", step=0, photos_per_s=2.0) + line(stage="b", step=1)
    )
    assert Log(path, "b", 2, True, 8, prior_stages=("a",)).seconds == 8
    assert Log(path, "b", 0, False, 8).seconds == 0
    assert len(path.read_text().splitlines()) == 3  # a process that is not active does not change the file


def test_validation_and_report_do_not_change_the_model(whole: tuple[Path, SlimModel], tmp_path: Path) -> None:
    config = LifeConfig(kept=(36, 36, 30, 20, 9), start=2, drops=(2, 3))
    model = patchlife.wrap(small_model().backbone.model, config).eval()
    photos = some_photos(tmp_path / "photos")
    validation = Validation.from_photos(model, {"some": photos[:4]}, PREPROCESS, tmp_path / "cache", QUICK)
    stage_config = StageConfig("line", epochs=1, batch_size=4, learning_rate=0.5)
    log = Log(tmp_path / "metrics.jsonl", "line", 0, True)
    validation.measure(Regression(LifeRegressor(48, 1)), stage_config, 12, 0, log)
    assert model.settings is config
    model.calibrate([torch.randn(4, 3, 48, 48)])
    assert [row[0] for row in agreements(model, validation.sets["some"])] == [1.0, 0.9, 0.8, 0.7, 0.61, 0.5]
    assert model.settings is config
    summary = {
        "photos": 4,
        "seconds": 1.0,
        "skipped": [],
        "config": {},
        "conditions": {},
        "stages": [],
        "validation": {},
    }
    write_report(tmp_path / "report.html", model, validation.sets["some"], PREPROCESS, tmp_path / "none", summary)
    assert model.settings is config


def test_names_of_sets() -> None:
    assert set_names(["a/val", "b/train"]) == ["val", "train"]
    assert set_names(["a/val", "b/val/"]) == ["a/val", "b/val"]
    assert set_names([]) == []
    with pytest.raises(ConfigError, match="expected different folders, got a, a"):
        set_names(["a", "a"])


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    for name, message in (
        ("wandb", "tracker wandb needs a package that is not installed: pip install wandb"),
        ("tensorbord", "tracker must be one of .*tensorboard.*, got 'tensorbord'"),
    ):
        config = replace(QUICK, tracker=name)
        with pytest.raises(ConfigError, match=message):
            fit(small_model(), [], PREPROCESS, tmp_path / "out", config)
    assert not work_folder(tmp_path / "out").exists()


class ListTracker(GeneralTracker):
    """Keeps what it gets in a list."""

    name, requires_logging_directory = "list", False

    def __init__(self) -> None:
        super().__init__()
        self.started, self.finished = 0, 0
        self.logged: list[tuple[int, dict]] = []

    @property
    def tracker(self) -> list:
        return self.logged

    def start(self) -> None:
        self.started += 1

    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        assert step is not None
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_trackers_of_the_accelerator_get_the_numbers_of_the_lines(tmp_path: Path, no_report: None) -> None:
    tracker, photos = ListTracker(), some_photos(tmp_path / "photos", 16)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    for _ in range(2):  # the second run finds everything done
        fit(small_model(), photos[:12], PREPROCESS, tmp_path / "out", BOTH, accelerator, {"some": photos[12:]})
    assert (tracker.started, tracker.finished) == (1, 0)  # the caller ends training
    lines = metrics(tmp_path, "out")
    assert len(tracker.logged) == len(lines)
    assert [step for step, _ in tracker.logged] == sorted(step for step, _ in tracker.logged)  # as wandb needs
    for stage, steps_before in (("regression", 0), ("slimming-full", 6)):
        for key, name, of_set in ((f"{stage}/loss", "loss", None), (f"{stage}/some at 0.61/top1", "top1", "some")):
            expected = [
                (steps_before + line["step"], line[name])
                for line in lines
                if line["stage"] == stage and line.get("validation") == of_set
            ]
            assert expected
            assert [(step, values[key]) for step, values in tracker.logged if key in values] == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_is_a_tracker(tmp_path: Path, no_report: None) -> None:
    pytest.importorskip("tensorboard")
    accelerator = accelerator_for("cpu", "tensorboard", work_folder(tmp_path / "out"))
    fit(small_model(), some_photos(tmp_path / "photos"), PREPROCESS, tmp_path / "out", QUICK, accelerator)
    accelerator.end_training()
    assert list(work_folder(tmp_path / "out").glob("patchlife/events.out.tfevents.*"))
