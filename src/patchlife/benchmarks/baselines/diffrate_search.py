"""DiffRate's search of its rates (arXiv 2305.17997, see `diffrate.py`): a differentiable choice, weights frozen.

Each block has two distributions over the number of patches kept: by pruning, and then by merging. The number kept is
the rounded mean of its distribution. A patch of rank i stays with the probability that more than i patches are kept;
forward the choice is hard, backward it has the gradient of this probability (straight through). Patches that are gone
are masked out of attention rather than removed, so that the gradient says what they would have contributed.

The loss is the KL divergence from the dense model, because our photos have no labels (the paper: cross-entropy), plus
the squared distance of the expected FLOPs from the target. The search starts at uniform rates. At the end all counts
are multiplied by one factor, so that the FLOPs are met exactly (our addition; the factor is close to 1).

`refined_rates` is our addition too: a random search that goes on from given rates, by the KL divergence itself. On
ViT-Tiny the search by gradients prunes much in the first block, where the class token's attention says little, and
this one does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...backbones import Backbone
from ...backbones.timm_branches import attention_branch, check_branches, mlp_branch
from ...errors import ConfigError
from ...evaluation.agreement import kl_divergence
from .base import Images, check_class_token, check_no_rope, dense_flops, size_bias, take
from .diffrate import DiffRate, Rates, block_flops, meeting, scaled, uniform

__all__ = ["RateChoice", "masked_logits", "refined_rates", "searched_diffrate"]

_FLOPS_WEIGHT = 100.0  # of the squared difference of fractions: 5 % too much costs as much as a KL of 0.25


class RateChoice(nn.Module):
    """Distributions over the number of patches kept in each block: row 0 by pruning, row 1 by merging."""

    def __init__(self, start: Rates) -> None:
        super().__init__()
        self.patches = start.patches
        kept, rows = start.patches, []
        for pruned, merged in zip(start.pruned, start.merged, strict=True):
            rows.append((kept - pruned, kept - pruned - merged))
            kept -= pruned + merged
        candidates = torch.arange(1.0, start.patches + 1)
        distance = candidates - torch.tensor(rows).T[..., None]
        self.logits = nn.Parameter(-0.5 * (distance / max(1.0, start.patches / 16)).square())

    def stays(self) -> Float[Tensor, "2 depth patches"]:
        """Probability that the patch of each rank stays. Their sum over the ranks is the expected number kept."""
        return self.logits.softmax(dim=-1).flip(-1).cumsum(dim=-1).flip(-1)

    def rates(self) -> Rates:
        """The rounded expectations, as numbers of patches pruned and merged."""
        kept, counts = self.patches, []
        for expected in self.stays().sum(dim=-1).T.flatten().tolist():  # pruning, then merging, block by block
            after = min(kept, max(1, round(expected)))
            counts.append(kept - after)
            kept = after
        return Rates(self.patches, tuple(counts[::2]), tuple(counts[1::2]))

    def flops(self, backbone: Backbone) -> Tensor:
        """Expected FLOPs of the blocks, with gradients."""
        by_pruning, by_merging = self.stays().sum(dim=-1)
        kept, total = by_pruning.new_tensor(float(self.patches)), by_pruning.new_zeros(())
        for index in range(backbone.depth):
            unpruned = torch.minimum(kept, by_pruning[index])
            after = torch.minimum(unpruned, by_merging[index])
            total = total + block_flops(backbone, index, kept, kept - unpruned, unpruned - after)
            kept = after
        return total


class _State(NamedTuple):
    """Tokens in a block of the search; ``present`` is 1 for patches that stay and 0 for the others, with gradients."""

    x: Float[Tensor, "batch tokens dim"]
    size: Float[Tensor, "batch patches"]
    present: Float[Tensor, "batch patches"]


def masked_logits(backbone: Backbone, choice: RateChoice, images: Images) -> Tensor:
    """Logits at the rates of ``choice``, with gradients for it. They are those of `DiffRate` at ``choice.rates()``."""
    embedded = backbone.embed(images)
    check_no_rope(embedded.rope, "DiffRate")
    x = embedded.tokens
    ones = x.new_ones(len(x), x.shape[1] - backbone.prefix)
    state, stays, rates, kept = _State(x, ones, ones), choice.stays(), choice.rates(), choice.patches
    for index in range(backbone.depth):
        unpruned = kept - rates.pruned[index]
        after = unpruned - rates.merged[index]
        mask = _straight_through(stays[0, index], unpruned) * _straight_through(stays[1, index], after)
        state = _masked_block(backbone, index, state, mask, unpruned, after)
        kept = after
    return backbone.classify(backbone.norm(state.x[:, : backbone.prefix + kept]))


def _straight_through(stays: Float[Tensor, "patches"], kept: int) -> Float[Tensor, "patches"]:
    """1 for the first ``kept`` ranks and 0 for the others, with the gradient of ``stays``."""
    hard = (torch.arange(len(stays), device=stays.device) < kept).to(stays.dtype)
    return hard + stays - stays.detach()


def _masked_block(bb: Backbone, index: int, state: _State, mask: Tensor, unpruned: int, after: int) -> _State:
    """A block of the search: ranks from ``unpruned`` on are pruned, ranks from ``after`` on merged."""
    scores: list[Tensor] = []
    key_weight = F.pad(state.present, (bb.prefix, 0), value=1.0)[:, None, None]
    bias = size_bias(state.size, bb.prefix)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias
        weight = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp() * key_weight
        attention = weight / weight.sum(dim=-1, keepdim=True)
        scores.append(attention[:, :, 0, bb.prefix :].mean(dim=1))
        return (attention @ v).transpose(1, 2)

    x = state.x + attention_branch(bb, index, state.x, attend)
    rank = (scores[0] + state.present).detach().argsort(dim=1, descending=True)  # patches that are gone come last
    patches, size = take(x[:, bb.prefix :], rank), state.size.gather(1, rank)
    patches, size = _merged(patches, size, unpruned, after)
    x = torch.cat((x[:, : bb.prefix], patches), dim=1)
    return _State(x + mlp_branch(bb, index, x), size, state.present.gather(1, rank) * mask)


def _merged(patches: Tensor, size: Tensor, unpruned: int, after: int) -> tuple[Tensor, Tensor]:
    """Ranks ``after`` to ``unpruned`` are added to the most similar of the first ranks; the others stay as they are."""
    if after == unpruned:
        return patches, size
    unit = F.normalize(patches[:, :unpruned], dim=-1)
    partner = (unit[:, after:] @ unit[:, :after].transpose(1, 2)).argmax(dim=2)
    both = torch.cat((patches * size[..., None], size[..., None]), dim=2)
    target = partner[..., None].expand(-1, -1, both.shape[2])
    first = both[:, :after].scatter_add(1, target, both[:, after:unpruned])
    new_size = first[..., -1]
    patches = torch.cat((first[..., :-1] / new_size[..., None], patches[:, after:]), dim=1)
    return patches, torch.cat((new_size, size[:, after:]), dim=1)


def searched_diffrate(
    backbone: Backbone,
    images: Images | Iterable[Images],
    flops: float,
    *,
    epochs: int = 30,
    batch_size: int = 32,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> Rates:
    """Rates of DiffRate for this model at a fraction ``flops`` of the dense FLOPs, searched on unlabelled images.

    Args:
        backbone: the dense model in eval mode; its weights are neither changed nor given gradients.
        images: a tensor of images, or batches of images; on the backbone's device.
        flops: the target, in (0, 1).
        epochs: passes over the images; the paper makes 3 over all of ImageNet. Fewer than about 200 steps in all move
            the rates too little.
        batch_size: for a tensor of images. learning_rate: of Adam, falling to zero. seed: of the order of batches.

    Raises:
        ConfigError: no images, or the target is out of reach.
        UnsupportedModelError: the model has no class token, or its blocks cannot be opened.
    """
    check_class_token(backbone, "DiffRate")
    check_branches(backbone, "DiffRate")
    batches = list(images.split(batch_size) if isinstance(images, Tensor) else images)
    if not batches:
        raise ConfigError("the search of DiffRate's rates needs images, got none")
    with torch.no_grad():
        dense = [backbone.output(batch).float() for batch in batches]
    choice = RateChoice(uniform(backbone, flops, batches[0])).to(backbone.device)
    generator, steps = torch.Generator().manual_seed(seed), epochs * len(batches)
    optimizer = torch.optim.Adam(choice.parameters())
    for step in range(steps):
        if step % len(batches) == 0:
            order = torch.randperm(len(batches), generator=generator).tolist()
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        batch = order[step % len(batches)]
        # gradients of the choice only: the backbone's parameters get none
        with torch.enable_grad():
            loss = _loss(backbone, choice, batches[batch], dense[batch], flops)
            (choice.logits.grad,) = torch.autograd.grad(loss, [choice.logits])
        optimizer.step()
    return meeting(backbone, choice.rates(), flops, batches[0])


def _loss(
    backbone: Backbone, choice: RateChoice, images: Images, dense: Float[Tensor, "batch classes"], flops: float
) -> Tensor:
    """KL divergence from the dense model's logits in nats, plus the penalty on the expected FLOPs."""
    divergence = kl_divergence(dense, masked_logits(backbone, choice, images).float()).mean()
    outer = sum(backbone.outer_flops((images.shape[-2], images.shape[-1])))
    fraction = (choice.flops(backbone) + outer) / dense_flops(backbone, images)
    return divergence + _FLOPS_WEIGHT * (fraction - flops).square()


# ---- a search without gradients


@torch.no_grad()
def refined_rates(
    backbone: Backbone,
    images: Images,
    flops: float,
    starts: Sequence[Rates] = (),
    *,
    evaluations: int = 120,
    seed: int = 0,
) -> Rates:
    """Rates at a fraction ``flops`` of the dense FLOPs, by a random search on unlabelled images.

    It evaluates ``starts`` and simple rates (merged only, half pruned, pruned only; from each block of the first third
    on; as many in every block, or falling), and then changes the best rates at random, one block at a time, and keeps
    what lowers the KL divergence from the dense model.

    Args:
        backbone: the dense model in eval mode. images: (batch, channels, height, width), on its device.
        flops: the target, in (0, 1). starts: rates of another search.
        evaluations: runs of all images in the second part. seed: of the changes.

    Raises:
        ConfigError: the target is out of reach of all starts.
        UnsupportedModelError: the model has no class token, or its blocks cannot be opened.
    """
    check_class_token(backbone, "DiffRate")
    check_branches(backbone, "DiffRate")
    dense = backbone.output(images).float()
    rows, cols = backbone.grid_of(images)

    def measured(counts: Tensor) -> tuple[float, Rates] | None:
        """(KL divergence in nats, rates) of ``counts`` (depth, 2), scaled; None if the target is out of reach."""
        try:
            rates = scaled(backbone, rows * cols, counts.flatten().tolist(), flops, images)
        except ConfigError:
            return None
        return kl_divergence(dense, DiffRate(backbone, rates)(images).float()).mean().item(), rates

    candidates = [torch.tensor([*zip(start.pruned, start.merged, strict=True)], dtype=torch.float) for start in starts]
    candidates += _simple_counts(backbone.depth)
    found = [(*result, counts) for counts in candidates if (result := measured(counts))]
    if not found:
        raise ConfigError(f"{flops:g} of the FLOPs is out of reach of DiffRate on this model")
    loss, best, counts = min(found, key=lambda result: result[0])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(evaluations):
        changed = _changed(counts, generator)
        if (result := measured(changed)) and result[0] < loss:
            (loss, best), counts = result, changed
    return best


def _simple_counts(depth: int) -> list[Tensor]:
    """(depth, 2) pruned and merged, from one block on: in each one the same fraction of those in the block before."""
    shares = [torch.tensor([pruned, 1 - pruned]) for pruned in (0.0, 0.5, 1.0)]
    after = [torch.arange(depth)[:, None] - first for first in range(depth // 3 + 1)]
    return [(i >= 0) * f**i * share for i in after for f in (1.0, 0.85, 0.7) for share in shares]


def _changed(counts: Float[Tensor, "depth 2"], generator: torch.Generator) -> Tensor:
    """``counts`` with another count in one block: more or less, none, or others of them pruned rather than merged."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    counts, block, mean = counts.clone(), below(len(counts)), counts.sum() / len(counts)
    change = below(4)
    if change == 0:
        counts[block] = 0
    elif change == 1:  # moved between pruned and merged
        counts[block] = counts[block].sum() * torch.tensor([part := below(5) / 4, 1 - part])
    else:
        kind, factor = below(2), torch.randn((), generator=generator).mul(0.7).exp()
        counts[block, kind] = (counts[block, kind] + 0.2 * mean * (counts[block, kind] == 0)) * factor
    return counts
