"""DiffRate against its paper (arXiv 2305.17997)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import built, fresh, photos
from plain_blocks import attention_maps, backbone, images
from torch import Tensor

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines.base import dense_flops
from patchlife.benchmarks.baselines.diffrate import DiffRate, Rates, compress, meeting, searched_method, uniform
from patchlife.benchmarks.baselines.diffrate_search import (
    RateChoice,
    masked_logits,
    refined_rates,
    searched_diffrate,
)
from patchlife.errors import ConfigError
from patchlife.evaluation.agreement import kl_divergence

NONE = (0,) * 5


def test_compress_by_hand() -> None:
    """By attention 2, 0, 3, 1: patch 1 is pruned, patch 3 merges into 0, which is more similar to it than 2."""
    patches = torch.tensor([[[3.0, 0.0], [9.0, 9.0], [0.0, 1.0], [6.0, 1.0]]])
    size = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    kept, sizes = compress(patches, size, torch.tensor([[0.3, 0.1, 0.4, 0.2]]), pruned=1, merged=1)
    torch.testing.assert_close(kept, torch.tensor([[[0.0, 1.0], [(3 + 2 * 6) / 3, 2 / 3]]]))
    assert sizes.tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize("name", ["vit", "deit-distilled"])
def test_rates_of_zero_are_the_dense_model(name: str) -> None:
    bb = adapt(built(name))
    got = DiffRate(bb, Rates(36, NONE, NONE))(photos(name))
    torch.testing.assert_close(got, bb.model(photos(name)), rtol=1e-5, atol=1e-6)


def test_without_merging_it_sorts_and_prunes() -> None:
    """Written out: after each attention the patches with the lowest class attention go."""
    bb, pruned = backbone(), (3, 0, 7, 5, 6)
    x = bb.embed(images()).tokens
    for index, count in enumerate(pruned):
        block = bb.model.blocks[index]
        attention, value = attention_maps(bb.model, index, x)
        x = x + block.attn.proj((attention @ value).transpose(1, 2).flatten(2))
        best = attention[:, :, 0, 1:].mean(dim=1).topk(x.shape[1] - 1 - count).indices + 1
        x = torch.cat((x[:, :1], x[torch.arange(4)[:, None], best]), dim=1)
        x = x + block.mlp(block.norm2(x))
    expected = bb.model.forward_head(bb.model.norm(x))
    torch.testing.assert_close(DiffRate(bb, Rates(36, pruned, NONE))(images()), expected, rtol=1e-4, atol=1e-5)


def test_without_pruning_sizes_sum_to_the_patches() -> None:
    merged = (4, 6, 0, 9, 3)
    tokens, size = DiffRate(backbone(), Rates(36, NONE, merged)).tokens(images())
    assert tokens.shape[1] == 1 + 36 - sum(merged)
    assert torch.allclose(size.sum(dim=1), torch.tensor(36.0))


def test_pruned_and_merged_patches_are_gone() -> None:
    tokens, size = DiffRate(backbone(), Rates(36, (2, 3, 0, 1, 2), (4, 0, 5, 1, 1))).tokens(images())
    assert tokens.shape[1] == 1 + 36 - 8 - 11
    assert (size.sum(dim=1) < 36).all()


@pytest.mark.parametrize("target", [0.9, 0.65, 0.4])
def test_uniform_rates_are_even_and_meet_the_target(target: float) -> None:
    bb = backbone()
    rates = uniform(bb, target, images())
    removed = [pruned + merged for pruned, merged in zip(rates.pruned, rates.merged, strict=True)]
    removed = removed[: sum(sum(removed[:block]) < 35 for block in range(5)) - 1]  # the last ones may be cut short
    assert max(removed) - min(removed) <= 1
    assert abs(sum(rates.pruned) - sum(rates.merged)) <= 3  # rounding: at most a patch in every second block
    assert DiffRate(bb, rates).flops(images()) / dense_flops(bb, images()) == pytest.approx(target, abs=0.02)


def test_rates_that_meet_a_target_keep_their_proportions() -> None:
    found = Rates(36, (0, 4, 0, 0, 0), (0, 0, 8, 0, 0))
    rates = meeting(backbone(), found, 0.7, images())
    assert sum(rates.pruned) == rates.pruned[1]
    assert sum(rates.merged) == rates.merged[2] == pytest.approx(2 * rates.pruned[1], abs=1)


def test_images_of_another_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match="for 49 patches, got images of 36"):
        DiffRate(backbone(), Rates(49, NONE, NONE))(images())


def test_rates_of_another_depth_are_refused() -> None:
    with pytest.raises(ConfigError, match="for 5 blocks"):
        DiffRate(backbone(), Rates(36, (1, 1), (1, 1)))


# ---- the search


def a_choice(pruned: tuple[int, ...] = (2, 3, 0, 1, 2), merged: tuple[int, ...] = (4, 0, 5, 1, 1)) -> RateChoice:
    """A choice that is sure of these rates."""
    choice = RateChoice(Rates(36, pruned, merged))
    choice.logits.data.mul_(200)
    return choice


def test_a_choice_that_is_sure_gives_its_rates() -> None:
    assert a_choice().rates() == Rates(36, (2, 3, 0, 1, 2), (4, 0, 5, 1, 1))


def test_masked_patches_are_removed_patches() -> None:
    """Forward, the search computes what DiffRate computes at the same rates."""
    bb, choice = backbone(), a_choice()
    with torch.no_grad():
        torch.testing.assert_close(
            masked_logits(bb, choice, images()), DiffRate(bb, choice.rates())(images()), rtol=1e-3, atol=1e-4
        )


def test_a_fresh_choice_is_masked_exactly_too() -> None:
    bb = backbone()
    choice = RateChoice(uniform(bb, 0.6, images()))
    with torch.no_grad():
        torch.testing.assert_close(
            masked_logits(bb, choice, images()), DiffRate(bb, choice.rates())(images()), rtol=1e-3, atol=1e-4
        )


def test_expected_flops_are_those_of_the_rates() -> None:
    bb, choice = backbone(), a_choice((2, 3, 1, 1, 2), (4, 1, 5, 1, 1))
    exact = DiffRate(bb, choice.rates()).flops(images()) - DiffRate(bb, choice.rates()).outer_flops(images())
    assert choice.flops(bb).item() == pytest.approx(exact, rel=0.002)


def test_every_block_gets_gradients_of_the_loss_and_of_the_flops() -> None:
    bb = backbone()
    choice = RateChoice(uniform(bb, 0.6, images()))
    with torch.enable_grad():
        (of_loss,) = torch.autograd.grad(masked_logits(bb, choice, images()).square().sum(), choice.logits)
        (of_flops,) = torch.autograd.grad(choice.flops(bb), choice.logits)
    # what is pruned or merged in the last block changes no attention, so the logits do not depend on it
    assert (of_loss[:, :-1].abs().amax(dim=2) > 0).all()
    assert (of_flops.abs().amax(dim=2) > 0).any(dim=0).all()


@torch.no_grad()
def divergence(model: DiffRate, batch: Tensor) -> float:
    """KL divergence from the dense model, mean over the images."""
    return kl_divergence(model.backbone.model(batch), model(batch)).mean().item()


def test_the_search_meets_the_flops_and_lowers_the_divergence() -> None:
    bb, batch = adapt(fresh("vit")), photos("vit", 16)
    bb.model.head.weight.data.mul_(10)  # sure predictions, so that divergences are large
    rates = searched_diffrate(bb, batch, 0.65, epochs=30, batch_size=8, learning_rate=0.2)
    model = DiffRate(bb, rates)
    assert model.flops(batch) / dense_flops(bb, batch) == pytest.approx(0.65, abs=0.02)
    assert all(p.grad is None for p in bb.parameters())

    assert divergence(model, batch) < divergence(DiffRate(bb, uniform(bb, 0.65, batch)), batch)


def test_refined_rates_meet_the_flops_and_are_not_worse_than_any_start() -> None:
    batch, starts = photos("vit", 8), [uniform(backbone(), 0.65, images()), Rates(36, (20, 0, 0, 0, 0), (0,) * 5)]

    def loss(rates: Rates) -> float:
        return divergence(DiffRate(backbone(), rates), batch)

    rates = refined_rates(backbone(), batch, 0.65, starts, evaluations=30)
    dense = dense_flops(backbone(), images())
    assert DiffRate(backbone(), rates).flops(images()) / dense == pytest.approx(0.65, abs=0.03)
    few = refined_rates(backbone(), batch, 0.65, starts, evaluations=0)
    best = min(loss(meeting(backbone(), start, 0.65, images())) for start in starts)
    assert loss(rates) < loss(few) <= best
    assert rates == refined_rates(backbone(), batch, 0.65, starts, evaluations=30)


def test_refined_rates_out_of_reach_are_refused() -> None:
    with pytest.raises(ConfigError, match="out of reach"):
        refined_rates(backbone(), photos("vit", 2), 0.01)


def test_the_search_takes_batches_and_repeats() -> None:
    batches = [photos("vit", 4), photos("vit", 4, seed=1)]
    first, second = (searched_diffrate(backbone(), iter(batches), 0.7, epochs=2) for _ in range(2))
    assert first == second


def test_the_search_without_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs images"):
        searched_diffrate(backbone(), [], 0.7)


def test_a_file_of_searched_rates_is_a_method(tmp_path: Path) -> None:
    bb, path = backbone(), tmp_path / "rates.json"
    rates = uniform(bb, 0.65, images())
    path.write_text(json.dumps({"0.65": rates.to_dict()}))
    method = searched_method(path)
    model = method.build(bb, 0.65, images())
    assert model.rates == rates
    assert "searched" in model.knob
    assert "rates.json" in method.training
    with pytest.raises(ConfigError, match=r"rates for 0\.65 of the FLOPs, got 0\.5"):
        method.build(bb, 0.5, images())
