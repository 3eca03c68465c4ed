"""MaMe: what is published (arXiv 2604.13432), and our reading of the rest."""

from __future__ import annotations

import pytest
import torch
from families import built, photos
from hypothesis import given
from hypothesis import strategies as st
from plain_blocks import backbone, images

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines.mame import MaMe, assignment, merge_by_matrix


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
def test_rows_of_the_matrix_sum_to_one_or_are_zero(
    sources: int, destinations: int, threshold: float, seed: int
) -> None:
    source, destination = random(sources, 6, seed=seed), random(destinations, 6, seed=seed + 1)
    matrix = assignment(source, destination, threshold)
    cosine = torch.cosine_similarity(source[:, None], destination[None], dim=-1)
    similar = (cosine.amax(dim=1) > threshold + 1e-5).float()
    assert (matrix >= 0).all()
    assert ((matrix.sum(dim=1) - 1).abs().minimum(matrix.sum(dim=1).abs()) < 1e-5).all()
    assert (matrix.sum(dim=1)[similar.bool()] > 0.5).all()
    assert (matrix[cosine < threshold - 1e-5] == 0).all()


@given(st.integers(2, 15), st.floats(0, 1), st.integers(0, 99))
def test_merging_conserves_sizes_and_their_weighted_sum(patches: int, threshold: float, seed: int) -> None:
    tokens, size = random(patches, 5, seed=seed), random(patches, seed=seed).abs() + 0.5
    merged, new_size = merge_by_matrix(tokens, size, threshold)
    torch.testing.assert_close(new_size.sum(), size.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        (merged * new_size[:, None]).sum(0), (tokens * size[:, None]).sum(0), rtol=1e-3, atol=1e-3
    )
    assert patches // 2 <= len(merged) <= patches


def test_merge_by_hand() -> None:
    """Sources 0, 2; destinations 1, 3. Source 0 is as similar to both, 2 to none."""
    patches = torch.tensor([[1.0, 1.0], [2.0, 0.0], [-1.0, -1.0], [0.0, 4.0]])
    merged, size = merge_by_matrix(patches, torch.tensor([2.0, 1.0, 1.0, 3.0]), 0.5)
    expected = torch.tensor([[-1.0, -1.0], [(2 + 1) / 2, 1 / 2], [1 / 4, (3 * 4 + 1) / 4]])
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(size, torch.tensor([1.0, 2.0, 4.0]))


@pytest.mark.parametrize("name", ["vit", "deit-distilled"])
def test_a_threshold_of_one_is_the_dense_model(name: str) -> None:
    bb = adapt(built(name))
    torch.testing.assert_close(MaMe(bb, 1.0)(photos(name)), bb.model(photos(name)), rtol=1e-4, atol=1e-5)


def test_it_merges_in_the_first_two_thirds_of_the_blocks() -> None:
    _, counts = MaMe(backbone(), 0.1).run(images())
    assert len({tuple(c) for c in counts[:4]}) == 4
    assert counts[3] == counts[4] == counts[5]


def test_the_number_of_tokens_depends_on_the_image() -> None:
    assert len(set(MaMe(backbone(), 0.3).run(images())[1][-1])) > 1


def test_a_lower_threshold_merges_more() -> None:
    flops = [MaMe(backbone(), threshold).flops(images()) for threshold in (0.1, 0.3, 0.5, 0.9)]
    assert flops == sorted(flops)
    assert flops[0] < flops[-1]


def test_a_block_without_merging_is_the_block() -> None:
    """Sizes of one: proportional attention is attention."""
    bb, model = backbone(), MaMe(backbone(), 1.0)
    x = bb.embed(images()).tokens
    got, size, counts = model.block(4, x.flatten(0, 1), torch.ones(4 * 37), [37] * 4)
    torch.testing.assert_close(got.view_as(x), bb.model.blocks[4](x), rtol=1e-4, atol=1e-5)
    assert counts == [37] * 4
    assert (size == 1).all()


def test_a_merged_token_counts_as_often_as_its_patches() -> None:
    """Two equal patches, or one of size two: the same attention."""
    bb, model = backbone(), MaMe(backbone(), 1.0)
    x = bb.embed(images()[:1]).tokens[0]
    double = torch.cat((x[:5], x[4:5]))
    once = model.block(4, x[:5], torch.tensor([1.0, 1, 1, 1, 2]), [5])[0]
    twice = model.block(4, double, torch.ones(6), [6])[0]
    torch.testing.assert_close(once, twice[:5], rtol=1e-4, atol=1e-5)
