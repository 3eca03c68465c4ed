"""Random, class attention and the no-decision bound: our schedule, with another order of patches."""

from __future__ import annotations

import torch
from plain_blocks import attention_maps, backbone, images

from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.baselines.class_attention import ClassAttention
from patchlife.slimming.scorers import AttentionScorer


def test_class_attention_is_the_mean_row_of_the_attention_matrix() -> None:
    bb = backbone()
    tokens = bb.embed(images()).tokens
    expected = attention_maps(bb.model, 1, tokens)[0][:, :, 0, 1:].mean(dim=1)
    assert torch.allclose(ClassAttention()(tokens, None, bb, 1).score, expected, atol=1e-6)


def test_random_is_one_draw_for_all_images() -> None:
    model = METHODS["random"].build(backbone(), 0.65, images()).model
    life = model.lives(images()).life
    assert (life == life[:1]).all()
    assert not torch.equal(life[0], life[0].sort(descending=True).values)


def test_the_no_decision_bound_keeps_the_first_patches_of_the_grid() -> None:
    bb = backbone()
    bound = METHODS["no-decision-bound"].build(bb, 0.65, images())
    counts = bound.schedule.kept
    x = bb.embed(images()).tokens
    for index, n in enumerate(counts):
        x = bb.model.blocks[index](x[:, : 1 + n])
    assert torch.allclose(bound(images()), bb.model.forward_head(bb.model.norm(x)), atol=1e-6)


def test_ours_is_the_library_with_the_attention_scorer() -> None:
    model = METHODS["ours-fixed"].build(backbone(), 0.65, images()).model
    assert isinstance(model.scorer, AttentionScorer)
    assert model.settings.merge
    assert not METHODS["ours-slices"].build(backbone(), 0.65, images()).model.settings.merge
    assert METHODS["ours-adaptive"].build(backbone(), 0.65, images()).model.settings.mode == "adaptive"
