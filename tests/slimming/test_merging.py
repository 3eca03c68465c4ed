"""Merging: a slow run that merges patches one at a time is the reference for fixed and adaptive runs."""

import families
import pytest
import torch
from torch import nn

import patchlife
from patchlife.flop_counter import counted
from patchlife.slimming.merging import MergeTargets, adaptive_merge_targets, fixed_merge_targets, merge
from patchlife.slimming.schedule import Schedule

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def slow_run(model: patchlife.SlimModel, images: torch.Tensor) -> torch.Tensor:
    """Logits, computed image by image and patch by patch, in grid order, with the backbone's own blocks."""
    vit, prefix = model.backbone.model, model.backbone.prefix
    plan = model.plan(images)
    life = plan.lives().life.long()
    logits = []
    for b in range(len(images)):
        embedded = model.backbone.embed(images[b : b + 1])
        x, rope = embedded.tokens, embedded.rope
        order = plan.order[b].tolist()
        target = {order[r]: order[plan.merge_targets.rank[b, r]] for r in range(len(order))}
        weight = {order[r]: plan.merge_targets.weight[b, r] for r in range(len(order))}
        size = torch.ones(len(order))
        for index in range(model.backbone.depth):
            for patch in order:
                if life[b, patch] == index:  # dropped before this block
                    assert life[b, target[patch]] > index
            x, size = _merge_dropped(x, size, life[b], target, weight, index, prefix)
            kept = torch.cat((torch.ones(prefix, dtype=torch.bool), life[b] > index))
            bias = torch.cat((torch.zeros(prefix), 0.75 * size.log())).masked_fill(~kept, -torch.inf)
            table = model.backbone.rope_of(rope, index)
            rotary = {} if table is None else {"rope": table}
            new = vit.blocks[index](x, attn_mask=bias.expand(1, 1, len(kept), -1), **rotary)
            x = torch.where(kept[None, :, None], new, x)
        logits.append(vit.forward_head(vit.norm(x)))
    return torch.cat(logits)


def _merge_dropped(x, size, life, target, weight, index, prefix):
    """(tokens, sizes) after the patches dropped at ``index`` were merged; dropped patches keep their last state."""
    mass, new_size = x[0, prefix:] * size[:, None], size.clone()
    merged = mass.clone()
    for patch in torch.nonzero(life == index).flatten().tolist():
        merged[target[patch]] += mass[patch] * weight[patch]
        new_size[target[patch]] += size[patch] * weight[patch]
    kept = life > index
    x = x.clone()
    x[0, prefix:][kept] = merged[kept] / new_size[kept, None]
    return x, new_size


@pytest.mark.parametrize("family", list(families.FAMILIES))
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_runs_equal_the_slow_run(family, mode):
    vit, images = families.built(family), families.photos(family, 3)
    config = patchlife.LifeConfig(budget=0.7, start=1, drops=(1, 2, 3), restore="last")  # others: test_restore.py
    model = patchlife.wrap(vit, config)
    with torch.no_grad():
        model.calibrate([families.photos(family, 6, seed=1)]).set_mode(mode)
        assert model.lives(images).life.unique().numel() > 2, "patches must be dropped at several blocks"
        torch.testing.assert_close(model(images), slow_run(model, images), **CLOSE)


def test_merging_changes_the_logits_and_can_be_switched_off():
    vit, images = families.built("vit"), families.photos("vit", 2)
    with torch.no_grad():
        on = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6))(images)
        off = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6, merge=False))(images)
    assert (on - off).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_flops_of_merging_are_counted(mode):
    """To the last operation, also where the images of a batch keep different numbers of patches."""
    vit, images = families.built("vit"), families.photos("vit", 4)
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6, start=1, drops=(1, 2)))
    with torch.no_grad():
        model.calibrate([families.photos("vit", 6, seed=1)]).set_mode(mode)
        executed, (_, lives) = counted(model.predict, images)
        alone = [counted(model.predict, image[None])[0] for image in images]
    stated = model.flops_of(lives)
    assert stated == alone
    assert sum(stated) == executed
    assert (len(set(stated)) > 1) == (mode == "adaptive")
    assert model.cost().merge == 2 * model.backbone.dim


def test_merge_targets_are_the_most_similar_kept_patches():
    embedding = nn.functional.normalize(torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(3)), dim=-1)
    kept = (12, 12, 7, 7, 3)
    order = torch.arange(12).expand(2, -1)
    targets = fixed_merge_targets(embedding, order, Schedule(kept, 2))
    counts = torch.tensor(kept).expand(2, -1)
    for fixed, adaptive in zip(targets, adaptive_merge_targets(embedding, order, counts), strict=True):
        torch.testing.assert_close(fixed, adaptive)
    for b in range(2):
        for rank in range(12):
            left = 7 if rank >= 7 else 3
            cosines = embedding[b, :left] @ embedding[b, rank]
            expected = (rank, 1.0) if rank < 3 else (int(cosines.argmax()), float(cosines.max().clamp(0)))
            assert targets.rank[b, rank] == expected[0]
            assert targets.weight[b, rank] == pytest.approx(expected[1], abs=1e-6)


@pytest.mark.parametrize("patches", [12, 700], ids=["one block of rows", "several"])
def test_targets_of_all_images_together_are_those_of_each_image(patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(3)
    embedding = nn.functional.normalize(torch.randn(5, patches, 5, generator=draw), dim=-1)
    order = torch.rand(5, patches, generator=draw).argsort(dim=1)
    counts = torch.tensor([(12, 12, 7, 3), (12, 12, 12, 12), (12, 1, 1, 1), (12, 9, 9, 8), (12, 11, 5, 1)])
    counts = counts * patches // 12
    expected = adaptive_merge_targets(embedding, order, counts)
    monkeypatch.setattr("patchlife.slimming.merging.adds_in_order", lambda x: False)
    together = adaptive_merge_targets(embedding, order, counts)
    assert torch.equal(together.rank, expected.rank)
    torch.testing.assert_close(together.weight, expected.weight)


def test_merging_preserves_the_weighted_sum_of_tokens_and_of_sizes():
    draw = torch.Generator().manual_seed(0)
    patches, size = torch.randn(2, 9, 4, generator=draw), torch.randint(1, 4, (2, 9), generator=draw).float()
    targets = MergeTargets(torch.randint(0, 5, (2, 4), generator=draw), torch.rand(2, 4, generator=draw))
    after, new_size = merge(patches, size, *targets)
    weighted = torch.cat((size[:, :5], size[:, 5:] * targets.weight), dim=1)
    torch.testing.assert_close((after * new_size[..., None]).sum(1), (patches * weighted[..., None]).sum(1))
    torch.testing.assert_close(new_size.sum(1), weighted.sum(1))
    untouched = [i for i in range(5) if i not in targets.rank[0].tolist()]
    torch.testing.assert_close(after[0, untouched], patches[0, untouched])


@pytest.mark.parametrize("dropped", [30, 2100])
def test_sums_do_not_depend_on_the_number_of_threads(dropped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    patches, size = torch.randn(2, 20 + dropped, 8, generator=draw), 1 + torch.rand(2, 20 + dropped, generator=draw)
    target, weight = torch.randint(0, 20, (2, dropped), generator=draw), torch.rand(2, dropped, generator=draw)
    runs = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        runs.append(merge(patches, size, target, weight))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)
        assert two.is_contiguous()
