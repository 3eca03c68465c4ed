"""`run_block`, `project` and `class_row` compute the same as the timm block itself."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, PRESENT, built, fresh, photos
from timm.models.vision_transformer import Block
from torch import Tensor

from patchlife import wrap
from patchlife.backbones import Backbone, adapt, sdpa
from patchlife.errors import UnsupportedModelError


def assert_close(got: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1)
    assert torch.isfinite(expected).all()
    assert (got - expected).abs().max() <= 1e-5 * scale


def attention_logits(backbone: Backbone, index: int, x: Tensor, rope: Tensor | None) -> Tensor:
    """Attention logits (batch, heads, queries, keys) from the projections of all tokens."""
    q, k, _ = backbone.project(index, x, rope)
    return q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_run_block_computes_what_the_block_computes(name: str) -> None:
    backbone = adapt(built(name))
    x, rope, *_ = backbone.embed(photos(name))
    for index in range(backbone.depth):
        closed = backbone.block(index, x, backbone.rope_of(rope, index))
        opened = backbone.block_with(index, x, sdpa, backbone.token_rope(rope, index))
        assert (closed - x).abs().mean() > 0.05, "the block has almost no effect, so the comparison proves nothing"
        assert_close(opened, closed)
        x = closed


@pytest.mark.parametrize("name", FAMILIES)
def test_run_block_takes_packed_tokens(name: str) -> None:
    """Packed tokens have no batch dimension; adaptive mode passes them."""
    backbone = adapt(built(name))
    x, rope, *_ = backbone.embed(photos(name, 1))
    table = backbone.token_rope(rope, 1)
    packed = backbone.block_with(1, x[0], sdpa, None if table is None else table[0])
    assert_close(packed, backbone.block(1, x, backbone.rope_of(rope, 1))[0])


@pytest.mark.parametrize("name", [name for name in PRESENT if adapt(built(name)).reads_class])
def test_class_row_is_a_row_of_the_attention_logits(name: str) -> None:
    """Compared after softmax, because `class_row` leaves out a constant per row."""
    backbone = adapt(built(name))
    x, rope, *_ = backbone.embed(photos(name))
    for index in (0, backbone.depth - 1):
        table = backbone.token_rope(rope, index)
        row = backbone.class_row(index, x, table)
        expected = attention_logits(backbone, index, x, table)[:, :, 0].softmax(-1)
        assert expected.std() > 1e-3, "attention is almost uniform, so the comparison proves nothing"
        assert_close(row.softmax(-1), expected)


def test_rotations_have_an_effect_in_rope_families() -> None:
    """Without an effect, no test would fail if the tables were not permuted with the patches."""
    for name in ("eva02", "dinov3", "rope-mixed", "rope-multimodal", "perception-encoder"):
        backbone = adapt(built(name))
        x, rope, *_ = backbone.embed(photos(name))
        table = backbone.token_rope(rope, 1)
        unrotated = backbone.block_with(1, x, sdpa, None)
        assert (backbone.block_with(1, x, sdpa, table) - unrotated).abs().max() > 1e-2


def test_a_block_that_changed_in_timm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, **more: forward(self, x, **more) * 1.01)
    with pytest.raises(UnsupportedModelError, match="Block of the installed timm computes something else"):
        wrap(fresh("vit"))


@pytest.mark.parametrize("index", range(5))
def test_one_unknown_block_is_refused(index: int) -> None:
    class Halved(Block):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return super().forward(x, **more) / 2

    vit = fresh("vit")
    vit.blocks[index].__class__ = Halved
    with pytest.raises(UnsupportedModelError, match="got Halved with Attention"):
        wrap(vit)


def test_checking_a_block_does_not_change_it() -> None:
    vit = fresh("deit3").bfloat16().train()
    adapt(vit)
    assert vit.blocks[0].training
    assert next(vit.blocks[0].parameters()).dtype == torch.bfloat16
