"""Opening a timm block up (`run_block`, `project`, `class_row`) computes what the closed block computes."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, PRESENT, built, fresh, photos
from timm.models.vision_transformer import Block
from torch import Tensor

from patchlife import wrap
from patchlife.backbones import Backbone, adapt, sdpa
from patchlife.errors import UnsupportedModelError


def close(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max().clamp(min=1)
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= 1e-5 * scale


def attention_logits(backbone: Backbone, index: int, x: Tensor, rope: Tensor | None) -> Tensor:
    """(batch, heads, queries, keys), from all the projections that the block itself would make."""
    q, k, _ = backbone.project(index, x, rope)
    return q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_opened_blocks_are_the_blocks(name: str) -> None:
    backbone = adapt(built(name))
    x, rope, *_ = backbone.embed(photos(name))
    for index in range(backbone.depth):
        closed = backbone.block(index, x, backbone.rope_of(rope, index))
        opened = backbone.block_with(index, x, sdpa, backbone.token_rope(rope, index))
        assert (closed - x).abs().mean() > 0.05, "a block that does nothing proves nothing"
        close(opened, closed)
        x = closed


@pytest.mark.parametrize("name", FAMILIES)
def test_opened_blocks_take_packed_tokens(name: str) -> None:
    """Without a batch dimension: tokens of one image, as ragged runs hand them over."""
    backbone = adapt(built(name))
    x, rope, *_ = backbone.embed(photos(name, 1))
    table = backbone.token_rope(rope, 1)
    packed = backbone.block_with(1, x[0], sdpa, None if table is None else table[0])
    close(packed, backbone.block(1, x, backbone.rope_of(rope, 1))[0])


@pytest.mark.parametrize("name", [name for name in PRESENT if adapt(built(name)).reads_class])
def test_the_class_row_is_a_row_of_attention(name: str) -> None:
    """Up to a constant that softmax does not see."""
    backbone = adapt(built(name))
    x, rope, *_ = backbone.embed(photos(name))
    for index in (0, backbone.depth - 1):
        table = backbone.token_rope(rope, index)
        row = backbone.class_row(index, x, table)
        whole = attention_logits(backbone, index, x, table)[:, :, 0].softmax(-1)
        assert whole.std() > 1e-3, "even attention proves nothing"
        close(row.softmax(-1), whole)


def test_a_rope_family_rotates() -> None:
    """Otherwise permuting the tables with the patches could be forgotten without any test noticing."""
    for name in ("eva02", "dinov3", "rope-mixed", "rope-multimodal", "perception-encoder"):
        backbone = adapt(built(name))
        x, rope, *_ = backbone.embed(photos(name))
        table = backbone.token_rope(rope, 1)
        still = backbone.block_with(1, x, sdpa, None)
        assert (backbone.block_with(1, x, sdpa, table) - still).abs().max() > 1e-2


def test_a_timm_that_changed_its_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, **more: theirs(self, x, **more) * 1.01)
    with pytest.raises(UnsupportedModelError, match="Block of the installed timm computes something else"):
        wrap(fresh("vit"))


@pytest.mark.parametrize("odd", range(5))
def test_one_odd_block_among_good_ones_is_refused(odd: int) -> None:
    class Halved(Block):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return super().forward(x, **more) / 2

    vit = fresh("vit")
    vit.blocks[odd].__class__ = Halved
    with pytest.raises(UnsupportedModelError, match="got Halved with Attention"):
        wrap(vit)


def test_checking_a_block_does_not_touch_it() -> None:
    vit = fresh("deit3").bfloat16().train()
    adapt(vit)
    assert vit.blocks[0].training
    assert next(vit.blocks[0].parameters()).dtype == torch.bfloat16
