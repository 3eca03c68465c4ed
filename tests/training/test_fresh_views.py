"""Stage 2 on fresh views: teacher and student see the same images, drawn from seed and step only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import built
from made_targets import PREPROCESS, QUICK, small_model, some_photos
from torch import Tensor

from patchlife import LifeConfig, wrap
from patchlife.config import TrainingConfig
from patchlife.data import read_photo
from patchlife.errors import ConfigError
from patchlife.slimming.regressor import LifeRegressor
from patchlife.training import caches, photo_cache, view_targets
from patchlife.training import fit as fit_module
from patchlife.training.fit import Fitted, accelerator_for, fit, student_of, work_folder
from patchlife.training.photo_cache import collect_photos
from patchlife.training.stage import StageConfig, Step
from patchlife.training.stages import FeatureDistillation, Slimming
from patchlife.training.target_cache import Photo, TargetCache
from patchlife.training.targets import Targets, compute_targets
from patchlife.training.view_targets import ViewTargets
from patchlife.training.views import Draws

ADAPTER = replace(QUICK, finetune="adapter")
STAGE = StageConfig("views", epochs=2, batch_size=6, learning_rate=0.1)
CPU = torch.device("cpu")


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)


def run(out: Path, photos: list[Photo], config: TrainingConfig = ADAPTER, **more: Any) -> Fitted:
    return fit(small_model(), photos, PREPROCESS, out, config, accelerator_for("cpu"), **more)


def views_and_images(folder: Path, mixed: bool = True) -> tuple[ViewTargets, list[Tensor]]:
    """(fresh views of 12 photos, a list to which each batch of images that the dense model gets is added)."""
    photos, model, seen = some_photos(folder / "photos"), small_model(), []

    def targets_of(images: Tensor) -> Targets:
        seen.append(images)
        return compute_targets(model.backbone, images, model.start)

    return ViewTargets(collect_photos(photos, PREPROCESS, folder / "cache"), targets_of, PREPROCESS, CPU, mixed), seen


def test_views_follow_from_seed_and_step(tmp_path: Path) -> None:
    views, seen = views_and_images(tmp_path)
    rows = list(range(6))
    for config, step in ((STAGE, 3), (STAGE, 3), (STAGE, 4), (replace(STAGE, seed=1), 3)):
        views.step_targets(rows, slice(None), config.view_generator(step))
    first, again, other_step, other_seed = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, other_step)
    assert not torch.equal(first, other_seed)
    assert first.shape == (6, 3, 48, 48)
    assert first.abs().mean() < 3  # normalised


def test_processes_that_share_a_step_see_the_views_of_one(tmp_path: Path) -> None:
    views, seen = views_and_images(tmp_path)
    rows = [7, 3, 0, 11, 5, 8]
    whole = views.step_targets(rows, slice(None), STAGE.view_generator(0))
    parts = [views.step_targets(rows, slice(process, None, 3), STAGE.view_generator(0)) for process in range(3)]
    for process, part in enumerate(seen[1:]):
        assert torch.equal(part, seen[0][process::3])
    for process, part in enumerate(parts):
        torch.testing.assert_close(part.output, whole.output[process::3], rtol=1e-4, atol=1e-5)


def test_the_student_sees_what_the_teacher_sees(tmp_path: Path) -> None:
    """At budget 1 the untrained student is the dense model, so nothing is left to distil."""
    views, _ = views_and_images(tmp_path)
    fitted = run(tmp_path / "out", some_photos(tmp_path / "photos"), QUICK)
    stage = Slimming(student_of(fitted.model, ADAPTER), 0.6, 0.0, image_size=views.image_size)
    step = Step(views.step_targets(range(6), slice(None), STAGE.view_generator(0)), torch.full((6,), -1), 0.9999999)
    with torch.no_grad():
        assert stage(step)[1]["divergence"] < 1e-6
        assert stage(step._replace(random_draw=0.0))[1]["divergence"] > 1e-5


def test_targets_of_whole_photos_are_those_of_the_squashed_photos(tmp_path: Path) -> None:
    views, seen = views_and_images(tmp_path)
    targets = views.targets([4, 2])
    photos = some_photos(tmp_path / "photos")
    expected = torch.stack([PREPROCESS(read_photo(photos[row].path)) for row in (4, 2)])
    assert (seen[-1] - expected).abs().mean() < 0.05
    assert targets.output.shape == (2, 10)


def test_targets_are_in_single_precision_under_autocast(tmp_path: Path) -> None:
    views, _ = views_and_images(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        half = views.step_targets(range(6), slice(None), STAGE.view_generator(0))
    exact = views.step_targets(range(6), slice(None), STAGE.view_generator(0))
    assert {values.dtype for values in half} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(half.output, exact.output).min() > 0.99
    torch.testing.assert_close(half.importance.sum(dim=1), torch.ones(6), rtol=0, atol=0.02)


# ---- fits


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work_folder(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] != "regression"]


def test_epochs_have_other_views_and_only_fresh_views_need_pixels(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = some_photos(tmp_path / "photos")
    fresh = run(tmp_path / "fresh", photos)
    assert (work_folder(tmp_path / "fresh") / "cache-photos" / "pixels.npy").is_file()

    def none_left(paths: list[Path], *more: Any) -> Iterator[Any]:
        assert not paths, "photos were decoded for views"
        return iter(())

    monkeypatch.setattr(photo_cache, "load_pixels", none_left)
    cached = run(tmp_path / "cached", photos, replace(ADAPTER, views="cached"))
    run(tmp_path / "none", photos, QUICK)
    assert not (work_folder(tmp_path / "cached") / "cache-photos").exists()
    assert len(metrics(tmp_path / "fresh")) == len(metrics(tmp_path / "cached")) == 6
    assert not torch.equal(fresh.model.scorer.patch.weight, cached.model.scorer.patch.weight)
    again = run(tmp_path / "fresh", photos)  # the pixels of the earlier run are used
    assert torch.equal(again.model.scorer.patch.weight, fresh.model.scorer.patch.weight)


def test_without_stage_one_only_the_targets_of_calibration_and_report_are_collected(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, trained = some_photos(tmp_path / "photos", 40), []
    config = replace(ADAPTER, epochs=0, cache=tmp_path / "cache")
    first = run(tmp_path / "scorer", photos, replace(QUICK, cache=config.cache)).model
    whole_cache = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    monkeypatch.setattr(caches, "CALIBRATION_PHOTOS", 6)
    monkeypatch.setattr(caches, "_HELD_OUT", 2)
    original, reports = fit_module.train, []
    monkeypatch.setattr(
        fit_module, "train", lambda stage, cache, *more: trained.append(cache) or original(stage, cache, *more)
    )
    monkeypatch.setattr(fit_module, "write_report", lambda path, model, held_out, *more: reports.append(held_out))
    fitted = fit(first, photos, PREPROCESS, tmp_path / "out", config, accelerator_for("cpu"))
    held_out = {photo.path for photo in reports[0].photos}
    assert (len(fitted.cache), len(held_out)) == (6, 2)
    assert len(trained[0]) == fitted.summary["photos"] == 38
    assert not held_out & {photo.path for photo in trained[0].photos.photos}
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == whole_cache
    monkeypatch.setattr(caches, "compute_targets", lambda *args: pytest.fail("the targets of all photos were lost"))
    cached = fit(first, photos, PREPROCESS, tmp_path / "c", replace(config, views="cached"), accelerator_for("cpu"))
    assert len(cached.cache) == 38


def test_nothing_is_mixed_if_labels_are_in_the_loss(
    tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[Draws] = []
    original = view_targets.draw_views
    monkeypatch.setattr(view_targets, "draw_views", lambda *args: draws.append(original(*args)) or draws[-1])
    photos = some_photos(tmp_path / "photos")
    run(tmp_path / "out", photos)
    assert any((draw.weight < 1).any() for draw in draws)
    draws.clear()
    run(tmp_path / "labels", photos, replace(ADAPTER, label_weight=0.5))
    assert len(draws) == 6
    assert all((draw.weight == 1).all() for draw in draws)
    assert any((draw.extent < 0).any() for draw in draws)


def test_unreadable_photos_are_left_out_of_both_stages_and_named_once(tmp_path: Path, no_report: None) -> None:
    photos = some_photos(tmp_path / "photos", 24)
    photos[3].path.write_bytes(b"not a photo")
    fitted = run(tmp_path / "out", photos, replace(ADAPTER, max_unreadable=0.1))
    assert [entry["path"] for entry in fitted.summary["skipped"]] == [str(photos[3].path)]
    assert fitted.summary["photos"] == 22  # one of 23 is held out


def test_the_limit_of_the_cache_holds_for_pixels_too(tmp_path: Path, no_report: None) -> None:
    photos = some_photos(tmp_path / "photos", 24)
    fitted = run(tmp_path / "out", photos, replace(ADAPTER, cache_gb=10.5 * (3 * 64 * 64 + 4) / 1e9))
    assert len(metrics(tmp_path / "out")) == 2 * (10 // 4)
    assert fitted.summary["photos"] >= 10


def test_views_must_be_known() -> None:
    with pytest.raises(ConfigError, match="views must be one of fresh, cached, got 'random'"):
        replace(QUICK, views="random")  # type: ignore[arg-type]


# ---- tokens


def _patches(each: Any) -> Tensor:
    return each[0] if isinstance(each, tuple) else each


def cache_of(targets: Targets, folder: Path) -> TargetCache:
    return TargetCache(some_photos(folder, len(targets.output)), [], [values.half().numpy() for values in targets])


@pytest.mark.parametrize("name", ["vit", "no-classifier", "class-and-gap"])
def test_image_tokens_are_those_of_the_dense_model_and_of_the_student(name: str, tmp_path: Path) -> None:
    """Reference: the blocks of the library, called one after the other."""
    vit = built(name)
    model = wrap(vit, LifeConfig(budget=0.7, start=2), LifeRegressor(48, wrap(vit).backbone.prefix))
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    targets = compute_targets(model.backbone, images, 2, image_tokens=True)
    with torch.no_grad():
        expected = vit.forward_intermediates(
            images, [2, 3, 4], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        found = model.forward_intermediates(
            images, [2, 3, 4], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    of_dense, of_slimmed = (
        torch.stack(
            [each[1][:, 0] if model.backbone.reads_class else _patches(each).mean(dim=1) for each in maps], dim=1
        )
        for maps in (expected, found)
    )
    torch.testing.assert_close(targets.image_tokens, of_dense, rtol=1e-4, atol=1e-4)
    features = None if model.backbone.num_classes else FeatureDistillation(cache_of(targets, tmp_path), 0.0)
    plain, weighted = (Slimming(model, 0.7, 0.0, features, token_weight=weight) for weight in (0.0, 2.0))
    step = Step(targets, torch.full((4,), -1), 0.0)
    loss, numbers = weighted(step)
    cosine = torch.cosine_similarity(of_dense, of_slimmed, dim=-1).mean().item()
    assert numbers["token_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert (loss - plain(step)[0]).item() == pytest.approx(2 * (1 - cosine), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("views", ["fresh", "cached"])
def test_a_fit_with_a_token_weight_brings_image_tokens_nearer(tmp_path: Path, no_report: None, views: Any) -> None:
    photos = some_photos(tmp_path / "photos")
    changes: dict[str, Any] = {"finetune": "full", "finetune_epochs": 16, "finetune_learning_rate": 1e-3}
    run(tmp_path / "out", photos, replace(QUICK, **changes, views=views, token_weight=1.0, save_every=100.0))
    cosines = [line["token_cosine"] for line in metrics(tmp_path / "out")]
    assert 1 - sum(cosines[-9:]) / 9 < 0.8 * (1 - sum(cosines[:9]) / 9)
    stored = json.loads((work_folder(tmp_path / "out") / "fit.json").read_text())["seconds_per_step"]
    assert all(0 < seconds < 10 for seconds in stored.values())
    assert set(stored) == {"regression", "slimming-full"}
