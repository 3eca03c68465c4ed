"""ToMe against its paper (arXiv 2210.09461)."""

from __future__ import annotations

import pytest
import torch
from families import built, photos
from plain_blocks import attention_maps, backbone, images

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines.tome import ToMe, match, merge


def test_match_by_hand() -> None:
    """Patches 0, 2, 4 are matched with 1, 3: 0 is similar to 3, 2 is similar to 1, 4 to neither."""
    key = torch.tensor([[[1.0, 0.1], [0.0, 1.0], [0.2, 1.0], [1.0, 0.1], [-1.0, -1.0]]])
    unmerged, merged, target = match(key, 2)
    assert merged.tolist() == [[0, 1]]  # indices into the first set: patches 0 and 2, the most similar first
    assert target.tolist() == [[1, 0]]  # indices into the second set: patches 3 and 1
    assert unmerged.tolist() == [[2]]


def test_merge_by_hand() -> None:
    key = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.7, 0.7]]])
    patches = torch.tensor([[[3.0], [9.0], [5.0], [7.0]]])
    merged, size = merge(patches, torch.tensor([[1.0, 2.0, 1.0, 4.0]]), key, 1)
    assert merged.tolist() == [[[5.0], [(3 + 2 * 9) / 3], [7.0]]]
    assert size.tolist() == [[1.0, 3.0, 4.0]]


def test_two_patches_may_merge_into_one() -> None:
    key = torch.ones(1, 4, 2)
    merged, size = merge(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), torch.ones(1, 4), key, 2)
    assert sorted(size[0].tolist()) == [1.0, 3.0]
    assert (merged * size[..., None]).sum() == 10


def test_without_merging_it_is_the_dense_model() -> None:
    bb = backbone()
    model = ToMe(bb, (0,) * bb.depth)
    torch.testing.assert_close(model(images()), bb.model(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "deit-distilled"])
def test_sizes_sum_to_the_patches(name: str) -> None:
    bb, batch = adapt(built(name)), photos(name)
    tokens, size = ToMe(bb, (5,) * bb.depth).tokens(batch)
    assert tokens.shape[1] == bb.prefix + 36 - 5 * 5
    assert torch.allclose(size.sum(dim=1), torch.tensor(36.0))


def test_merging_is_size_weighted_and_attention_proportional() -> None:
    """The second block, written out with the sizes after the first one."""
    bb = backbone()
    model = ToMe(bb, (6, 0, 0, 0, 0))
    x = bb.embed(images()).tokens
    x, size = model.block(0, x, torch.ones(4, 36))
    block, attn = bb.model.blocks[1], bb.model.blocks[1].attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    whole = torch.cat((torch.ones(4, 1), size), dim=1)
    weight = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp() * whole[:, None, None]
    attention = weight / weight.sum(dim=-1, keepdim=True)
    y = x + attn.proj((attention @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(model.block(1, x, size)[0], y + block.mlp(block.norm2(y)), rtol=1e-4, atol=1e-5)


def test_keys_that_match_are_means_over_the_heads() -> None:
    bb = backbone()
    x, block = bb.embed(images()).tokens, bb.model.blocks[0]
    keys = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, -1))[:, 1:, 1].mean(dim=2)
    attention, value = attention_maps(bb.model, 0, x)
    y = x + block.attn.proj((attention @ value).transpose(1, 2).flatten(2))
    patches, _ = merge(y[:, 1:], torch.ones(4, 36), keys, 7)
    y = torch.cat((y[:, :1], patches), dim=1)
    expected = y + block.mlp(block.norm2(y))
    got = ToMe(bb, (7, 0, 0, 0, 0)).block(0, x, torch.ones(4, 36))[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_at_most_half_of_the_patches_merge_in_a_block() -> None:
    bb = backbone()
    _, size = ToMe(bb, (30,) * bb.depth).tokens(images())
    assert size.shape[1] == 2  # 36, 18, 9, 5, 3, 2
