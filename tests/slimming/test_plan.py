"""A plan is one consistent decision: order, lives, kept counts, merge targets and packed layout agree."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from families import FEW, photos
from hypothesis import given, settings
from hypothesis import strategies as st
from slim_models import VARIANTS, slim
from torch import Tensor
from torch.nn.functional import normalize

from patchlife import Lives, Plan
from patchlife.slimming import Schedule
from patchlife.slimming.plan import adaptive_plan, fixed_plan
from patchlife.slimming.run.adaptive import stages


class Case(NamedTuple):
    """Scores, a schedule, and the plan made of them; ``thresholds`` in adaptive mode."""

    score: Tensor
    schedule: Schedule
    plan: Plan
    thresholds: Tensor | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any depth, grid, batch and schedule; scores with ties, NaN and infinities; both modes; merging or not."""
    depth, rows, cols = draw(st.integers(2, 13)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    batch, patches = draw(st.integers(1, 4)), rows * cols
    start = draw(st.integers(1, depth - 1))
    falling = sorted(draw(st.lists(st.integers(1, patches), min_size=depth - start, max_size=depth - start)))
    schedule = Schedule((patches,) * start + tuple(reversed(falling)), start)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    score = torch.randn(batch, patches, generator=generator)
    if draw(st.booleans()):
        score = score.round()  # ties
    if draw(st.booleans()):
        score[torch.rand(score.shape, generator=generator) < 0.2] = draw(
            st.sampled_from([torch.nan, -torch.inf, torch.inf])
        )
    embedding = normalize(torch.randn(batch, patches, 4, generator=generator), dim=-1)
    embedding = embedding if draw(st.booleans()) else None
    if draw(st.booleans()):
        return Case(score, schedule, fixed_plan(score, embedding, schedule, (rows, cols)), None)
    levels = torch.randn(depth - start, generator=generator).sort().values
    thresholds = torch.cat((torch.full((start,), -torch.inf), levels))
    plan = adaptive_plan(score, embedding, schedule, (rows, cols), thresholds)
    return Case(score, schedule, plan, thresholds)


@given(cases())
def test_order_lives_and_kept_counts_agree(case: Case) -> None:
    plan, lives = case.plan, case.plan.lives()
    patches, depth = case.score.shape[1], len(case.schedule.kept)
    all_patches = torch.arange(patches).expand_as(plan.order)
    assert torch.equal(plan.order.sort(dim=1).values, all_patches)
    assert torch.equal(plan.order.gather(1, plan.rank()), all_patches)
    assert lives.kept.shape == (len(case.score), depth)
    assert (lives.kept.diff(dim=1) <= 0).all()
    assert (lives.kept[:, : case.schedule.start] == patches).all()
    assert ((lives.life >= case.schedule.start) & (lives.life <= depth)).all()
    for block in range(depth):
        present = lives.present(block)
        assert torch.equal(present, lives.life > block)
        assert torch.equal(present.sum(dim=1), lives.kept[:, block])
        assert torch.equal(present, plan.rank() < lives.kept[:, block, None])
    ordered = lives.life.gather(1, plan.order)
    assert (ordered.diff(dim=1) <= 0).all(), "the order must be longest life first"


@given(cases())
def test_a_higher_score_never_means_a_shorter_life(case: Case) -> None:
    life, score = case.plan.lives().life, case.plan.score
    higher = score[:, :, None] > score[:, None, :]
    shorter = life[:, :, None] < life[:, None, :]
    assert not (higher & shorter).any()
    assert torch.isfinite(score).all()


@given(cases())
def test_kept_counts_follow_the_schedule_or_the_thresholds(case: Case) -> None:
    counts = case.plan.lives().kept
    if case.thresholds is None:
        assert (counts == torch.tensor(case.schedule.kept)).all()
        assert case.plan.counts is None
    else:
        above = (case.plan.score[:, :, None] > case.thresholds).sum(dim=1).clamp(min=1)
        assert torch.equal(counts, above)


@given(cases())
def test_merge_targets_outlive_the_patches_merged_into_them(case: Case) -> None:
    plan = case.plan
    if plan.merge_targets is None:
        return
    life = plan.lives().life.gather(1, plan.order)  # by rank
    target_life = life.gather(1, plan.merge_targets.rank)
    never_dropped = life == len(case.schedule.kept)
    own = torch.arange(plan.order.shape[1]).expand_as(plan.order)
    assert torch.equal(plan.merge_targets.rank[never_dropped], own[never_dropped])
    assert (target_life > life)[~never_dropped].all()


@given(cases(), st.integers(0, 6))
def test_stages_hold_the_rows_that_are_kept_and_dropped(case: Case, prefix: int) -> None:
    plan, counts = case.plan, case.plan.lives().kept
    batch, patches = case.score.shape
    layout = torch.arange(batch * (prefix + patches)).reshape(batch, prefix + patches)
    packed = stages([plan], prefix)
    blocks = [block for stage in packed for block in stage.blocks]
    assert blocks == list(range(case.schedule.start, len(case.schedule.kept)))
    before = torch.full((batch,), patches)
    for stage in packed:
        after = counts[:, stage.blocks[0]]
        assert all(torch.equal(counts[:, block], after) for block in stage.blocks)
        pieces = [layout[image, : prefix + n] for image, n in enumerate(after.tolist())]
        assert torch.equal(stage.tokens, torch.cat(pieces))
        assert stage.offsets == (0, *torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist())
        gone = [layout[image, prefix + n : prefix + m] for image, (n, m) in enumerate(zip(after, before, strict=True))]
        assert torch.equal(stage.dropped, torch.cat(gone))
        if plan.merge_targets is not None:
            assert torch.isin(stage.targets, stage.tokens).all()
            assert torch.equal(stage.targets // (prefix + patches), stage.dropped // (prefix + patches))
        before = after


@settings(max_examples=30)
@given(cases())
def test_lives_of_one_image(case: Case) -> None:
    lives = case.plan.lives()
    assert len(lives) == len(case.score)
    assert lives.depth == len(case.schedule.kept)
    for image in (0, -1):
        one = lives[image]
        assert len(one) == 1
        assert torch.equal(one.life[0], lives.life[image])
        assert torch.equal(one.kept[0], lives.kept[image])
        assert one.map().shape == lives.grid
        assert torch.equal(one.map().flatten(), lives.life[image])


def test_lives_without_dropped_patches() -> None:
    lives = Lives.full(2, (3, 4), 5)
    assert (lives.life == 5).all()
    assert (lives.kept == 12).all()
    assert lives.present(4).all()
    assert lives.kept.shape == (2, 5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FEW)
def test_the_plan_of_a_model(name: str, variant: str) -> None:
    """`plan`, `lives` and `predict` give the same decision; lives are drop points or the depth."""
    model, images = slim(name, variant, drops=(2, 4)), photos(name)
    plan, lives = model.plan(images), model.lives(images)
    assert torch.equal(plan.lives().life, lives.life)
    assert torch.equal(model.predict(images)[1].life, lives.life)
    assert set(lives.life.unique().tolist()) <= {2.0, 4.0, 5.0}
    assert plan.grid == lives.grid == (6, 6)
    assert (plan.merge_targets is not None) == model.settings.merge
    assert (plan.counts is not None) == (model.settings.mode == "adaptive")
    assert not lives.life.requires_grad
