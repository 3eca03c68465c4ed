"""The life regressor that is solved instead of trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import fresh, photos

import patchlife
from patchlife.errors import ConfigError
from patchlife.slimming.regressor import LifeRegressor
from patchlife.training.losses import importance_loss, similarity_loss
from patchlife.training.solved_scorer import solved_regressor, solved_scorer
from patchlife.training.targets import Targets, compute_targets

IMAGES, PATCHES, DIM = 40, 36, 24


def planted(prefix: int, seed: int = 0) -> Targets:
    """Targets that follow from the tokens: importance nonlinearly, embeddings linearly."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(IMAGES, prefix + PATCHES, DIM, generator=generator)
    weights = torch.Generator().manual_seed(99)
    direction, mixing = torch.randn(DIM, generator=weights), torch.randn(DIM, DIM, generator=weights)
    patches = F.layer_norm(tokens, (DIM,))[:, prefix:]
    importance = (2 * (patches @ direction / DIM**0.5).tanh()).softmax(dim=1)
    return Targets(tokens, importance, patches @ mixing, *[torch.empty(IMAGES, 0, DIM)] * 3)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_importance_and_similarity_of_new_images_are_predicted(prefix: int) -> None:
    scorer, new = solved_regressor(planted(prefix), prefix, width=64), planted(prefix, seed=1)
    logits, embedding = scorer.regress(new.tokens)
    uniform = importance_loss(torch.zeros_like(logits), new.importance)
    assert importance_loss(logits, new.importance) < 0.15 * uniform
    torch.manual_seed(0)
    fresh = LifeRegressor(DIM, prefix, 64).regress(new.tokens)[1]
    assert similarity_loss(embedding, new.embedding) < 0.05 * similarity_loss(fresh, new.embedding)


def test_it_is_deterministic_and_the_seed_draws_other_units() -> None:
    targets = planted(1)
    first, again, other = (solved_regressor(targets, 1, width=32, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.patch.weight, other.patch.weight)


def test_no_gradient_step_is_a_better_one() -> None:
    """The outputs are solved: a step along the gradient of importance does not lower the loss noticeably."""
    targets = planted(1)
    scorer = solved_regressor(targets, 1, width=32)
    loss = importance_loss(scorer.regress(targets.tokens)[0], targets.importance)
    (slope,) = torch.autograd.grad(loss, scorer.importance.weight)
    with torch.no_grad():
        scorer.importance.weight -= 0.1 * slope
    assert importance_loss(scorer.regress(targets.tokens)[0], targets.importance) > loss - 1e-4


def test_images_without_differences_are_refused() -> None:
    targets = planted(1)
    with pytest.raises(ConfigError, match="patches are alike"):
        solved_regressor(targets._replace(tokens=torch.ones_like(targets.tokens)), 1)


def test_a_scorer_for_several_start_blocks_scores_a_model() -> None:
    model = patchlife.wrap(fresh("vit"), patchlife.LifeConfig(budget=0.6))
    images = photos("vit", 6)
    scorer = solved_scorer(model.backbone, [images], starts=(2, 1))
    assert scorer.starts == (1, 2)
    alone = solved_regressor(compute_targets(model.backbone, images, 2), model.backbone.prefix)
    assert all(torch.equal(a, b) for a, b in zip(scorer.at(2).parameters(), alone.parameters(), strict=True))
    model.scorer = solved_scorer(model.backbone, [images[:4], images[4:]], starts=(2, 1))
    with torch.no_grad():
        assert model(images).isfinite().all()
    assert scorer.only([2]).starts == (2,)


@pytest.mark.parametrize(("batches", "message"), [([], "got none"), ([[torch.zeros(3, 8, 8)]], "got a list")])
def test_images_are_needed_in_batches(batches: list, message: str) -> None:
    model = patchlife.wrap(fresh("vit"))
    with pytest.raises(ConfigError, match=message):
        solved_scorer(model.backbone, batches, (1,))
