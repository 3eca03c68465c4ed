"""A-ViT against its paper (arXiv 2112.07658): a slow version that masks, and what halting means."""

from __future__ import annotations

import itertools

import pytest
import torch
from plain_blocks import backbone, images
from torch import Tensor, nn

from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.baselines.avit import AViT
from patchlife.errors import UnsupportedModelError


class Flat(AViT):
    """Every token does the same share of its work in every block."""

    def halting(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), self.shift)


def masked(vit: nn.Module, model: AViT, x: Tensor) -> Tensor:
    """One image (1, tokens, dim), with halted tokens hidden from attention instead of removed."""
    tokens = x.shape[1]
    total, alive = torch.zeros(tokens), torch.ones(tokens, dtype=torch.bool)
    answer = torch.zeros(1, x.shape[2])
    for index, block in enumerate(vit.blocks):
        bias = torch.where(alive, 0.0, -torch.inf)[None, None, None]
        x = torch.where(alive[:, None], block(x, attn_mask=bias), x)
        last = index == len(vit.blocks) - 1
        score = torch.ones(tokens) if last else model.halting(x[0])
        halts = total + score >= 0.99
        answer += (1 - total[0] if halts[0] else score[0]) * x[:, 0]
        total = torch.where(alive, total + score, total)
        alive = alive & ~halts
        if halts[0]:
            break
    return vit.head(vit.norm(answer))


@pytest.mark.parametrize("target", [0.8, 0.65, 0.5])
def test_removal_is_the_masked_model(target: float) -> None:
    bb = backbone()
    model = METHODS["a-vit"].build(bb, target, images())
    logits, entered = model.run(images())
    assert len({tuple(c[i] for c in entered) for i in range(4)}) > 1, "images are all alike"
    tokens = bb.embed(images()).tokens
    expected = torch.cat([masked(bb.vit, model, one[None]) for one in tokens])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_tokens_never_come_back() -> None:
    _, entered = METHODS["a-vit"].build(backbone(), 0.65, images()).run(images())
    for before, after in itertools.pairwise(entered):
        assert all(a <= b for a, b in zip(after, before, strict=True))


def test_a_share_of_a_half_halts_after_two_blocks() -> None:
    _, entered = Flat(backbone(), 0.5).run(images())
    assert entered == [[37] * 4] * 2


def test_halting_at_once_costs_one_block_and_reads_it() -> None:
    bb = backbone()
    logits, entered = Flat(bb, 1.0).run(images())
    first = bb.vit.blocks[0](bb.embed(images()).tokens)
    assert len(entered) == 1
    torch.testing.assert_close(logits, bb.vit.head(bb.vit.norm(first[:, 0])), rtol=1e-4, atol=1e-5)


def test_never_halting_is_the_dense_model() -> None:
    bb = backbone()
    torch.testing.assert_close(Flat(bb, 0.0)(images()), bb.vit(images()), rtol=1e-4, atol=1e-5)


def test_several_prefix_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="one class token"):
        AViT(backbone("deit-distilled"), 0.0)
