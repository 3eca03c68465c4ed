"""A-ViT against its paper (arXiv 2112.07658): a slow version that masks halted tokens, and halting by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from plain_blocks import backbone, images
from torch import Tensor, nn

from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.baselines.avit import AViT
from patchlife.errors import UnsupportedModelError


class ConstantHalting(AViT):
    """The halting score is ``shift`` for every token and block."""

    def halting(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), self.shift)


def masked(vit: nn.Module, model: AViT, x: Tensor) -> Tensor:
    """Logits of one image (1, tokens, dim), with halted tokens masked in attention instead of removed."""
    tokens = x.shape[1]
    total, active = torch.zeros(tokens), torch.ones(tokens, dtype=torch.bool)
    mean = torch.zeros(1, x.shape[2])
    for index, block in enumerate(vit.blocks):
        bias = torch.where(active, 0.0, -torch.inf)[None, None, None]
        x = torch.where(active[:, None], block(x, attn_mask=bias), x)
        last = index == len(vit.blocks) - 1
        score = torch.ones(tokens) if last else model.halting(x[0])
        halts = total + score >= 0.99
        mean += (1 - total[0] if halts[0] else score[0]) * x[:, 0]
        total = torch.where(active, total + score, total)
        active = active & ~halts
        if halts[0]:
            break
    return vit.head(vit.norm(mean))


@pytest.mark.parametrize("target", [0.8, 0.65, 0.5])
def test_removing_halted_tokens_equals_masking_them(target: float) -> None:
    bb = backbone()
    model = METHODS["a-vit"].build(bb, target, images())
    logits, entered = model.run(images())
    assert len({tuple(c[i] for c in entered) for i in range(4)}) > 1, "images halt in different ways"
    tokens = bb.embed(images()).tokens
    expected = torch.cat([masked(bb.model, model, one[None]) for one in tokens])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_number_of_tokens_never_grows() -> None:
    _, entered = METHODS["a-vit"].build(backbone(), 0.65, images()).run(images())
    for before, after in itertools.pairwise(entered):
        assert all(a <= b for a, b in zip(after, before, strict=True))


def test_a_halting_score_of_a_half_halts_after_two_blocks() -> None:
    _, entered = ConstantHalting(backbone(), 0.5).run(images())
    assert entered == [[37] * 4] * 2


def test_halting_after_the_first_block_classifies_its_output() -> None:
    bb = backbone()
    logits, entered = ConstantHalting(bb, 1.0).run(images())
    first = bb.model.blocks[0](bb.embed(images()).tokens)
    assert len(entered) == 1
    torch.testing.assert_close(logits, bb.model.head(bb.model.norm(first[:, 0])), rtol=1e-4, atol=1e-5)


def test_never_halting_is_the_dense_model() -> None:
    bb = backbone()
    torch.testing.assert_close(ConstantHalting(bb, 0.0)(images()), bb.model(images()), rtol=1e-4, atol=1e-5)


def test_several_prefix_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="one class token"):
        AViT(backbone("deit-distilled"), 0.0)
