"""A slow reference for the method, in the plainest form.

timm's model runs on all tokens in grid order by its own code. Hooks on its blocks mask dropped patches out of attention
as keys, and restore their tokens to what they were before the block. With merging, the hooks also average the token of
a dropped patch into the most similar kept patch, weighted by their cosine. From patchlife come only the lives and the
factor of the key bias. `restored_tokens` fills the places of dropped patches, one by one.
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
    """A scorer that returns given scores for any tokens."""

    kind = "given-scores"

    def __init__(self, score: Tensor) -> None:
        super().__init__()
        self.score = score

    def forward(self, tokens: Tensor, *_: Any) -> Scores:
        """The given scores of the first images."""
        score = self.score[: len(tokens)].to(tokens.device)
        return Scores(score, normalize(tokens[:, -score.shape[1] :], dim=-1))


class PatchDropper:
    """Hooks that drop the patches of one batch.

    ``life`` is (batch, patches) in blocks. Similarities are those of the tokens that enter block ``start``. ``entered``
    and ``left`` get the tokens before and after each block, ``target`` the merge target by (image, patch).
    """

    def __init__(self, life: Tensor, prefix: int, start: int, merge: bool, targets: MergeTargets | None) -> None:
        self.life, self.prefix, self.start, self.merge, self.targets = life, prefix, start, merge, targets
        self.size = torch.ones_like(life, dtype=torch.float64)
        self.entered: dict[int, Tensor] = {}
        self.left: dict[int, Tensor] = {}
        self.target: dict[tuple[int, int], int] = {}

    def before(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, what attention adds to each key's logit) of block ``index``."""
        patches, kept = x[:, self.prefix :], self.life > index
        if self.merge and index == self.start:
            embedding = normalize(patches, dim=-1)
            self.similarity = embedding @ embedding.transpose(1, 2)
        if self.merge and index >= self.start:
            patches = torch.stack([self.merged(index, image, row) for image, row in enumerate(patches)])
        bias = torch.where(kept, BIAS * self.size.log(), -torch.inf).to(x.dtype)
        self.entered[index] = torch.cat((x[:, : self.prefix], patches), dim=1)
        return self.entered[index], self.with_prefix(bias, 0)

    def after(self, index: int, x: Tensor, out: Tensor) -> Tensor:
        """The output of block ``index``, of which ``x`` was the input: dropped patches keep their state."""
        self.left[index] = torch.where(self.with_prefix(self.life > index, True)[..., None], out, x)
        return self.left[index]

    def merged(self, index: int, image: int, patches: Tensor) -> Tensor:
        """One image's patches (patches, dim) after those dropped before block ``index`` were merged."""
        life, size = self.life[image], self.size[image].clone()
        kept = life > index
        dropped = (life <= index) & ((life > index - 1) | (index == self.start))
        mass, new_size = patches * size[:, None].to(patches.dtype), size.clone()
        for patch in dropped.nonzero().flatten():
            target = self.target_of(image, patch, kept)
            weight = self.weight_of(image, patch, target)
            self.target[image, int(patch)] = int(target)
            mass = mass.index_add(0, target[None], mass[patch][None] * weight.to(mass.dtype))
            new_size = new_size.index_add(0, target[None], (size[patch] * weight)[None].to(new_size.dtype))
        self.size = torch.cat((self.size[:image], new_size[None], self.size[image + 1 :]))
        return torch.where((new_size > size)[:, None], mass / new_size[:, None].to(mass.dtype), patches)

    def target_of(self, image: int, patch: Tensor, kept: Tensor) -> Tensor:
        """The most similar kept patch, unless targets were given."""
        if self.targets is not None:
            return self.targets.rank[image, patch]
        return self.similarity[image, patch].masked_fill(~kept, -torch.inf).argmax()

    def weight_of(self, image: int, patch: Tensor, target: Tensor) -> Tensor:
        """The merge weight: the cosine of both, unless weights were given."""
        if self.targets is not None:
            return self.targets.weight[image, patch]
        return self.similarity[image, patch, target].clamp(0, 1)

    def with_prefix(self, value: Tensor, of_prefix: float) -> Tensor:
        """``value`` (batch, patches) with a constant in front for the prefix tokens."""
        return torch.cat((value.new_full((len(value), self.prefix), of_prefix), value), dim=1)


@contextmanager
def dropping(
    vit: nn.Module, life: Tensor, start: int = 0, merge: bool = False, targets: MergeTargets | None = None
) -> Iterator[PatchDropper]:
    """Within it, a patch takes part in block ``l`` of ``vit`` only while ``l < life`` (batch, patches)."""
    dropper = PatchDropper(life, vit.num_prefix_tokens, start, merge, targets)
    handles = []
    for index, block in enumerate(vit.blocks):

        def mask(_: nn.Module, args: tuple, kwargs: dict, index: int = index) -> tuple:
            x, bias = dropper.before(index, args[0])
            return (x, *args[1:]), {**kwargs, "attn_mask": bias[:, None, None]}

        def keep(_: nn.Module, args: tuple, out: Tensor, index: int = index) -> Tensor:
            return dropper.after(index, args[0], out)

        handles.append(block.register_forward_pre_hook(mask, with_kwargs=True))
        handles.append(block.register_forward_hook(keep))
    try:
        yield dropper
    finally:
        for handle in handles:
            handle.remove()


def masked(model: SlimModel, images: Tensor, lives: Lives, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """(logits, features in grid order) of ``model``'s backbone when its patches are dropped as in ``lives``.

    A ``plan`` also gives the merge targets, for precisions so coarse that ties decide between them.
    """
    vit = model.backbone.model
    with dropping(vit, lives.life, model.start, model.settings.merge, targets_of(plan)) as dropper:
        vit.forward_features(images)
    features = vit.norm(restored_tokens(dropper, len(vit.blocks) - 1, model.settings.restore_by))
    return vit.forward_head(features), features


def restored_tokens(dropper: PatchDropper, block: int, how: str) -> Tensor:
    """All tokens (batch, tokens, dim) after ``block`` of a run within `dropping`, with dropped patches restored."""
    prefix, out = dropper.prefix, dropper.left[block].clone()

    def state(image: int, patch: int) -> Tensor:
        own, life = dropper.left[block][image, prefix + patch], int(dropper.life[image, patch])
        if life > block or how == "last":
            return own
        target = dropper.target[image, patch]
        now, merged = state(image, target), dropper.entered[life][image, prefix + target]
        return now if how == "target" else own + (now - merged)

    for image in range(out.shape[0]):
        for patch in range(out.shape[1] - prefix):
            out[image, prefix + patch] = state(image, patch)
    return out


def targets_of(plan: Plan | None) -> MergeTargets | None:
    """Merge targets of a plan in grid order: indices of patches, not of ranks."""
    if plan is None or plan.merge_targets is None:
        return None
    target = torch.empty_like(plan.order).scatter(1, plan.order, plan.order.gather(1, plan.merge_targets.rank))
    weight = torch.empty_like(plan.merge_targets.weight).scatter(1, plan.order, plan.merge_targets.weight)
    return MergeTargets(target, weight)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that `distance` is at most ``tolerance``."""
    apart = distance(actual, expected)
    assert apart <= tolerance, f"{apart:.1e} apart, {tolerance:.0e} allowed"


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the larger of 1 and the largest value."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert torch.isfinite(expected).all(), "a reference that is not finite proves nothing"
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))
