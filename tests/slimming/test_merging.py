"""MergeTargets: a slow walk over patches, one at a time, is the reference for fixed and adaptive runs."""

import families
import pytest
import torch
from torch import nn

import patchlife
from patchlife.flop_counter import counted
from patchlife.slimming.merging import MergeTargets, adaptive_merge_targets, fixed_merge_targets, merge
from patchlife.slimming.schedule import Schedule
from patchlife.slimming.similarity import Similarity

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def slow_run(model: patchlife.SlimModel, images: torch.Tensor) -> torch.Tensor:
    """Logits of one image at a time, patch by patch, in grid order, with the backbone's own blocks."""
    vit, prefix = model.backbone.vit, model.backbone.prefix
    plan = model.plan(images)
    life = plan.lives().life.long()
    logits = []
    for b in range(len(images)):
        embedded = model.backbone.embed(images[b : b + 1])
        x, rope = embedded.tokens, embedded.rope
        order = plan.order[b].tolist()
        heir = {order[r]: order[plan.merge_targets.rank[b, r]] for r in range(len(order))}
        share = {order[r]: plan.merge_targets.weight[b, r] for r in range(len(order))}
        size = torch.ones(len(order))
        for index in range(model.backbone.depth):
            for patch in order:
                if life[b, patch] == index:  # it dies just before this block
                    into = heir[patch]
                    assert life[b, into] > index
            x, size = _bury(x, size, life[b], heir, share, index, prefix)
            alive = torch.cat((torch.ones(prefix, dtype=torch.bool), life[b] > index))
            bias = torch.cat((torch.zeros(prefix), 0.75 * size.log())).masked_fill(~alive, -torch.inf)
            table = model.backbone.rope_of(rope, index)
            rotary = {} if table is None else {"rope": table}
            new = vit.blocks[index](x, attn_mask=bias.expand(1, 1, len(alive), -1), **rotary)
            x = torch.where(alive[None, :, None], new, x)
        logits.append(vit.forward_head(vit.norm(x)))
    return torch.cat(logits)


def _bury(x, size, life, heir, share, index, prefix):
    """All that die at ``index`` leave their shares to their heirs at once; the dead keep their own last state."""
    mass, grown = x[0, prefix:] * size[:, None], size.clone()
    merged = mass.clone()
    for patch in torch.nonzero(life == index).flatten().tolist():
        merged[heir[patch]] += mass[patch] * share[patch]
        grown[heir[patch]] += size[patch] * share[patch]
    living = life > index
    x = x.clone()
    x[0, prefix:][living] = merged[living] / grown[living, None]
    return x, grown


@pytest.mark.parametrize("family", list(families.FAMILIES))
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_runs_equal_the_slow_walk(family, mode):
    vit, images = families.built(family), families.photos(family, 3)
    config = patchlife.LifeConfig(budget=0.7, start=1, drops=(1, 2, 3))
    model = patchlife.wrap(vit, config)
    with torch.no_grad():
        model.calibrate([families.photos(family, 6, seed=1)]).set_mode(mode)
        assert model.lives(images).life.unique().numel() > 2, "patches must die at several blocks"
        torch.testing.assert_close(model(images), slow_run(model, images), **CLOSE)


def test_heirs_change_the_answer_and_can_be_left_out():
    vit, images = families.built("vit"), families.photos("vit", 2)
    with torch.no_grad():
        on = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6))(images)
        off = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6, merge=False))(images)
    assert (on - off).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_flops_of_heirs_are_counted(mode):
    vit, images = families.built("vit"), families.photos("vit", 1)
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6, start=1, drops=(1, 2)))
    with torch.no_grad():
        model.calibrate([images]).set_mode(mode)
        spent, (_, lives) = counted(model.predict, images)
    assert spent == pytest.approx(model.flops_of(lives)[0], rel=0.005)


def test_heirs_survive_the_drop_and_are_the_most_similar():
    embedding = nn.functional.normalize(torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(3)), dim=-1)
    kept = (12, 12, 7, 7, 3)
    similarity, order = Similarity.of(embedding), torch.arange(12).expand(2, -1)
    targets = fixed_merge_targets(similarity, order, Schedule(kept, 2))
    counts = torch.tensor(kept).expand(2, -1)
    for fixed, adaptive in zip(targets, adaptive_merge_targets(similarity, order, counts), strict=True):
        torch.testing.assert_close(fixed, adaptive)
    for b in range(2):
        for rank in range(12):
            left = 7 if rank >= 7 else 3
            cosines = embedding[b, :left] @ embedding[b, rank]
            expected = (rank, 1.0) if rank < 3 else (int(cosines.argmax()), float(cosines.max().clamp(0)))
            assert targets.rank[b, rank] == expected[0]
            assert targets.weight[b, rank] == pytest.approx(expected[1], abs=1e-6)


def test_inheriting_keeps_the_weighted_sum_and_the_shares_of_patches():
    draw = torch.Generator().manual_seed(0)
    patches, size = torch.randn(2, 9, 4, generator=draw), torch.randint(1, 4, (2, 9), generator=draw).float()
    targets = MergeTargets(torch.randint(0, 5, (2, 4), generator=draw), torch.rand(2, 4, generator=draw))
    after, grown = merge(patches, size, targets)
    left = torch.cat((size[:, :5], size[:, 5:] * targets.weight), dim=1)
    torch.testing.assert_close((after * grown[..., None]).sum(1), (patches * left[..., None]).sum(1))
    torch.testing.assert_close(grown.sum(1), left.sum(1))
    lonely = [i for i in range(5) if i not in targets.rank[0].tolist()]
    torch.testing.assert_close(after[0, lonely], patches[0, lonely])
