"""`tune` finds the shapes that are nearest to the dense model, and leaves the model as it was."""

from __future__ import annotations

import pytest
import timm
import torch
from families import built, fresh, liven, photos
from torch import nn

import patchlife
from patchlife import LifeConfig, Shape, wrap
from patchlife.errors import ConfigError
from patchlife.evaluation.shape_search import candidates, tune
from patchlife.slimming.regressor import LifeRegressors


def silent_after(block: int) -> nn.Module:
    """A model of 12 blocks in which those from ``block`` on change nothing: to drop patches there costs nothing."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, num_heads=3, num_classes=10
    )
    liven(vit)
    for late in vit.blocks[block:]:
        for layer in (late.attn.proj, late.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return vit.eval()


def test_a_planted_better_shape_is_found() -> None:
    model = wrap(silent_after(4), LifeConfig(budget=0.6))
    before, progress = (model.settings, model.schedule()), []
    tuning = tune(model, [photos("vit", 8)], (0.5, 0.6), lambda *numbers: progress.append(numbers))
    assert (model.settings, model.schedule()) == before
    assert tuning.photos == 8
    for row in tuning.rows:
        assert row.before.drops == (3, 5, 8)
        assert row.loss_before > 1e-4
        assert (row.shape.start, row.loss) == (4, pytest.approx(0, abs=1e-6))
    assert progress[-1][0] == progress[-1][1]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    model.use_shapes(tuning.shapes)
    assert model.set_budget(0.55).start == 4
    torch.testing.assert_close(model(photos("vit", 8)), model.unwrap()(photos("vit", 8)), rtol=0, atol=1e-4)


def test_losses_are_those_of_the_model_with_these_shapes() -> None:
    model, images = wrap(built("vit"), LifeConfig(budget=0.7)), photos("vit", 40)
    tuning = tune(model, images.split(16), (0.6, 0.8))
    dense = built("vit")(images).log_softmax(1)
    model.use_shapes(tuning.shapes)
    for row in tuning.rows:
        found = model.set_budget(row.budget)(images).log_softmax(1)
        assert row.loss == pytest.approx((dense.exp() * (dense - found)).sum(1).mean().item(), rel=1e-4)
        assert row.loss <= row.loss_before
        assert model.shape.drops == row.shape.drops
    assert [shape.budget for shape in tuning.shapes][-1] == 1.0


def test_a_learned_scorer_keeps_its_starts() -> None:
    model = wrap(built("vit"), LifeConfig(budget=0.8), LifeRegressors(48, 1, (1, 3)).eval())
    for row in tune(model, [photos("vit", 4)], (0.6, 0.9)).rows:
        assert row.shape.start in (1, 3)


def test_a_model_without_a_classifier_is_compared_by_its_embedding() -> None:
    model, images = wrap(built("no-classifier"), LifeConfig(budget=0.7)), photos("no-classifier", 4)
    tuning = tune(model, [images], (0.7,))
    assert tuning.measure == "cosine distance"
    model.use_shapes(tuning.shapes)
    cosine = torch.cosine_similarity(model(images), built("no-classifier")(images))
    assert tuning.rows[0].loss == pytest.approx(1 - cosine.mean().item(), abs=1e-5)


def test_tuned_shapes_and_what_was_measured_are_saved(tmp_path) -> None:
    model = wrap(built("vit"), LifeConfig(budget=0.7))
    tuning = tune(model, [photos("vit", 4)], (0.6, 0.8))
    model.use_shapes(tuning.shapes).tuning = tuning.to_dict()
    loaded = patchlife.load(patchlife.save(model, tmp_path / "adapter"), built("vit"))
    assert (loaded.shapes, loaded.tuning) == (tuning.shapes, tuning.to_dict())


def test_what_cannot_be_searched_is_refused() -> None:
    model = wrap(built("vit"), LifeConfig(budget=0.7))
    with pytest.raises(ConfigError, match="on images, got none"):
        tune(model, [])
    with pytest.raises(ConfigError, match="images of one size"):
        tune(model, [[photos("vit", 1)[0]]])
    with pytest.raises(ConfigError, match=r"no budget of 0\.05 is within reach"):
        tune(model, [photos("vit", 2)], (0.05,))
    with pytest.raises(ConfigError, match="eval mode"):
        tune(wrap(fresh("vit"), LifeConfig(budget=0.7)).train(), [photos("vit", 2)])


@pytest.mark.parametrize("depth", range(2, 49))
def test_candidates_fit_any_depth(depth: int) -> None:
    for starts in (None, (1,), (max(1, depth // 6), max(1, depth // 4))):
        found = candidates(depth, starts)
        assert found
        assert len(set(found)) == len(found)
        assert all(1 <= block < depth for shape in found for block in shape.drops)
        assert starts is None or {shape.start for shape in found} == set(starts)
    assert Shape(1.0, (1, 3, 5, 7)) in candidates(12)


def test_budget_1_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"budgets must have one below 1.*got \(1\.0,\)"):
        tune(wrap(built("vit"), LifeConfig(0.6)), [photos("vit")], budgets=(1.0,))
