"""EViT against its paper (arXiv 2202.07800)."""

from __future__ import annotations

import torch
from plain_blocks import attention_maps, backbone, images

from patchlife.benchmarks.baselines.evit import EViT, fuse


def test_fuse_by_hand() -> None:
    patches = torch.tensor([[[1.0, 0.0], [0.0, 8.0], [4.0, 4.0], [2.0, 0.0]]])
    attention = torch.tensor([[0.1, 0.3, 0.5, 0.1]])
    fused = torch.tensor([[[4.0, 4.0], [(0.1 * 1 + 0.1 * 2) / 0.5, 0.3 * 8 / 0.5]]])
    torch.testing.assert_close(fuse(patches, attention, keep=1), fused)


def test_the_fused_token_is_the_attention_weighted_mean_of_the_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 20, 6, generator=generator)
    attention = torch.rand(3, 20, generator=generator).softmax(dim=1)
    kept = fuse(patches, attention, keep=8)
    for image in range(3):
        best = attention[image].topk(8).indices
        dropped = torch.ones(20, dtype=torch.bool)
        dropped[best] = False
        weight = attention[image, dropped]
        mean = (weight[:, None] * patches[image, dropped]).sum(0) / weight.sum()
        assert torch.allclose(kept[image, :8], patches[image, best])
        assert torch.allclose(kept[image, 8], mean, atol=1e-6)


def test_a_reducing_block_keeps_the_top_k_of_class_attention() -> None:
    """The block itself, written out: attention map, residual, top-k, fusion, MLP."""
    bb = backbone()
    x, block = bb.embed(images()).tokens, bb.model.blocks[1]
    attention, value = attention_maps(bb.model, 1, x)
    y = x + block.attn.proj((attention @ value).transpose(1, 2).flatten(2))
    y = torch.cat((y[:, :1], fuse(y[:, 1:], attention[:, :, 0, 1:].mean(dim=1), 18)), dim=1)
    expected = y + block.mlp(block.norm2(y))
    got = EViT(bb, 0.5).reducing_block(1, x)
    assert got.shape == (4, 1 + 18 + 1, 48)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_keeping_everything_is_the_dense_model() -> None:
    bb = backbone()
    torch.testing.assert_close(EViT(bb, 1.0)(images()), bb.model(images()), rtol=1e-5, atol=1e-6)
