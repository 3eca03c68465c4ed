"""A work folder resumes its own run only; a run with other settings is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import fresh, liven
from made_targets import PREPROCESS, QUICK, small_model, some_photos

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.config import TrainingConfig
from patchlife.data import Preprocess
from patchlife.errors import AdapterError, CheckpointError
from patchlife.slimming.regressor import LifeRegressor
from patchlife.training import loop
from patchlife.training.fit import accelerator_for, fit, work_folder
from patchlife.training.run_settings import stage_configs_of
from patchlife.training.target_cache import Photo

BOTH = replace(QUICK, finetune="adapter")


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)


def run(
    out: Path,
    photos: Sequence[Photo],
    config: TrainingConfig = BOTH,
    model: SlimModel | None = None,
    preprocess: Preprocess = PREPROCESS,
    validation: dict[str, Sequence[Photo]] | None = None,
) -> SlimModel:
    model = model or small_model()
    return fit(model, photos, preprocess, out, config, accelerator_for("cpu"), validation).model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and a finished fit of both stages."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchlife.training.fit.write_report", lambda *args: None)
        run(folder / "out", some_photos(folder / "photos"))
    return folder


@pytest.fixture
def earlier(done: Path, tmp_path: Path) -> tuple[Path, list[Photo]]:
    """(adapter of a copy of that folder, its photos, which are not copied)."""
    for name in ("out", "out.work"):
        shutil.copytree(done / name, tmp_path / name)
    return tmp_path / "out", [Photo(path, index % 3) for index, path in enumerate(sorted((done / "photos").iterdir()))]


def assert_refused(earlier: tuple[Path, list[Photo]], message: str, **changes: Any) -> None:
    """Fit with changes; it is refused, and no file is changed, the cached features included."""
    out, photos = earlier
    before = contents(out.parent)
    arguments = {"photos": photos, **changes}
    with pytest.raises(CheckpointError, match=message) as error:
        run(out, **arguments)
    assert "choose another --out, or add --restart" in str(error.value)
    after = contents(out.parent)
    assert {name for name in before if before[name] != after.get(name)} == set()


# ---- the settings of a fit

CHANGES_RESULT: dict[str, tuple[Any, str]] = {
    "seed": (1, "seed was 0, now 1"),
    "learning_rate": (1e-3, "regression learning_rate was 0.002, now 0.001"),
    "epochs": (3, "regression epochs was 2, now 3"),
    "batch_size": (6, "regression batch_size was 4, now 6"),
    "photos": (10, r"photos was 12 \(\w+\), now 10 \(\w+\)"),
    "finetune_epochs": (1, "slimming-adapter epochs was 2, now 1"),
    "finetune_learning_rate": (1e-4, "slimming-adapter learning_rate was 0.001, now 0.0001"),
    "rank": (1, "rank was 2, now 1"),
    "label_weight": (0.5, "label_weight was 0.0, now 0.5; labels was None, now"),
    "lowest_budget": (0.7, "lowest_budget was 0.6, now 0.7"),
    "token_weight": (0.5, "token_weight was None, now 0.5"),
    "views": ("cached", "views was fresh, now cached"),
    "starts": ((1, 2), r"start was 2, now \[1, 2\]"),
    "target": ("features", r"target was None, now features; feature_blocks was None, now \[4\]"),
}
NO_EFFECT: dict[str, Any] = {
    "cache": Path("elsewhere"),
    "cache_gb": 2.0,
    "patch_weight": 0.25,  # of a classifier; for models without one see test_features.py
    "max_unreadable": 0.5,
    "save_every": 100.0,
    "tracker": None,
    "restart": False,
}


def test_every_setting_is_in_one_of_the_tables() -> None:
    elsewhere = {"finetune", "feature_blocks"}  # the latter needs another target: test_dense_fit.py
    assert {*CHANGES_RESULT, *NO_EFFECT, *elsewhere} == set(TrainingConfig.__dataclass_fields__)


@pytest.mark.parametrize("name", CHANGES_RESULT)
def test_a_changed_setting_is_refused_by_name(earlier: tuple[Path, list[Photo]], name: str) -> None:
    value, message = CHANGES_RESULT[name]
    assert_refused(earlier, message, config=replace(BOTH, **{name: value}))


@pytest.mark.parametrize("name", [None, *NO_EFFECT])
def test_a_setting_without_effect_on_the_result_resumes(
    earlier: tuple[Path, list[Photo]], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, photos = earlier
    before, lines = contents(out), (work_folder(out) / "metrics.jsonl").read_text()
    monkeypatch.chdir(out.parent)
    monkeypatch.setattr(loop, "_local_batch", lambda *args: pytest.fail("a step was taken"))
    run(out, photos, replace(BOTH, **{name: NO_EFFECT[name]}) if name else BOTH)
    assert contents(out) == before
    assert (work_folder(out) / "metrics.jsonl").read_text() == lines


# ---- model, photos and preprocessing

ModelChange = Callable[[SlimModel], SlimModel]


def backbone_scaled(part: float) -> ModelChange:
    def change(model: SlimModel) -> SlimModel:
        vit = copy.deepcopy(model.backbone.model)
        with torch.no_grad():
            vit.blocks[4].mlp.fc2.weight.mul_(1 + part)
        return patchlife.wrap(vit, model.settings)

    return change


def with_settings(**changes: Any) -> ModelChange:
    return lambda model: patchlife.wrap(model.backbone.model, replace(model.settings, **changes))


def scorer(seed: int) -> LifeRegressor:
    torch.manual_seed(seed)
    return LifeRegressor(48, 1)


MODELS: dict[str, tuple[ModelChange, str]] = {
    "another backbone": (
        lambda model: patchlife.wrap(liven(fresh("vit"), seed=9), model.settings),
        r"backbone was VisionTransformer, .* weights (\w+), now VisionTransformer, .* weights (?!\1)",
    ),
    "nearly the same backbone": (backbone_scaled(1e-4), r"backbone was .* weights (\w+), now .* weights (?!\1)"),
    "another start": (with_settings(start=1), "start was 2, now 1"),
    "other drops": (with_settings(drops=(2, 4)), r"drops was \[2, 3\], now \[2, 4\]"),
    "no merge": (with_settings(merge=False), "merge was True, now False"),
    "another state of dropped patches": (with_settings(restore="target"), "restore was residual, now target"),
    "a learned scorer": (
        lambda model: patchlife.wrap(model.backbone.model, model.settings, scorer(5)),
        r"initial scorer was new, now life-regressor, weights \w+",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_another_model_is_refused(earlier: tuple[Path, list[Photo]], name: str) -> None:
    change, message = MODELS[name]
    assert_refused(earlier, message, model=change(small_model()))


@pytest.mark.parametrize("config", [{"budget": 0.8}, {"mode": "adaptive"}, {"kept": (36, 36, 30, 20, 9)}])
def test_budget_schedule_and_mode_may_change(
    earlier: tuple[Path, list[Photo]], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, photos = earlier
    monkeypatch.setattr(loop, "_local_batch", lambda *args: pytest.fail("a step was taken"))
    changed = replace(small_model().settings, **config)
    fitted = run(out, photos, model=patchlife.wrap(small_model().backbone.model, changed))
    assert fitted.settings == changed
    assert patchlife.load(out, small_model().backbone.model).settings == changed


def test_another_initial_scorer_is_refused(tmp_path: Path) -> None:
    photos, vit = some_photos(tmp_path / "photos"), small_model().backbone.model
    once = replace(BOTH, epochs=0)
    first = run(tmp_path / "out", photos, once, patchlife.wrap(vit, small_model().settings, scorer(1)))
    with pytest.raises(CheckpointError, match=r"initial scorer was life-regressor, weights (\w+), now .* (?!\1)"):
        run(tmp_path / "out", photos, once, patchlife.wrap(vit, small_model().settings, scorer(2)))
    again = run(tmp_path / "out", photos, once, patchlife.wrap(vit, small_model().settings, scorer(1)))
    assert torch.equal(first.scorer.patch.weight, again.scorer.patch.weight)


def test_other_photos_and_other_preprocessing_are_refused(earlier: tuple[Path, list[Photo]], tmp_path: Path) -> None:
    _, photos = earlier
    assert_refused(earlier, r"photos was 12 \(\w+\), now 11 \(", photos=photos[1:])
    assert_refused(earlier, r"photos was 12 \((\w+)\), now 12 \((?!\1)", photos=photos[::-1])
    assert_refused(
        earlier, "preprocess crop_fraction was 1.0, now 0.9", preprocess=replace(PREPROCESS, crop_fraction=0.9)
    )
    assert_refused(earlier, r"preprocess mean was \[", preprocess=replace(PREPROCESS, mean=(0.1, 0.2, 0.3)))


def test_replaced_photos_are_refused(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    run(tmp_path / "out", photos)
    photos[5].path.write_bytes(photos[6].path.read_bytes())
    with pytest.raises(CheckpointError, match=r"photos was 12 \((\w+)\), now 12 \((?!\1)"):
        run(tmp_path / "out", photos)
    again = run(tmp_path / "out", photos, replace(BOTH, restart=True))
    fresh = run(tmp_path / "fresh", photos)
    assert torch.equal(again.scorer.patch.weight, fresh.scorer.patch.weight)


def test_moved_photos_are_accepted(earlier: tuple[Path, list[Photo]], tmp_path: Path) -> None:
    out, photos = earlier
    before = contents(out)
    shutil.copytree(photos[0].path.parent, tmp_path / "moved")
    run(out, [Photo(tmp_path / "moved" / photo.path.name, photo.label) for photo in photos])
    assert contents(out) == before


def test_changed_labels_are_refused_only_with_a_label_weight(tmp_path: Path) -> None:
    photos, config = some_photos(tmp_path / "photos"), replace(BOTH, label_weight=0.5)
    others = [Photo(photo.path, (photo.label + 1) % 3) for photo in photos]
    run(tmp_path / "out", photos, config)
    with pytest.raises(CheckpointError, match=r"labels was \w+, now \w+"):
        run(tmp_path / "out", others, config)
    run(tmp_path / "without", photos)
    run(tmp_path / "without", others)


# ---- resume and restart


def test_an_interrupted_run_is_not_resumed_with_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, original = some_photos(tmp_path / "photos"), loop.save_checkpoint

    def save_then_interrupt(path: Path, step: int, *state: Any) -> None:
        original(path, step, *state)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", photos)
    monkeypatch.setattr(loop, "save_checkpoint", original)
    with pytest.raises(CheckpointError, match=r"regression learning_rate was 0\.002, now 0\.1"):
        run(tmp_path / "out", photos, replace(BOTH, learning_rate=0.1))
    resumed, whole = run(tmp_path / "out", photos), run(tmp_path / "whole", photos)
    assert torch.equal(resumed.scorer.patch.weight, whole.scorer.patch.weight)


def test_restart_is_a_new_fit_on_the_cached_features(
    earlier: tuple[Path, list[Photo]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, photos = earlier
    other = replace(BOTH, learning_rate=1e-2, seed=4, views="cached")
    run(out.with_name("fresh"), photos, other)
    cached = contents(work_folder(out) / "cache")
    run(out, photos, replace(other, restart=True))
    assert contents(out) == contents(out.with_name("fresh"))
    restarted, fresh_lines = (lines(path) for path in (out, out.with_name("fresh")))
    assert [(line["stage"], line["step"], line["loss"]) for line in restarted] == [
        (line["stage"], line["step"], line["loss"]) for line in fresh_lines
    ]
    monkeypatch.setattr(
        "patchlife.training.caches.compute_targets", lambda *args: pytest.fail("the dense model ran again")
    )
    run(out, photos, replace(other, learning_rate=1e-3, restart=True))
    assert contents(work_folder(out) / "cache").keys() == cached.keys()


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work_folder(out) / "metrics.jsonl").read_text().splitlines()]


def test_stage_two_can_be_added_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 does not depend on stage 2, so a fit with stage 2 uses the stage 1 of a fit without."""
    photos = some_photos(tmp_path / "photos")
    run(tmp_path / "out", photos, QUICK)
    run(tmp_path / "out", photos, BOTH)
    run(tmp_path / "at once", photos, BOTH)
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    run(tmp_path / "out", photos, replace(BOTH, finetune="full"))
    run(tmp_path / "full", photos, replace(BOTH, finetune="full"))
    assert contents(tmp_path / "out") == contents(tmp_path / "full")
    monkeypatch.setattr(loop, "_local_batch", lambda *args: pytest.fail("a step was taken"))
    run(tmp_path / "out", photos, QUICK)
    assert not patchlife.load(tmp_path / "out", small_model().backbone.model).delta


def test_seconds_leave_out_stages_of_other_runs(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    validation = {"seen": photos[:4]}
    run(tmp_path / "out", photos, replace(BOTH, finetune="full"), validation=validation)
    run(tmp_path / "out", photos, BOTH, validation=validation)
    for stage in ("slimming-full", "slimming-adapter"):
        own = [line for line in lines(tmp_path / "out") if line["stage"] in ("regression", stage)]
        spent = sum(4 / line["photos_per_s"] for line in own if "photos_per_s" in line)
        assert [line for line in own if "validation" in line][-1]["seconds"] == pytest.approx(spent, rel=1e-3)
    run(tmp_path / "out", photos, replace(BOTH, seed=3, restart=True), validation=validation)
    first = next(line for line in lines(tmp_path / "out") if "validation" in line)
    assert (first["step"], first["seconds"]) == (0, 0)


def test_a_validation_set_with_other_photos_is_measured_again(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos", 16)
    sets = [{"seen": photos[12:14]}, {"seen": photos[12:15]}, {"seen": [Photo(p.path, 0) for p in photos[12:15]]}]
    for validation in sets:
        run(tmp_path / "out", photos[:12], QUICK, validation=validation)  # type: ignore[arg-type]
        results = [line for line in lines(tmp_path / "out") if "validation" in line]
        assert len({line["photos"] for line in results}) == 1
        run(tmp_path / "alone", photos[:12], replace(QUICK, restart=True), validation=validation)  # type: ignore[arg-type]
        last = [line for line in lines(tmp_path / "alone") if "validation" in line][-1]
        assert {**results[-1], "seconds": 0} == {**last, "seconds": 0}


def test_checkpoints_of_an_older_format_are_refused(earlier: tuple[Path, list[Photo]]) -> None:
    out, _ = earlier
    from patchlife.io.files import sha256_of
    from patchlife.io.folders import SUMS

    for state in (work_folder(out) / "regression").glob("*/state.json"):
        state.write_text(json.dumps({"step": json.loads(state.read_text())["step"]}))
        names = ("state.json", "state.safetensors")
        text = "".join(f"{sha256_of(state.with_name(name))}  {name}\n" for name in names)
        state.with_name(SUMS).write_text(text)
    assert_refused(earlier, "have format 1, this patchlife resumes format 4")


# ---- the saved adapter


def test_a_backbone_without_pretrained_cfg(tmp_path: Path) -> None:
    photos, vit = some_photos(tmp_path / "photos"), fresh("vit")
    del vit.pretrained_cfg
    fitted = run(tmp_path / "out", photos, BOTH, patchlife.wrap(vit, small_model().settings))
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(patchlife.load(tmp_path / "out", vit)(images), fitted(images))


def test_a_folder_with_other_content_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(AdapterError, match="out exists and is not a patchlife adapter"):
        run(tmp_path / "out", some_photos(tmp_path / "photos"))
    assert not work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("finetune", ["none", "adapter", "full"])
def test_the_adapter_keeps_schedule_and_mode(tmp_path: Path, finetune: str) -> None:
    photos, vit = some_photos(tmp_path / "photos", 16), small_model().backbone.model
    for config in (
        LifeConfig(kept=(36, 36, 30, 17, 9), start=2, drops=(2, 3)),
        LifeConfig(budget=0.7, mode="adaptive", start=2, drops=(2, 3)),
        LifeConfig(kept=(36, 36, 30, 17, 9), mode="adaptive", start=2, drops=(2, 3), merge=False),
    ):
        model = patchlife.wrap(vit, config)
        settings = replace(QUICK, finetune=finetune, restart=True)
        fitted = run(tmp_path / "out", photos[:12], settings, model, validation={"seen": photos[12:]})
        assert model.settings is config
        assert fitted.settings == config
        loaded = patchlife.load(tmp_path / "out", vit)
        assert loaded.settings == config
        assert loaded.schedule().kept == fitted.schedule().kept
        if config.kept:
            assert loaded.schedule().kept == config.kept


@pytest.mark.parametrize("finetune", ["none", "adapter", "full"])
def test_a_backbone_that_was_trained_after_wrapping(tmp_path: Path, finetune: str) -> None:
    """The trained model is the teacher; the adapter turns the original backbone into the fitted model."""
    photos, original = some_photos(tmp_path / "photos"), small_model().backbone.model
    model = patchlife.wrap(copy.deepcopy(original), small_model().settings)
    with torch.no_grad():
        model.backbone.model.blocks[4].mlp.fc1.weight.mul_(1.5)
        model.backbone.model.blocks[0].norm1.bias.add_(0.1)
    config = replace(QUICK, finetune=finetune)
    fitted = run(tmp_path / "out", photos, config, model)
    again = patchlife.load(tmp_path / "out", original)
    images = torch.randn(3, 3, 48, 48)
    for mode in ("fixed", "adaptive"):
        a, b = (m.set_mode(mode).set_budget(0.7)(images) for m in (fitted, again))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert (again.delta is not None and again.delta.learned) == (finetune != "none")
    if finetune == "none":  # the dense model is unchanged, so it can be the teacher again
        more = run(tmp_path / "more", photos, replace(BOTH, epochs=0), again)
        loaded = patchlife.load(tmp_path / "more", original)
        torch.testing.assert_close(more(images), loaded(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("restore", ["last", "residual"])
def test_the_last_state_of_dropped_patches_is_not_among_the_settings(tmp_path: Path, restore: Any) -> None:
    """Training always restored it before there was a choice, so a work folder of that time can go on."""
    model = small_model()
    model = SlimModel(model.backbone, model.settings.replace(restore=restore), model.scorer)
    settings = stage_configs_of(model, model.scorer, [Photo(tmp_path)], PREPROCESS, BOTH)[-1].run_settings
    assert settings.get("restore") == (None if restore == "last" else restore)
