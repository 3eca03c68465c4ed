"""Similarities of many patches: in blocks of rows, in windows, in few dimensions; each against its slow definition."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import patchlife
from patchlife.flop_counter import counted
from patchlife.slimming import similarity
from patchlife.slimming.coverage import coverage_gain
from patchlife.slimming.merging import MergeTargets, adaptive_merge_targets, fixed_merge_targets, merge
from patchlife.slimming.schedule import Schedule
from patchlife.slimming.scorers import attention_received
from patchlife.slimming.similarity import most_similar, subspace, take, windows


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK", 100)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "WINDOW", 16)


@pytest.mark.parametrize("patches", [1, 2, 4096, 4097, 9216, 20000])
def test_windows_cover_every_patch_once_and_are_nearly_equal(patches: int) -> None:
    found = windows(patches)
    assert [i for w in found for i in range(w.start, w.stop)] == list(range(patches))
    sizes = [w.stop - w.start for w in found]
    assert max(sizes) <= similarity.WINDOW
    assert max(sizes) - min(sizes) <= 1


def test_blocks_of_rows_give_what_all_rows_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    importance, embedding = torch.rand(2, 37).softmax(dim=1), vectors(2, 37, 5)
    order = torch.rand(2, 37).argsort(dim=1)
    counts = torch.tensor([[37, 20, 20, 4], [37, 30, 9, 9]])

    def everything() -> list[Tensor]:
        fixed = fixed_merge_targets(embedding, order, Schedule((37, 20, 9), 1))
        adaptive = adaptive_merge_targets(embedding, order, counts)
        return [coverage_gain(importance, embedding), *fixed, *adaptive]

    whole = everything()
    monkeypatch.setattr(similarity, "_BLOCK", 100)
    for expected, got in zip(whole, everything(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("small_windows")
def test_a_patch_is_compared_within_its_window_only() -> None:
    importance, embedding = torch.rand(2, 40).softmax(dim=1), vectors(2, 40, 5)
    alone = [coverage_gain(importance[:, w], embedding[:, w]) for w in (slice(0, 13), slice(13, 26), slice(26, 40))]
    torch.testing.assert_close(coverage_gain(importance, embedding), torch.cat(alone, dim=1))


@pytest.mark.usefixtures("small_windows")
@given(seed=st.integers(0, 99), last=st.integers(1, 12))
def test_merge_targets_in_windows_are_the_most_similar_kept_patches_there(seed: int, last: int) -> None:
    kept, embedding = (40, 23, last), vectors(1, 40, 5, seed=seed)
    order = torch.rand(1, 40, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    fixed = fixed_merge_targets(embedding, order, Schedule(kept, 1))
    adaptive = adaptive_merge_targets(embedding, order, torch.tensor([kept]))
    for one, other in zip(fixed, adaptive, strict=True):
        torch.testing.assert_close(one, other)
    for rank, patch in enumerate(order[0].tolist()):
        left = next((n for n in kept if rank >= n), None)
        window = next(w for w in windows(40) if w.start <= patch < w.stop)
        candidates = [r for r in range(left or 0) if window.start <= order[0, r] < window.stop]
        if left is None:
            expected, weight = rank, 1.0
        elif not candidates:
            expected, weight = 0, 0.0
        else:
            expected = max(candidates, key=lambda r: float(embedding[0, order[0, r]] @ embedding[0, patch]))
            weight = max(0.0, float(embedding[0, order[0, expected]] @ embedding[0, patch]))
        assert fixed.rank[0, rank] == expected
        assert fixed.weight[0, rank] == pytest.approx(weight, abs=1e-6)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_flops_of_windows_are_counted(mode: Any) -> None:
    vit, images = families.built("vit"), families.photos("vit", 3)
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.7, start=1, drops=(1, 2)))
    assert len(windows(model.cost().patches)) > 1
    with torch.no_grad():
        model.calibrate([families.photos("vit", 6, seed=1)]).set_mode(mode)
        executed, (_, lives) = counted(model.predict, images)
    assert sum(model.flops_of(lives)) == executed


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, tuple | list) else [out]
        self.elements = max([self.elements, *(t.numel() for t in found if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("patches", [2500, 5000])
def test_no_tensor_of_the_decision_grows_with_the_square_of_the_patches(patches: int) -> None:
    importance, embedding = torch.rand(1, patches).softmax(dim=1), vectors(1, patches, 8)
    with Largest() as largest:
        order = coverage_gain(importance, embedding).argsort(dim=1)
        targets = fixed_merge_targets(embedding, order, Schedule((patches, patches // 2, patches // 4), 1))
        adaptive_merge_targets(embedding, order, torch.tensor([[patches, patches // 2, patches // 4]]))
        merge(vectors(1, patches, 8), torch.ones(1, patches), *targets.of(patches // 2, patches))
    assert largest.elements <= similarity._BLOCK + patches


def test_most_similar_gives_the_first_of_equal_columns() -> None:
    columns = vectors(1, 6, 4)[:, [0, 1, 2, 1, 4, 2]]
    index, cosine = most_similar(columns, columns)
    assert index.tolist() == [[0, 1, 2, 1, 4, 2]]
    torch.testing.assert_close(cosine, torch.ones(1, 6))


def test_take_gives_rows_by_their_index() -> None:
    rows, index = torch.randn(3, 9, 4), torch.randint(0, 9, (3, 5))
    torch.testing.assert_close(take(rows, index), rows.gather(1, index[..., None].expand(-1, -1, 4)))


def test_merging_by_sums_and_by_a_product_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    patches, size = torch.randn(3, 50, 8, generator=draw), 1 + torch.rand(3, 50, generator=draw)
    targets = MergeTargets(torch.randint(0, 20, (3, 30), generator=draw), torch.rand(3, 30, generator=draw))
    by_sums = merge(patches, size, *targets)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for expected, got in zip(by_sums, merge(patches, size, *targets), strict=True):
        torch.testing.assert_close(got, expected)


def test_few_dimensions_keep_the_cosines_of_vectors_near_a_subspace(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    x = normalize(torch.randn(2, 300, 10, generator=draw) @ torch.randn(10, 64, generator=draw), dim=-1)
    exact = x @ x.transpose(1, 2)
    for in_export in (False, True):
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda value=in_export: value)
        few = subspace(x, 16)
        assert few.shape == (2, 300, 16)
        torch.testing.assert_close(few @ few.transpose(1, 2), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dim", "rank"), [(192, 10), (32, 32), (64, 1)])
def test_a_basis_of_fewer_dimensions_than_asked_is_as_good_in_an_exported_graph(
    monkeypatch: pytest.MonkeyPatch, dim: int, rank: int
) -> None:
    """Directions that only rounding noise is left of must not get unit length."""
    draw = torch.Generator().manual_seed(0)
    x = normalize(torch.randn(2, 600, rank, generator=draw) @ torch.randn(rank, dim, generator=draw), dim=-1)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    few = subspace(x, 48)
    torch.testing.assert_close(few @ few.transpose(1, 2), x @ x.transpose(1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_a_run_does_not_use_the_default_device_of_torch(mode: Any) -> None:
    """A program that sets a GPU as the default may run a model on the CPU too."""
    images = families.photos("vit", 3)
    model = patchlife.wrap(families.built("vit")).calibrate([images]).set_mode(mode)
    expected = model(images)
    with torch.device("meta"):
        assert torch.equal(model(images), expected)


def test_attention_of_many_tokens_is_estimated_from_evenly_spaced_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = patchlife.wrap(families.built("gap")).backbone
    tokens = backbone.embed(families.photos("gap", 2)).tokens
    exact = attention_received(tokens, None, backbone, 1)
    q, k, _ = backbone.project(1, tokens, None)
    rows = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(dim=-1)
    torch.testing.assert_close(exact, rows.mean(dim=2)[..., backbone.prefix :])
    monkeypatch.setattr("patchlife.slimming.scorers.QUERIES", 10)
    step = -(-rows.shape[2] // 10)
    expected = rows[:, :, ::step].mean(dim=2)[..., backbone.prefix :]
    torch.testing.assert_close(attention_received(tokens, None, backbone, 1), expected)
