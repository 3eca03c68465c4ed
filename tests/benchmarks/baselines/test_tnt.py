"""TNT with one layer against its paper (arXiv 2411.18092)."""

from __future__ import annotations

import pytest
import torch
from families import built, photos
from hypothesis import given
from hypothesis import strategies as st
from plain_blocks import backbone, images

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines.tnt import TokenNoise, without_redundant


def test_relevance_is_a_softmax_of_a_linear_layer() -> None:
    model, patches = TokenNoise(backbone(), 0.5), torch.randn(2, 7, 48)
    alpha = model.alpha(patches)
    assert torch.allclose(alpha.sum(dim=1), torch.ones(2))
    logits = patches @ model.relevance.weight[0] + model.relevance.bias
    assert torch.allclose(alpha, logits.softmax(dim=1), atol=1e-6)


def test_the_published_numbers() -> None:
    keep, similar = TokenNoise(backbone(), 0.6).kept(196)
    assert (keep, similar) == (117, 25)


@given(st.floats(0.01, 1), st.integers(1, 300))
def test_at_most_half_of_the_dropped_are_dropped_for_similarity(rate: float, patches: int) -> None:
    keep, similar = TokenNoise(backbone(), rate).kept(patches)
    assert 1 <= keep <= patches
    assert 0 <= 2 * similar <= patches - keep
    assert without_redundant(torch.randn(1, keep + similar, 3), similar).shape[1] == keep


def test_the_redundant_are_the_most_similar_across_a_random_division() -> None:
    patches = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1))
    patches[0, 7], patches[1, 3] = patches[0, 2], patches[1, 8]  # the same patch twice
    kept = without_redundant(patches, 3)
    assert kept.shape == (2, 9, 5)
    for image in range(2):
        assert all((patches[image] == row).all(dim=1).any() for row in kept[image])
    assert torch.equal(without_redundant(patches, 0), patches)


def test_of_two_equal_patches_in_different_sets_one_goes() -> None:
    from patchlife.benchmarks.baselines.tnt import _random_order

    order = _random_order(6, torch.device("cpu"))
    patches = torch.eye(6)[None].clone()
    patches[0, order[0]] = patches[0, order[5]]  # one in the first set, one in the second
    kept = without_redundant(patches, 1)[0]
    assert (kept == patches[0, order[5]]).all(dim=1).sum() == 1


def test_the_least_relevant_patches_are_dropped_once() -> None:
    """Written out, for a rate without patches dropped for similarity."""
    bb = backbone()
    model = TokenNoise(bb, 0.95)
    assert model.kept(36) == (34, 1)
    model.kept = lambda patches: (30, 0)  # type: ignore[method-assign]
    x = bb.model.blocks[0](bb.embed(images()).tokens)
    best = model.alpha(x[:, 1:]).topk(30).indices + 1
    x = torch.cat((x[:, :1], x[torch.arange(4)[:, None], best]), dim=1)
    for block in bb.model.blocks[1:]:
        x = block(x)
    torch.testing.assert_close(model(images()), bb.model.forward_head(bb.model.norm(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "parallel-things"])
def test_a_rate_of_one_is_the_dense_model(name: str) -> None:
    bb = adapt(built(name))
    torch.testing.assert_close(TokenNoise(bb, 1.0)(photos(name)), bb.model(photos(name)), rtol=1e-5, atol=1e-6)


def test_the_rate_can_be_set_after_training() -> None:
    model = TokenNoise(backbone(), 0.9)
    before = model.flops(images())
    model.rate = 0.3
    assert model.flops(images()) < before
    assert model(images()).shape == (4, 10)
