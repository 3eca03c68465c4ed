"""Fits without a classifier: what is distilled is the library's own output, and distillation brings it nearer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import built, fresh, liven
from made_targets import PREPROCESS, QUICK, some_photos
from torch import Tensor, nn

import patchlife
from patchlife import LifeConfig, SlimModel, wrap
from patchlife.config import TrainingConfig
from patchlife.data import Preprocess, read_photo
from patchlife.errors import CheckpointError, ConfigError
from patchlife.slimming.regressor import LifeRegressor
from patchlife.training import loop
from patchlife.training.fit import Fitted, accelerator_for, fit, work_folder
from patchlife.training.losses import feature_loss
from patchlife.training.stages import FeatureDistillation
from patchlife.training.target_cache import TargetCache
from patchlife.training.targets import compute_targets

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 48,
    "patch_size": 8,
}
KEPT = (36, 36, 12, 6, 6)
CONFIG = TrainingConfig(
    epochs=4,
    batch_size=10,
    finetune="adapter",
    finetune_epochs=12,
    finetune_learning_rate=3e-3,
    rank=4,
    lowest_budget=0.6,
    save_every=1e9,
)


def _made(kind: str, settings: str, **more: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = liven(getattr(transformers, kind)(getattr(transformers, settings)(**SIZES, **more)))
        for name, parameter in model.named_parameters():
            if "lambda1" in name:  # LayerScale
                parameter.data.fill_(0.5)
        return model.eval()

    return make


def _siglip() -> nn.Module:
    return _made("SiglipVisionModel", "SiglipVisionConfig")()


def _open_clip() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # open_clip imports timm by an old path
        tower = pytest.importorskip("open_clip.transformer").VisionTransformer
    return liven(tower(image_size=48, patch_size=8, width=48, layers=5, heads=3, mlp_ratio=2.0, output_dim=24)).eval()


HEADLESS: dict[str, Callable[[], nn.Module]] = {
    "dinov2": _made("Dinov2Model", "Dinov2Config"),
    "siglip": _siglip,
    "clip": _made("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=24),
    "open_clip": _open_clip,
    "timm": lambda: fresh("no-classifier"),
}
CLASSIFIER = _made("ViTForImageClassification", "ViTConfig", num_labels=10)


def images_of(photos: list, preprocess: Preprocess = PREPROCESS) -> Tensor:
    return torch.stack([preprocess(read_photo(photo.path)) for photo in photos])


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (work_folder(out) / "metrics.jsonl").read_text().splitlines()]


def untimed(lines: list[dict]) -> list[dict]:
    return [{name: v for name, v in line.items() if name not in ("photos_per_s", "seconds")} for line in lines]


# ---- targets


@pytest.mark.parametrize("name", ["dinov2", "siglip", "clip"])
def test_targets_are_the_librarys_own_attention_and_output(name: str, tmp_path: Path) -> None:
    model = HEADLESS[name]()
    backbone = wrap(model, LifeConfig(budget=0.9, start=2)).backbone
    images, values = images_of(some_photos(tmp_path, 4)), []
    model.set_attn_implementation("eager")  # gives attention maps
    hooks = [
        module.register_forward_hook(lambda *call: values.append(call[2]))
        for key, module in model.named_modules()
        if key.endswith("v_proj")
    ]
    with torch.no_grad():
        outputs = model(images, output_attentions=True)
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("sdpa")
    targets = compute_targets(backbone, images, 2, patches=True)
    prefix = backbone.prefix
    expected = torch.zeros_like(targets.importance)
    for attention, value in list(zip(outputs.attentions, values, strict=True))[2:]:
        read = attention.mean(dim=2) if name == "siglip" else attention[:, :, 0]  # (batch, heads, tokens)
        norms = value.unflatten(-1, (3, -1)).norm(dim=-1).transpose(1, 2)
        share = (read * norms)[:, :, prefix:].sum(dim=1)
        expected += share / share.sum(dim=1, keepdim=True) / 3
    torch.testing.assert_close(targets.importance, expected, rtol=1e-4, atol=1e-6)
    output = outputs.image_embeds if name == "clip" else outputs.pooler_output
    torch.testing.assert_close(targets.output, output, rtol=1e-4, atol=1e-4)
    if name != "clip":  # its last_hidden_state is before the norm
        torch.testing.assert_close(targets.patches, outputs.last_hidden_state[:, prefix:], rtol=1e-4, atol=1e-4)
    assert compute_targets(backbone, images, 2).patches.shape == (4, 0, 48)


# ---- losses


def test_equal_features_have_the_smallest_loss_and_no_gradient_problem() -> None:
    teacher, scale = torch.randn(4, 6, 8), torch.ones(8)
    student = teacher.clone().requires_grad_()
    loss, cosine = feature_loss(student, teacher, scale)
    loss.backward()
    assert loss.item() == pytest.approx(1e-3**0.75, rel=1e-3)
    assert cosine.item() == pytest.approx(1)
    assert student.grad.isfinite().all()
    assert feature_loss(teacher + 0.1 * torch.randn_like(teacher), teacher, scale)[0] > 1.5 * loss


def test_length_and_small_channels_count() -> None:
    teacher = torch.randn(4, 8)
    teacher[:, 0] += 100  # a channel that decides every cosine
    scale, other = teacher.std(dim=0), teacher.clone()
    other[:, 1] = -other[:, 1]
    for wrong in (1.5 * teacher, other):
        loss, cosine = feature_loss(wrong, teacher, scale)
        assert cosine > 0.999
        assert loss > 0.05


def test_the_loss_of_one_image_does_not_depend_on_the_others() -> None:
    student, teacher, scale = torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.rand(8) + 0.5
    alone = [feature_loss(student[i : i + 1], teacher[i : i + 1], scale)[0].item() for i in range(3)]
    assert feature_loss(student, teacher, scale)[0].item() == pytest.approx(sum(alone) / 3)


def test_scales_are_the_deviations_of_the_cached_features(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    output, patches = torch.randn(12, 8, generator=generator), torch.randn(12, 5, 8, generator=generator)
    output[:, 3], patches[..., 2] = 4.0, patches[..., 2] * 50
    arrays = [array.half().numpy() for array in (output, output, output, output, patches, output)]
    cache = TargetCache(some_photos(tmp_path), [], arrays)
    scales = FeatureDistillation(cache, 0.5)
    expected = patches.half().float().flatten(0, 1).std(dim=0, correction=0)
    torch.testing.assert_close(scales.patch_scale, expected, rtol=1e-3, atol=1e-3)
    constant = 0.01 * output.half().float().square().mean().sqrt()
    assert scales.output_scale[3].item() == pytest.approx(constant.item(), rel=1e-3)  # not 0: errors are divided by it


# ---- fits


@pytest.fixture(scope="module", params=HEADLESS)
def headless(request, tmp_path_factory) -> tuple[nn.Module, Fitted, Path, list]:
    """A small model without a classifier, its fit, the folder of the adapter, and photos held out."""
    folder = tmp_path_factory.mktemp(request.param)
    photos, model = some_photos(folder / "photos", 100), HEADLESS[request.param]()
    slim = wrap(model, LifeConfig(kept=KEPT, start=2))
    fitted = fit(
        slim, photos[:80], PREPROCESS, folder / "out", CONFIG, accelerator_for("cpu"), {"held out": photos[80:]}
    )
    return model, fitted, folder / "out", photos[80:]


def test_a_fit_brings_embeddings_of_new_photos_nearer_to_the_dense_ones(headless: tuple) -> None:
    model, fitted, out, held_out = headless
    images = images_of(held_out)
    torch.manual_seed(0)
    untrained = LifeRegressor(48, fitted.model.backbone.prefix)
    with torch.no_grad():
        dense = wrap(model, LifeConfig(budget=1.0, start=2)).output(images)
        before = wrap(model, LifeConfig(kept=KEPT, start=2), untrained).output(images)
        after = fitted.model.output(images)
    assert fitted.model.settings.kept == KEPT
    near, nearer = (torch.cosine_similarity(dense, output).mean().item() for output in (before, after))
    assert 1 - nearer < 0.9 * (1 - near)
    stage2 = [line for line in metrics(out) if line["stage"] == "slimming-adapter"]
    assert len([line for line in stage2 if "loss" in line]) == CONFIG.finetune_epochs * 7
    first, *_, last = (line["cosine"] for line in stage2 if "validation" in line)
    assert first < last


def test_the_result_is_of_the_librarys_class_and_survives_saving(headless: tuple) -> None:
    model, fitted, out, held_out = headless
    images = images_of(held_out)
    assert isinstance(fitted.model, SlimModel)
    if type(model).__module__.startswith(("transformers", "open_clip")):
        assert isinstance(fitted.model, type(model))
        assert type(fitted.model(images)) is type(model(images))
    again = patchlife.load(out, model)
    with torch.no_grad():
        torch.testing.assert_close(again.output(images), fitted.model.output(images), rtol=0, atol=1e-5)
        again.set_mode("adaptive")
        assert again.output(images).shape == fitted.model.output(images).shape


def test_validation_and_report_are_about_embeddings(headless: tuple) -> None:
    _, fitted, out, held_out = headless
    lines = [line for line in metrics(out) if "validation" in line]
    assert {line["stage"] for line in lines} == {"regression", "slimming-adapter"}
    assert all(0 < line["low_cosine"] <= line["cosine"] < 1 and 0 <= line["knn"] <= 1 for line in lines)
    assert len({line["dense_knn"] for line in lines}) == 1
    images = images_of(held_out)
    with torch.no_grad(), fitted.model.temporarily(kept=None, budget=lines[-1]["budget"]):
        output = fitted.model.output(images)
        dense = wrap(headless[0], LifeConfig(budget=1.0, start=2)).output(images)
    assert lines[-1]["cosine"] == pytest.approx(torch.cosine_similarity(dense, output).mean().item(), abs=2e-3)
    report = (work_folder(out) / "report.html").read_text()
    assert "cosine to the dense embedding" in report
    assert "accuracy of nearest neighbours on validation photos" in report


def test_stage_two_of_a_classifier_of_transformers_learns_from_logits_and_labels(tmp_path: Path) -> None:
    photos, model = some_photos(tmp_path / "photos", 60), CLASSIFIER()
    slim = wrap(model, LifeConfig(kept=KEPT, start=2))
    config = replace(CONFIG, label_weight=1.0, finetune_epochs=4)
    fitted = fit(slim, photos, PREPROCESS, tmp_path / "out", config, accelerator_for("cpu"))
    assert isinstance(fitted.model, type(model))
    lines = [line for line in metrics(tmp_path / "out") if line["stage"] == "slimming-adapter"]
    assert all("divergence" in line and "cosine" not in line for line in lines)
    images, labels = images_of(photos), torch.tensor([photo.label for photo in photos])
    with torch.no_grad():
        before, after = (nn.functional.cross_entropy(m.output(images), labels).item() for m in (slim, fitted.model))
        again = patchlife.load(tmp_path / "out", model)
        torch.testing.assert_close(again(images).logits, fitted.model.output(images), rtol=0, atol=1e-5)
    assert after < 0.9 * before


@pytest.mark.parametrize(("stop", "views"), [(2, "cached"), (5, "fresh")])
def test_a_fit_without_classifier_resumes_to_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, views: Any
) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    photos, model, config = some_photos(tmp_path / "photos"), _siglip(), replace(QUICK, finetune="adapter", views=views)

    def run(out: str) -> Fitted:
        slim = wrap(model, LifeConfig(kept=KEPT, start=2))
        return fit(slim, photos, PREPROCESS, tmp_path / out, config, accelerator_for("cpu"))

    run("whole")
    original = loop.save_checkpoint

    def save_then_interrupt(path: Path, step: int, *state) -> None:
        original(path, step, *state)
        if path.name.startswith("slimming") and step == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(loop, "save_checkpoint", original)
    run("parts")
    assert untimed(metrics(tmp_path / "parts")) == untimed(metrics(tmp_path / "whole"))
    whole, parts = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


# ---- settings


def test_patches_are_cached_only_where_they_are_distilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    photos, slim = some_photos(tmp_path / "photos"), wrap(built("no-classifier"), LifeConfig(kept=KEPT, start=2))
    for name, config, patches in (
        ("none", QUICK, 0),
        ("output", replace(QUICK, finetune="full", views="cached", patch_weight=0.0), 0),
        ("both", replace(QUICK, finetune="full", views="cached"), 36),
        ("fresh", replace(QUICK, finetune="full"), 0),  # computed at each step
        ("both-of-a-classifier", replace(QUICK, finetune="full", views="cached"), 0),
    ):
        of = wrap(built("vit"), LifeConfig(kept=KEPT, start=2)) if name.endswith("classifier") else slim
        fitted = fit(of, photos, PREPROCESS, tmp_path / name, config, accelerator_for("cpu"))
        assert fitted.cache.targets([0, 1]).patches.shape == (2, patches, 48)
        lines = [line for line in metrics(tmp_path / name) if line["stage"] == "slimming-full"]
        assert all(("patch_cosine" in line) == (name in ("both", "fresh")) for line in lines)


def test_another_patch_weight_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    photos, slim = some_photos(tmp_path / "photos"), wrap(built("no-classifier"), LifeConfig(kept=KEPT, start=2))
    config = replace(QUICK, finetune="full")
    fit(slim, photos, PREPROCESS, tmp_path / "out", config, accelerator_for("cpu"))
    with pytest.raises(CheckpointError, match=r"patch_weight was 0.5, now 0.25"):
        fit(slim, photos, PREPROCESS, tmp_path / "out", replace(config, patch_weight=0.25), accelerator_for("cpu"))


def test_photos_of_another_size_than_the_models_are_trained_on_at_their_size(tmp_path: Path) -> None:
    """DINOv2's image processor gives 224 pixels, and its position table is for 518."""
    photos, model = some_photos(tmp_path / "photos", 40), HEADLESS["dinov2"]()
    smaller = Preprocess(size=(32, 40), crop_fraction=1.0)
    slim = wrap(model, LifeConfig(budget=0.75, start=2, drops=(2, 3), mode="adaptive"))
    config = replace(QUICK, finetune="adapter", lowest_budget=0.7)
    fitted = fit(slim, photos[:32], smaller, tmp_path / "out", config, accelerator_for("cpu"), {"rest": photos[32:]})
    assert fitted.cache.image_size == (32, 40)
    output, lives = patchlife.load(tmp_path / "out", model).predict(images_of(photos[32:], smaller))
    assert lives.grid == (4, 5)
    assert output.shape == (8, 48)


def test_an_output_for_each_token_is_distilled_in_grid_order(tmp_path: Path) -> None:
    """A model without pooling gives its tokens; a student that drops nothing gives them exactly."""
    vit = fresh("unpooled")
    vit.reset_classifier(0, "")
    slim = wrap(vit.eval(), LifeConfig(kept=KEPT, start=2))
    photos = some_photos(tmp_path / "photos", 40)
    config = replace(QUICK, finetune="adapter")
    fitted = fit(slim, photos[:32], PREPROCESS, tmp_path / "out", config, accelerator_for("cpu"), {"r": photos[32:]})
    assert fitted.cache.targets([0]).output.shape == (1, 37, 48)
    assert fitted.cache.targets([0]).patches.shape == (1, 0, 48)
    assert all(line["cosine"] > 0.5 for line in metrics(tmp_path / "out") if "cosine" in line)


def test_a_teacher_that_cannot_be_trained_from_is_refused(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos")
    headless = wrap(built("no-classifier"), LifeConfig(kept=KEPT, start=2))
    with pytest.raises(ConfigError, match="label_weight needs a classifier"):
        fit(headless, photos, PREPROCESS, tmp_path / "out", replace(QUICK, label_weight=0.5), accelerator_for("cpu"))
    half = wrap(fresh("no-classifier").to(torch.bfloat16), LifeConfig(kept=KEPT, start=2))
    with pytest.raises(ConfigError, match=r"float32, got a model in torch.bfloat16"):
        fit(half, photos, PREPROCESS, tmp_path / "out", QUICK, accelerator_for("cpu"))
    assert not work_folder(tmp_path / "out").exists()
