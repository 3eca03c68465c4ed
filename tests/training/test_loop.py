"""The training loop: interruptions do not change the result, and steps that are not finite are not applied."""

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
    """Learns the mean of the row numbers, which the outputs of the targets hold."""

    def __init__(self) -> None:
        super().__init__()
        self.guess = torch.nn.Parameter(torch.zeros(3))

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        return (self.guess - step.targets.output).square().mean(), {"random_draw": step.random_draw}


@pytest.fixture
def cache(tmp_path: Path) -> TargetCache:
    import numpy as np

    photos = some_photos(tmp_path / "photos")
    rows = np.arange(12, dtype=np.float16)[:, None].repeat(3, 1)
    return TargetCache(photos, [], [rows] * 6)  # type: ignore[arg-type]


CONFIG = StageConfig("line", epochs=3, batch_size=4, learning_rate=0.5, save_every=0.0)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "photos_per_s"} for line in lines]


def test_every_epoch_sees_each_photo_once() -> None:
    for epoch in range(3):
        rows = [row for step in range(3) for row in CONFIG.rows(3 * epoch + step, 12)]
        assert sorted(rows) == list(range(12))
    assert CONFIG.rows(0, 12) != CONFIG.rows(3, 12)
    assert len({CONFIG.random_draw(step) for step in range(9)}) == 9


def test_every_seed_has_its_own_order_and_draws() -> None:
    """torch uses the lowest 32 bits of a seed only, so these must differ there."""
    configs = [replace(CONFIG, seed=seed) for seed in range(6)]
    assert len({tuple(config.rows(0, 12)) for config in configs}) == 6
    assert len({config.random_draw(0) for config in configs}) == 6
    streams = [config.view_generator(step).initial_seed() % 2**32 for config in configs for step in range(9)]
    streams += [
        config._generator(step, stream).initial_seed() % 2**32
        for config in configs
        for step in range(9)
        for stream in (0, 1)
    ]
    assert len(set(streams)) == 6 * 9 * 3


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [CONFIG.learning_rate_at(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(0.5)
    assert rates[0] < rates[4]
    assert rates[-1] < 0.01
    assert min(rates) > 0


@pytest.mark.parametrize("stops", [(1,), (4,), (2, 3, 8)])
def test_an_interrupted_run_gives_the_result_of_an_uninterrupted_one(
    cache: TargetCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    whole = Line()
    (tmp_path / "whole").mkdir()
    train(whole, cache, CONFIG, tmp_path / "whole", accelerator_for("cpu"))
    folder = tmp_path / "parts"
    folder.mkdir()
    original = loop.save_checkpoint
    for stop in stops:

        def save_then_interrupt(path: Path, step: int, *state, stop: int = stop) -> None:
            original(path, step, *state)
            if step == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(loop, "save_checkpoint", save_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(Line(), cache, CONFIG, folder, accelerator_for("cpu"))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"stage": "li')  # cut off by a crash
    monkeypatch.setattr(loop, "save_checkpoint", original)
    resumed = Line()
    train(resumed, cache, CONFIG, folder, accelerator_for("cpu"))
    assert torch.equal(resumed.guess, whole.guess)
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_a_nan_loss_stops_training_and_names_step_and_photos(cache: TargetCache, tmp_path: Path) -> None:
    class NaNLoss(Line):
        def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
            loss, numbers = super().forward(step)
            self.steps = getattr(self, "steps", 0) + 1
            return loss * (torch.nan if self.steps > 3 and (step.targets.output == 5).any() else 1), numbers

    stage = NaNLoss()
    with pytest.raises(NumericalError, match=r"line: .* step \d+; .*05\.png"):
        train(stage, cache, CONFIG, tmp_path, accelerator_for("cpu"))
    assert stage.guess.isfinite().all()
    step = restore_latest(tmp_path / "line", (restored := Line()).trained(), torch.optim.AdamW(restored.parameters()))
    assert restored.guess.isfinite().all()
    assert len(metrics(tmp_path)) == step


def trained_line() -> tuple[Line, torch.optim.AdamW]:
    stage = Line()
    optimizer = torch.optim.AdamW(stage.parameters())
    stage.guess.square().sum().add(stage.guess.sum()).backward()
    optimizer.step()
    return stage, optimizer


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path) -> None:
    stage, optimizer = trained_line()
    save_checkpoint(tmp_path, 3, stage.trained(), optimizer)
    newer = save_checkpoint(tmp_path, 4, stage.trained(), optimizer) / "state.safetensors"
    content = bytearray(newer.read_bytes())
    content[-1] ^= 1
    newer.write_bytes(content)
    other = Line()
    assert restore_latest(tmp_path, other.trained(), torch.optim.AdamW(other.parameters())) == 3
    assert torch.equal(other.guess, stage.guess)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    saved = {"seed": 0, "rate": 0.1, "photos": "12 (ab)", "drops": (2, 3)}
    save_checkpoint(tmp_path, 3, stage.trained(), optimizer, saved)
    before = stage.guess.clone()
    for current, message in (
        (saved | {"seed": 1}, "seed was 0, now 1. They"),
        (saved | {"rate": 0.2, "drops": (2, 4)}, r"rate was 0\.1, now 0\.2; drops was \[2, 3\], now \[2, 4\]\. They"),
        (saved | {"rank": 4}, "rank was None, now 4"),
        ({name: saved[name] for name in ("seed", "rate", "photos")}, r"drops was \[2, 3\], now None"),
    ):
        with pytest.raises(CheckpointError, match=message):
            restore_latest(tmp_path, (other := Line()).trained(), torch.optim.AdamW(other.parameters()), current)
        assert not other.guess.any(), "the weights were loaded"
    with pytest.raises(CheckpointError, match="seed was 0, now 1"):
        check_settings(tmp_path, {"seed": 1})
    check_settings(tmp_path, {"seed": 0, "drops": (2, 3)})
    other = Line()
    assert restore_latest(tmp_path, other.trained(), torch.optim.AdamW(other.parameters()), saved) == 3
    assert torch.equal(other.guess, before)


@pytest.mark.parametrize("change", ["name", "shape"])
def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path, change: str) -> None:
    stage, optimizer = trained_line()
    save_checkpoint(tmp_path, 3, stage.trained(), optimizer)
    other = {"name": {"another": stage.guess}, "shape": {"guess": torch.nn.Parameter(torch.zeros(2))}}[change]
    with pytest.raises(CheckpointError, match="trained 1 tensors, this run trains 1, and guess"):
        restore_latest(tmp_path, other, optimizer)


def test_a_stage_with_other_settings_is_refused(cache: TargetCache, tmp_path: Path) -> None:
    """The settings of the stage itself, without those of the run."""
    train(Line(), cache, CONFIG, tmp_path, accelerator_for("cpu"))
    for changes, message in (
        ({"seed": 7}, "seed was 0, now 7"),
        ({"epochs": 4}, "line epochs was 3, now 4"),
        ({"batch_size": 3}, "line batch_size was 4, now 3"),
        ({"learning_rate": 0.1}, r"line learning_rate was 0\.5, now 0\.1"),
        ({"warmup": 0.1}, "line warmup was"),
        ({"weight_decay": 0.1}, "line weight_decay was"),
        ({"clip": 2.0}, "line clip was"),
        ({"run_settings": {"weights": "b"}}, "weights was None, now b"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(Line(), cache, replace(CONFIG, **changes), tmp_path, accelerator_for("cpu"))
    with pytest.raises(CheckpointError, match="training photos was 12, now 10"):
        train(Line(), cache.split(2)[0], CONFIG, tmp_path, accelerator_for("cpu"))
    train(Line(), cache, replace(CONFIG, save_every=9.0, prior_stages=("b",)), tmp_path, accelerator_for("cpu"))


# ---- fit


def run(out: Path, photos: list, **changes) -> SlimModel:
    config = TrainingConfig(**{**QUICK.__dict__, **changes})
    return fit(small_model(), photos, PREPROCESS, out, config, accelerator_for("cpu")).model


@pytest.mark.parametrize("finetune", ["none", "adapter", "full"])
def test_fit_saves_the_trained_model(tmp_path: Path, finetune: str) -> None:
    photos, original = some_photos(tmp_path / "photos", 24), small_model()
    before = {k: v.clone() for k, v in original.backbone.model.state_dict().items()}
    fitted = run(tmp_path / "out", photos, finetune=finetune)
    images = torch.randn(3, 3, 48, 48)
    loaded = patchlife.load(tmp_path / "out", original.backbone.model)
    for mode in ("fixed", "adaptive"):
        torch.testing.assert_close(loaded.set_mode(mode)(images), fitted.set_mode(mode)(images))
    after = small_model().backbone.model.state_dict()  # the family's shared model: stage 2 changed a copy
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded.delta is None) == (finetune == "none")
    report = (work_folder(tmp_path / "out") / "report.html").read_text()
    assert report.count("<figure>") == (4 if finetune == "none" else 5)
    stages = {line["stage"] for line in metrics(work_folder(tmp_path / "out"))}
    assert stages == {"regression"} | ({f"slimming-{finetune}"} if finetune != "none" else set())
    patchlife.save(loaded, tmp_path / "again")  # saving a loaded adapter changes nothing
    again = patchlife.load(tmp_path / "again", original.backbone.model).set_mode("fixed")
    assert torch.equal(again(images), loaded.set_mode("fixed")(images))


def test_training_lowers_both_losses(tmp_path: Path) -> None:
    run(tmp_path / "out", some_photos(tmp_path / "photos"), epochs=20, finetune="full", finetune_epochs=20)
    lines = metrics(work_folder(tmp_path / "out"))
    for stage, name in (("regression", "loss"), ("slimming-full", "divergence")):
        losses = [line[name] for line in lines if line["stage"] == stage]
        assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_stage_two_starts_from_a_learned_scorer(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    first = run(tmp_path / "scorer", photos)
    loaded = patchlife.load(tmp_path / "scorer", small_model().backbone.model)
    both = fit(
        loaded,
        photos,
        PREPROCESS,
        tmp_path / "both",
        TrainingConfig(
            **{**QUICK.__dict__, "epochs": 0, "finetune": "adapter", "cache": tmp_path / "scorer.work/cache"}
        ),
        accelerator_for("cpu"),
    ).model
    for a, b, c in zip(*(m.scorer.parameters() for m in (first, loaded, both)), strict=True):
        assert torch.equal(a, b)  # the given scorer is not changed
        assert (c - a).abs().max() < 0.05  # the trained one started there
    assert not torch.equal(first.scorer.patch.weight, both.scorer.patch.weight)  # and was trained with the blocks
    with pytest.raises(ConfigError, match="cannot be the dense teacher"):
        fit(both, photos, PREPROCESS, tmp_path / "third", QUICK, accelerator_for("cpu"))
    with pytest.raises(ConfigError, match="no learned scorer"):
        run(tmp_path / "none", photos, epochs=0)


def test_a_fitted_model_can_be_fitted_again(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    once = run(tmp_path / "once", photos)
    twice = fit(once, photos, PREPROCESS, tmp_path / "twice", QUICK, accelerator_for("cpu")).model
    assert not torch.equal(once.scorer.patch.weight, twice.scorer.patch.weight)


def test_zero_epochs_keep_a_learned_scorer(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    once = run(tmp_path / "once", photos)
    config = TrainingConfig(**{**QUICK.__dict__, "epochs": 0})
    kept = fit(once, photos, PREPROCESS, tmp_path / "kept", config, accelerator_for("cpu")).model
    assert torch.equal(once.scorer.patch.weight, kept.scorer.patch.weight)
    assert (work_folder(tmp_path / "kept") / "report.html").is_file()


def test_a_stage_sets_learning_rate_multipliers(tmp_path: Path, cache: TargetCache) -> None:
    class TwoRates(Line):
        def __init__(self) -> None:
            super().__init__()
            self.slow = torch.nn.Parameter(torch.zeros(3))

        def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
            loss = (self.guess - step.targets.output).square() + (self.slow - step.targets.output).square()
            return loss.mean(), {}

        def lr_multiplier(self, name: str) -> float:
            return 0.1 if name == "slow" else 1.0

    stage = TwoRates()
    train(stage, cache, CONFIG, tmp_path, accelerator_for("cpu"))
    ratio = (stage.slow / stage.guess).mean().item()
    assert 0.05 < ratio < 0.2


def test_labels_are_used_only_with_a_weight_and_where_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    photos = some_photos(tmp_path / "photos")
    images = torch.stack([PREPROCESS(read_photo(photo.path)) for photo in photos])
    others = [Photo(photo.path, (photo.label + 1) % 3) for photo in photos]
    unknown = [Photo(photo.path) for photo in photos]

    def trained_logits(name: str, labelled: list[Photo], weight: float) -> torch.Tensor:
        learn = {"finetune": "full", "finetune_epochs": 14, "finetune_learning_rate": 3e-3, "save_every": 100.0}
        learn["views"] = "cached"  # with fresh views a label weight also changes what is seen: none are mixed
        return run(tmp_path / name, labelled, label_weight=weight, **learn).set_budget(1.0)(images).detach()

    truth, wrong = ([photo.label for photo in part] for part in (photos, others))
    right = trained_logits("right", photos, 1.0)
    assert (right.argmax(dim=1) == torch.tensor(truth)).double().mean() > 0.9
    assert (trained_logits("wrong", others, 1.0).argmax(dim=1) == torch.tensor(wrong)).double().mean() > 0.9
    none = trained_logits("none", photos, 0.0)
    assert (none.argmax(dim=1) == torch.tensor(truth)).double().mean() < 0.7
    assert torch.equal(none, trained_logits("none of others", others, 0.0)), "labels without weight changed the result"
    assert torch.equal(none, trained_logits("unknown", unknown, 1.0)), "unknown labels changed the result"
