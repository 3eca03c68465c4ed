"""The loop: what it learns does not depend on interruptions, and nothing bad is ever kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_targets import PREPROCESS, QUICK, small_model, some_photos
from torch import Tensor

import patchlife
from patchlife import SlimModel
from patchlife.config import TrainingConfig
from patchlife.data import read_photo
from patchlife.errors import CheckpointError, ConfigError, NumericalError
from patchlife.training import loop
from patchlife.training.checkpoint import check_settings, restore_latest, save_checkpoint
from patchlife.training.fit import accelerator_for, fit, work_folder
from patchlife.training.loop import train
from patchlife.training.stage import Stage, StageConfig, Step
from patchlife.training.target_cache import Photo, TargetCache


class Line(Stage):
    """Learns one number: the mean of the photos' row numbers, which their logits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.guess = torch.nn.Parameter(torch.zeros(3))

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        return (self.guess - step.targets.logits).square().mean(), {"chance": step.chance}


@pytest.fixture
def cache(tmp_path: Path) -> TargetCache:
    import numpy as np

    photos = some_photos(tmp_path / "photos")
    rows = np.arange(12, dtype=np.float16)[:, None].repeat(3, 1)
    return TargetCache(photos, [], [rows] * 4)  # type: ignore[arg-type]


COURSE = StageConfig("line", epochs=3, batch_size=4, learning_rate=0.5, save_every=0.0)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "photos_per_s"} for line in lines]


def test_every_epoch_sees_each_photo_once() -> None:
    for epoch in range(3):
        rows = [row for step in range(3) for row in COURSE.rows(3 * epoch + step, 12)]
        assert sorted(rows) == list(range(12))
    assert COURSE.rows(0, 12) != COURSE.rows(3, 12)
    assert len({COURSE.chance(step) for step in range(9)}) == 9


def test_the_rate_rises_and_falls() -> None:
    rates = [COURSE.rate(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(0.5)
    assert rates[0] < rates[4]
    assert rates[-1] < 0.01
    assert min(rates) > 0


@pytest.mark.parametrize("stops", [(1,), (4,), (2, 3, 8)])
def test_an_interrupted_run_ends_as_a_whole_one(
    cache: TargetCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    whole = Line()
    (tmp_path / "whole").mkdir()
    train(whole, cache, COURSE, tmp_path / "whole", accelerator_for("cpu"))
    folder = tmp_path / "parts"
    folder.mkdir()
    real = loop.save_checkpoint
    for stop in stops:

        def save_then_die(path: Path, step: int, *state, stop: int = stop) -> None:
            real(path, step, *state)
            if step == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(loop, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(Line(), cache, COURSE, folder, accelerator_for("cpu"))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"stage": "li')  # cut off by a crash
    monkeypatch.setattr(loop, "save_checkpoint", real)
    resumed = Line()
    train(resumed, cache, COURSE, folder, accelerator_for("cpu"))
    assert torch.equal(resumed.guess, whole.guess)
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_nan_stops_with_step_and_photos(cache: TargetCache, tmp_path: Path) -> None:
    class Poisoned(Line):
        def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
            loss, notes = super().forward(step)
            self.steps = getattr(self, "steps", 0) + 1
            return loss * (torch.nan if self.steps > 3 and (step.targets.logits == 5).any() else 1), notes

    stage = Poisoned()
    with pytest.raises(NumericalError, match=r"line: .* step \d+; .*05\.png"):
        train(stage, cache, COURSE, tmp_path, accelerator_for("cpu"))
    assert stage.guess.isfinite().all()
    step = restore_latest(tmp_path / "line", (kept := Line()).trained(), torch.optim.AdamW(kept.parameters()))
    assert kept.guess.isfinite().all()
    assert len(metrics(tmp_path)) == step


def trained_line() -> tuple[Line, torch.optim.AdamW]:
    stage = Line()
    optimizer = torch.optim.AdamW(stage.parameters())
    stage.guess.square().sum().add(stage.guess.sum()).backward()
    optimizer.step()
    return stage, optimizer


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    stage, optimizer = trained_line()
    save_checkpoint(tmp_path, 3, stage.trained(), optimizer)
    newer = save_checkpoint(tmp_path, 4, stage.trained(), optimizer) / "state.safetensors"
    content = bytearray(newer.read_bytes())
    content[-1] ^= 1
    newer.write_bytes(content)
    other = Line()
    assert restore_latest(tmp_path, other.trained(), torch.optim.AdamW(other.parameters())) == 3
    assert torch.equal(other.guess, stage.guess)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, optimizer = trained_line()
    save_checkpoint(tmp_path, 3, stage.trained(), optimizer)

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchlife.training.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"step 4 .*No space left"):
        save_checkpoint(tmp_path, 4, stage.trained(), optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert restore_latest(tmp_path, stage.trained(), optimizer) == 3


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    stage, optimizer = trained_line()
    was = {"seed": 0, "rate": 0.1, "photos": "12 (ab)", "drops": (2, 3)}
    save_checkpoint(tmp_path, 3, stage.trained(), optimizer, was)
    before = stage.guess.clone()
    for now, told in (
        (was | {"seed": 1}, "other settings: seed was 0, now 1. They"),
        (was | {"rate": 0.2, "drops": (2, 4)}, r"rate was 0\.1, now 0\.2; drops was \[2, 3\], now \[2, 4\]\. They"),
        (was | {"rank": 4}, "rank was None, now 4"),
        ({name: was[name] for name in ("seed", "rate", "photos")}, r"drops was \[2, 3\], now None"),
    ):
        with pytest.raises(CheckpointError, match=told):
            restore_latest(tmp_path, (other := Line()).trained(), torch.optim.AdamW(other.parameters()), now)
        assert not other.guess.any(), "nothing of it was used"
    with pytest.raises(CheckpointError, match="seed was 0, now 1"):
        check_settings(tmp_path, {"seed": 1})
    check_settings(tmp_path, {"seed": 0, "drops": (2, 3)})
    other = Line()
    assert restore_latest(tmp_path, other.trained(), torch.optim.AdamW(other.parameters()), was) == 3
    assert torch.equal(other.guess, before)


@pytest.mark.parametrize("change", ["name", "shape"])
def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path, change: str) -> None:
    stage, optimizer = trained_line()
    save_checkpoint(tmp_path, 3, stage.trained(), optimizer)
    other = {"name": {"another": stage.guess}, "shape": {"guess": torch.nn.Parameter(torch.zeros(2))}}[change]
    with pytest.raises(CheckpointError, match="other settings: it trained 1 tensors, this one trains 1, and guess"):
        restore_latest(tmp_path, other, optimizer)


def test_a_course_of_other_settings_is_refused(cache: TargetCache, tmp_path: Path) -> None:
    """What a stage follows from by itself, whoever calls it."""
    train(Line(), cache, COURSE, tmp_path, accelerator_for("cpu"))
    for changes, told in (
        ({"seed": 7}, "seed was 0, now 7"),
        ({"epochs": 4}, "line epochs was 3, now 4"),
        ({"batch_size": 3}, "line batch_size was 4, now 3"),
        ({"learning_rate": 0.1}, r"line learning_rate was 0\.5, now 0\.1"),
        ({"warmup": 0.1}, "line warmup was"),
        ({"weight_decay": 0.1}, "line weight_decay was"),
        ({"clip": 2.0}, "line clip was"),
        ({"also": {"weights": "b"}}, "weights was None, now b"),
    ):
        with pytest.raises(CheckpointError, match=told):
            train(Line(), cache, replace(COURSE, **changes), tmp_path, accelerator_for("cpu"))
    with pytest.raises(CheckpointError, match="photos learned from was 12, now 10"):
        train(Line(), cache.split(2)[0], COURSE, tmp_path, accelerator_for("cpu"))
    train(Line(), cache, replace(COURSE, save_every=9.0, after=("b",)), tmp_path, accelerator_for("cpu"))


# ---- the whole way


def run(out: Path, photos: list, **changes) -> SlimModel:
    config = TrainingConfig(**{**QUICK.__dict__, **changes})
    return fit(small_model(), photos, PREPROCESS, out, config, accelerator_for("cpu")).model


@pytest.mark.parametrize("finetune", ["none", "adapter", "full"])
def test_fit_saves_what_it_learned(tmp_path: Path, finetune: str) -> None:

    photos, untouched = some_photos(tmp_path / "photos", 24), small_model()
    before = {k: v.clone() for k, v in untouched.backbone.vit.state_dict().items()}
    fitted = run(tmp_path / "out", photos, finetune=finetune)
    images = torch.randn(3, 3, 48, 48)
    loaded = patchlife.load(tmp_path / "out", untouched.backbone.vit)
    for mode in ("fixed", "adaptive"):
        torch.testing.assert_close(loaded.set_mode(mode)(images), fitted.set_mode(mode)(images))
    after = small_model().backbone.vit.state_dict()  # the family's shared model: stage 2 changed a copy
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded.delta is None) == (finetune == "none")
    report = (work_folder(tmp_path / "out") / "report.html").read_text()
    assert report.count("<figure>") == (3 if finetune == "none" else 4)
    stages = {line["stage"] for line in metrics(work_folder(tmp_path / "out"))}
    assert stages == {"regression"} | ({f"slimming-{finetune}"} if finetune != "none" else set())
    patchlife.save(loaded, tmp_path / "again")  # an adapter of an adapter is the same adapter
    again = patchlife.load(tmp_path / "again", untouched.backbone.vit).set_mode("fixed")
    assert torch.equal(again(images), loaded.set_mode("fixed")(images))


def test_learning_lowers_both_losses(tmp_path: Path) -> None:
    run(tmp_path / "out", some_photos(tmp_path / "photos"), epochs=20, finetune="full", finetune_epochs=20)
    lines = metrics(work_folder(tmp_path / "out"))
    for stage, name in (("regression", "loss"), ("slimming-full", "divergence")):
        losses = [line[name] for line in lines if line["stage"] == stage]
        assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_stage_two_goes_on_from_a_learned_head(tmp_path: Path) -> None:

    photos = some_photos(tmp_path / "photos")
    head = run(tmp_path / "head", photos)
    loaded = patchlife.load(tmp_path / "head", small_model().backbone.vit)
    both = fit(
        loaded,
        photos,
        PREPROCESS,
        tmp_path / "both",
        TrainingConfig(**{**QUICK.__dict__, "epochs": 0, "finetune": "adapter", "cache": tmp_path / "head.work/cache"}),
        accelerator_for("cpu"),
    ).model
    for a, b, c in zip(*(m.scorer.parameters() for m in (head, loaded, both)), strict=True):
        assert torch.equal(a, b)  # what was given stays as it was
        assert (c - a).abs().max() < 0.05  # what comes out began there
    assert not torch.equal(head.scorer.patch.weight, both.scorer.patch.weight)  # and learned on, with the blocks
    with pytest.raises(ConfigError, match="dense teacher is gone"):
        fit(both, photos, PREPROCESS, tmp_path / "third", QUICK, accelerator_for("cpu"))
    with pytest.raises(ConfigError, match="no learned head"):
        run(tmp_path / "none", photos, epochs=0)


def test_the_model_of_a_fit_can_be_fitted_again(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    once = run(tmp_path / "once", photos)
    twice = fit(once, photos, PREPROCESS, tmp_path / "twice", QUICK, accelerator_for("cpu")).model
    assert not torch.equal(once.scorer.patch.weight, twice.scorer.patch.weight)


def test_a_learned_head_can_be_kept_as_it_is(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    once = run(tmp_path / "once", photos)
    config = TrainingConfig(**{**QUICK.__dict__, "epochs": 0})
    kept = fit(once, photos, PREPROCESS, tmp_path / "kept", config, accelerator_for("cpu")).model
    assert torch.equal(once.scorer.patch.weight, kept.scorer.patch.weight)
    assert (work_folder(tmp_path / "kept") / "report.html").is_file()


def test_a_stage_sets_the_pace_of_its_parameters(tmp_path: Path, cache: TargetCache) -> None:
    class Paced(Line):
        def __init__(self) -> None:
            super().__init__()
            self.slow = torch.nn.Parameter(torch.zeros(3))

        def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
            loss = (self.guess - step.targets.logits).square() + (self.slow - step.targets.logits).square()
            return loss.mean(), {}

        def lr_multiplier(self, name: str) -> float:
            return 0.1 if name == "slow" else 1.0

    stage = Paced()
    train(stage, cache, COURSE, tmp_path, accelerator_for("cpu"))
    ratio = (stage.slow / stage.guess).mean().item()
    assert 0.05 < ratio < 0.2


def test_labels_are_learned_where_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *given: None)
    photos = some_photos(tmp_path / "photos")
    images = torch.stack([PREPROCESS(read_photo(photo.path)) for photo in photos])
    others = [Photo(photo.path, (photo.label + 1) % 3) for photo in photos]
    unknown = [Photo(photo.path) for photo in photos]

    def answers(name: str, given: list[Photo], weight: float) -> torch.Tensor:
        learn = {"finetune": "full", "finetune_epochs": 14, "finetune_learning_rate": 3e-3, "save_every": 100.0}
        return run(tmp_path / name, given, label_weight=weight, **learn).set_budget(1.0)(images).detach()

    truth, wrong = ([photo.label for photo in given] for given in (photos, others))
    right = answers("right", photos, 1.0)
    assert (right.argmax(dim=1) == torch.tensor(truth)).double().mean() > 0.9
    assert (answers("wrong", others, 1.0).argmax(dim=1) == torch.tensor(wrong)).double().mean() > 0.9
    none = answers("none", photos, 0.0)
    assert (none.argmax(dim=1) == torch.tensor(truth)).double().mean() < 0.7
    assert torch.equal(none, answers("none of others", others, 0.0)), "labels are not read where they have no weight"
    assert torch.equal(none, answers("unknown", unknown, 1.0)), "photos without a label learn from the teacher"
