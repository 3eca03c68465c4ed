"""The method as slowly and plainly as it can be said, to compare ours with.

timm's model runs on all tokens in grid order by its own code. Hooks on its blocks hide the dead patches from
attention as keys and put back what they were before the block; with heirs, they also hand a dying patch's token to
the patch most similar to it, as much of it as they are similar. Only the lives are taken from patchlife, and the
strength of a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from patchlife import Lives, Plan, SlimModel
from patchlife.slimming import Scorer
from patchlife.slimming.merging import BIAS, MergeTargets
from patchlife.slimming.scorers import Scores


class GivenScores(Scorer):
    """A head that returns the scores it was given, whatever it sees."""

    kind = "given-scores"

    def __init__(self, score: Tensor) -> None:
        super().__init__()
        self.score = score

    def forward(self, tokens: Tensor, *_: Any) -> Scores:
        """The given scores of the first images."""
        score = self.score[: len(tokens)].to(tokens.device)
        return Scores(score, normalize(tokens[:, -score.shape[1] :], dim=-1))


class Mortality:
    """Hooks that make the patches of one batch die.

    ``life`` is (batch, patches) in blocks. Tokens that enter block ``start`` say who resembles whom.
    """

    def __init__(self, life: Tensor, prefix: int, start: int, merge: bool, named: MergeTargets | None) -> None:
        self.life, self.prefix, self.start, self.merge, self.named = life, prefix, start, heirs, named
        self.size = torch.ones_like(life, dtype=torch.float64)

    def before(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, what attention adds to each key's logit) of block ``index``."""
        patches, alive = x[:, self.prefix :], self.life > index
        if self.merge and index == self.start:
            embedding = normalize(patches, dim=-1)
            self.similarity = embedding @ embedding.transpose(1, 2)
        if self.merge and index >= self.start:
            patches = torch.stack([self.inherit(index, image, row) for image, row in enumerate(patches)])
        bias = torch.where(alive, BIAS * self.size.log(), -torch.inf).to(x.dtype)
        return torch.cat((x[:, : self.prefix], patches), dim=1), self.with_prefix(bias, 0)

    def inherit(self, index: int, image: int, patches: Tensor) -> Tensor:
        """One image's patches (patches, dim) after those that die before block ``index`` left an heir."""
        life, size = self.life[image], self.size[image].clone()
        alive = life > index
        dying = (life <= index) & ((life > index - 1) | (index == self.start))
        mass, grown = patches * size[:, None].to(patches.dtype), size.clone()
        for patch in dying.nonzero().flatten():
            heir = self.heir_of(image, patch, alive)
            share = self.share_of(image, patch, heir)
            mass = mass.index_add(0, heir[None], mass[patch][None] * share.to(mass.dtype))
            grown = grown.index_add(0, heir[None], (size[patch] * share)[None].to(grown.dtype))
        self.size = torch.cat((self.size[:image], grown[None], self.size[image + 1 :]))
        return torch.where((grown > size)[:, None], mass / grown[:, None].to(mass.dtype), patches)

    def heir_of(self, image: int, patch: Tensor, alive: Tensor) -> Tensor:
        """The most similar patch that lives on, unless heirs were named."""
        if self.named is not None:
            return self.named.rank[image, patch]
        return self.similarity[image, patch].masked_fill(~alive, -torch.inf).argmax()

    def share_of(self, image: int, patch: Tensor, heir: Tensor) -> Tensor:
        """How much of a patch its heir takes over: their similarity, unless it was named."""
        if self.named is not None:
            return self.named.weight[image, patch]
        return self.similarity[image, patch, heir].clamp(0, 1)

    def with_prefix(self, value: Tensor, of_prefix: float) -> Tensor:
        """``value`` (batch, patches) with a constant in front for the tokens that never die."""
        return torch.cat((value.new_full((len(value), self.prefix), of_prefix), value), dim=1)


@contextmanager
def mortal(
    vit: nn.Module, life: Tensor, start: int = 0, merge: bool = False, named: MergeTargets | None = None
) -> Iterator[None]:
    """Within it, a patch takes part in block ``l`` of ``vit`` only while ``l < life`` (batch, patches)."""
    deaths = Mortality(life, vit.num_prefix_tokens, start, heirs, named)
    handles = []
    for index, block in enumerate(vit.blocks):
        alive = deaths.with_prefix(life > index, True)[..., None]

        def hide(_: nn.Module, args: tuple, kwargs: dict, index: int = index) -> tuple:
            x, bias = deaths.before(index, args[0])
            return (x, *args[1:]), {**kwargs, "attn_mask": bias[:, None, None]}

        def freeze(_: nn.Module, args: tuple, out: Tensor, alive: Tensor = alive) -> Tensor:
            return torch.where(alive, out, args[0])

        handles.append(block.register_forward_pre_hook(hide, with_kwargs=True))
        handles.append(block.register_forward_hook(freeze))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked(model: SlimModel, images: Tensor, lives: Lives, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """(logits, features in grid order) of ``model``'s backbone when its patches die as ``lives`` says.

    A ``plan`` names the heirs too, where similarities are so coarse that ties decide who inherits.
    """
    vit, named = model.backbone.vit, None
    if plan is not None and plan.merge_targets is not None:
        heir = torch.empty_like(plan.order).scatter(1, plan.order, plan.order.gather(1, plan.merge_targets.rank))
        share = torch.empty_like(plan.merge_targets.weight).scatter(1, plan.order, plan.merge_targets.weight)
        named = MergeTargets(heir, share)
    with mortal(vit, lives.life, model.start, model.config.merge, named):
        features = vit.forward_features(images)
    return vit.forward_head(features), features


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """`distance` at most ``tolerance``; says how far apart they are, and no more."""
    apart = distance(ours, theirs)
    assert apart <= tolerance, f"{apart:.1e} apart, {tolerance:.0e} allowed"


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, relative to the larger of 1 and the largest value."""
    assert ours.shape == theirs.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert torch.isfinite(theirs).all(), "a reference that is not finite proves nothing"
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
