"""ATS against its paper (arXiv 2111.15667)."""

from __future__ import annotations

import torch
from plain_blocks import attention_maps, backbone, images

from patchlife.benchmarks.baselines.ats import AdaptiveSampling, sample, significance


def test_sample_by_hand() -> None:
    """Cumulative 0.1, 0.7, 0.75, 1.0; four points 0.125, 0.375, 0.625, 0.875 select patches 1, 1, 1, 3."""
    kept, real = sample(torch.tensor([[0.1, 0.6, 0.05, 0.25]]), 4)
    assert kept.tolist() == [[1, 3]]
    assert real.tolist() == [[True, True]]


def test_even_scores_keep_everything() -> None:
    kept, real = sample(torch.full((1, 5), 0.2), 5)
    assert kept.tolist() == [[0, 1, 2, 3, 4]]
    assert real.all()


def test_at_most_k_patches_are_kept_and_padded_to_the_largest_number() -> None:
    score = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    kept, real = sample(score, 3)
    assert real.tolist() == [[True, False, False], [True, True, True]]
    assert kept[0, 0] == 0
    random = torch.rand(8, 40, generator=torch.Generator().manual_seed(0)) ** 4
    kept, real = sample(random, 12)
    assert kept.shape[1] == real.sum(dim=1).max() <= 12
    for row, valid in zip(kept, real, strict=True):
        assert len(set(row[valid].tolist())) == valid.sum()


def test_padding_is_never_chosen() -> None:
    """Masked tokens have no significance, wherever the sample points fall."""
    score = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    kept, real = sample(score, 9)
    assert kept[real].tolist() == [0, 1]


def test_significance_is_attention_times_value_norm() -> None:
    bb = backbone()
    tokens = bb.embed(images()).tokens
    attention, value = attention_maps(bb.model, 1, tokens)
    importance = attention[:, :, 0, 1:] * value[:, :, 1:].norm(dim=-1)
    expected = (importance / importance.sum(dim=-1, keepdim=True)).sum(dim=1)
    logits, v = bb.class_row(1, tokens), bb.project(1, tokens).v
    assert torch.allclose(significance(logits[..., 1:], v[:, 1:]), expected, atol=1e-5)


def test_in_a_sampling_block_kept_patches_attend_to_all_tokens() -> None:
    """The block written out for one image: rows of kept tokens in the attention matrix, all values."""
    bb = backbone()
    x, block = bb.embed(images()[:1]).tokens, bb.model.blocks[1]
    attention, value = attention_maps(bb.model, 1, x)
    importance = attention[:, :, 0, 1:] * value[:, :, 1:].norm(dim=-1)
    kept, _ = sample((importance / importance.sum(-1, keepdim=True)).sum(1), 15)
    rows = torch.cat((torch.zeros(1, dtype=torch.long), kept[0] + 1))
    y = x[:, rows] + block.attn.proj((attention @ value)[:, :, rows].transpose(1, 2).flatten(2))
    got, real = AdaptiveSampling(bb, 15).sampling_block(1, x, None)
    assert real.all()
    torch.testing.assert_close(got, y + block.mlp(block.norm2(y)), rtol=1e-4, atol=1e-5)


def test_padding_changes_no_image() -> None:
    model = AdaptiveSampling(backbone(), 20)
    widths = [model.run(one[None])[1] for one in images()]
    assert len({tuple(w) for w in widths}) > 1, "the batch needs padding"
    together = model(images())
    alone = torch.cat([model(one[None]) for one in images()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_many_samples_are_the_dense_model() -> None:
    bb = backbone()
    torch.testing.assert_close(AdaptiveSampling(bb, 200_000)(images()), bb.model(images()), rtol=1e-4, atol=1e-5)
