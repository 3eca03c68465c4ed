"""PPT against its paper (arXiv 2310.01812)."""

from __future__ import annotations

import pytest
import torch
from families import built, photos
from plain_blocks import attention_maps, backbone, images

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.baselines.ppt import _TRIED, THRESHOLD, PrunePool, prunes, tuned
from patchlife.benchmarks.baselines.tome import ToMe

REMOVED = (0, 6, 5, 0, 8)
ALWAYS_PRUNES, ALWAYS_POOLS = -1.0, 1e9


def test_images_with_uneven_scores_prune() -> None:
    score = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01], [0.2, 0.3, 0.2, 0.3]])
    assert prunes(score, 0.01).tolist() == [False, True, False]
    assert prunes(score, 0.001).tolist() == [False, True, True]


def test_a_high_threshold_is_pure_pooling_as_in_tome() -> None:
    bb = backbone()
    tokens, size = PrunePool(bb, REMOVED, ALWAYS_POOLS).tokens(images())
    expected, expected_size = ToMe(bb, REMOVED).tokens(images())
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(size, expected_size)


def test_a_low_threshold_is_pure_pruning() -> None:
    """Written out: the patches with the lowest class attention times value norm go."""
    bb, x = backbone(), backbone().embed(images()).tokens
    for index, count in enumerate(REMOVED):
        block = bb.model.blocks[index]
        attention, value = attention_maps(bb.model, index, x)
        x = x + block.attn.proj((attention @ value).transpose(1, 2).flatten(2))
        importance = attention[:, :, 0, 1:] * value[:, :, 1:].norm(dim=-1)
        score = (importance / importance.sum(dim=-1, keepdim=True)).mean(dim=1)
        best = score.topk(x.shape[1] - 1 - count).indices + 1
        x = torch.cat((x[:, :1], x[torch.arange(4)[:, None], best]), dim=1)
        x = x + block.mlp(block.norm2(x))
    model = PrunePool(bb, REMOVED, ALWAYS_PRUNES)
    tokens, size = model.tokens(images())
    torch.testing.assert_close(model(images()), bb.model.forward_head(bb.model.norm(x)), rtol=1e-4, atol=1e-5)
    assert torch.equal(size, torch.ones(4, 36 - 19))
    assert tokens.shape[1] == 1 + 36 - 19


def test_images_of_a_batch_choose_for_themselves() -> None:
    bb, removed = backbone(), (0, 6, 0, 0, 0)
    pruning, pooling = (PrunePool(bb, removed, t)(images()) for t in (ALWAYS_PRUNES, ALWAYS_POOLS))
    attention, value = attention_maps(bb.model, 1, bb.model.blocks[0](bb.embed(images()).tokens))
    importance = attention[:, :, 0, 1:] * value[:, :, 1:].norm(dim=-1)
    variance = (importance / importance.sum(dim=-1, keepdim=True)).mean(dim=1).var(dim=1, correction=0)
    between = variance.sort().values[1:3].mean().item() / (196 / 36) ** 2
    got = PrunePool(bb, removed, between)(images())
    uneven = variance > variance.median()
    torch.testing.assert_close(got, torch.where(uneven[:, None], pruning, pooling), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "deit-distilled"])
def test_removing_nothing_is_the_dense_model(name: str) -> None:
    bb = adapt(built(name))
    got = PrunePool(bb, (0,) * 5)(photos(name))
    torch.testing.assert_close(got, bb.model(photos(name)), rtol=1e-5, atol=1e-6)


def test_at_most_half_of_the_patches_go_in_a_block() -> None:
    assert PrunePool(backbone(), (30,) * 5).tokens(images())[1].shape[1] == 2  # 36, 18, 9, 5, 3, 2


def test_the_blocks_are_the_published_ones_where_they_suffice() -> None:
    build = METHODS["ppt"].build
    assert "blocks (1, 2, 3)" in build(backbone(), 0.8, images()).knob
    assert "blocks (0, 1, 2, 3, 4)" in build(backbone(), 0.4, images()).knob
    assert build(backbone(), 0.8, images()).threshold == THRESHOLD


def test_the_tuned_threshold_is_the_one_closest_to_the_dense_model() -> None:
    bb = backbone()
    best = tuned(bb, 0.6, images())
    dense = bb.model(images()).log_softmax(dim=1)

    def divergence(model: PrunePool) -> float:
        return (dense.exp() * (dense - model(images()).log_softmax(dim=1))).sum(dim=1).mean().item()

    assert divergence(best) == pytest.approx(
        min(divergence(PrunePool(bb, best.removed, threshold)) for threshold in _TRIED), rel=1e-4
    )
    assert best.removed == METHODS["ppt"].build(bb, 0.6, images()).removed
