"""EViT and DynamicViT as stages of our own loop, by their papers' rules, from the tokens that enter block 3.

What runs at inference is what `patchlife bench` measures (`patchlife.benchmarks.baselines`); here is what the papers
do while they train. Both learn what our stage 2 learns (every weight from block 3 on) from the same loss; the rule is
theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchlife.backbones import Backbone
from patchlife.benchmarks.baselines.dynamicvit import DynamicViT, Predictor
from patchlife.benchmarks.baselines.evit import EViT
from patchlife.training.losses import distillation_loss
from patchlife.training.stage import Stage, Step

__all__ = ["DynamicViTStage", "EViTStage"]


class EViTStage(Stage):
    """Drops and fuses while it learns, as it does later. The keep rate falls to its target over the first third of the
    steps, linearly (the paper: over the first epochs, along a cosine)."""

    def __init__(self, baseline: EViT, steps: int) -> None:
        super().__init__()
        self.baseline, self.steps, self.done, self.target = baseline, steps, 0, baseline.rate

    def answer(self, tokens: Tensor) -> Tensor:
        """Logits from tokens that enter block 3."""
        baseline, bb, x = self.baseline, self.baseline.backbone, tokens
        for index in range(min(baseline.at), bb.depth):
            patches = x.shape[1] - bb.prefix
            reduces = index in baseline.at and baseline.keep(patches) < patches
            x = baseline.reducing_block(index, x) if reduces else bb.block(index, x)
        return bb.classify(bb.norm(x))

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Distillation at the keep rate of this step."""
        risen = min(1.0, (self.done + 1) / (self.steps / 3))
        self.baseline.rate = 1 - (1 - self.target) * risen
        self.done += 1
        loss, divergence = distillation_loss(self.answer(step.targets.tokens), step.targets.logits)
        self.baseline.rate = self.target
        return loss, {"divergence": divergence.item()}


class DynamicViTStage(Stage):
    """Learns on all patches, those that a Gumbel draw dropped being masked out of attention; drops them later.

    The loss adds the paper's ratio term, twice the squared distance of the fraction kept from its target. Its
    distillation of single tokens is left out: no method here sees more of the teacher than logits.
    """

    def __init__(self, baseline: DynamicViT) -> None:
        super().__init__()
        self.baseline = baseline

    def lr_multiplier(self, name: str) -> float:
        """The predictors begin from nothing, so they learn faster than the backbone, as in the paper."""
        return 10.0 if "predictors" in name else 1.0

    def answer(self, tokens: Tensor) -> Tensor:
        """Logits from tokens that enter block 3; patches really go."""
        baseline, bb, x = self.baseline, self.baseline.backbone, tokens
        stages = dict(
            zip(baseline.at, zip(baseline.predictors, baseline.kept(x.shape[1] - bb.prefix), strict=True), strict=True)
        )
        for index in range(min(baseline.at), bb.depth):
            if index in stages:
                predictor, keep = stages[index]
                patches = x[:, bb.prefix :]
                best = predictor(patches).topk(keep, dim=1).indices
                kept = patches.gather(1, best[..., None].expand(-1, -1, patches.shape[2]))
                x = torch.cat((x[:, : bb.prefix], kept), dim=1)
            x = bb.block(index, x)
        return bb.classify(bb.norm(x))

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Distillation on masked patches, and the ratio term."""
        baseline, bb, x = self.baseline, self.baseline.backbone, step.targets.tokens
        dice = torch.Generator().manual_seed(int(step.chance * 2**40))
        alive = x.new_ones(x.shape[0], x.shape[1] - bb.prefix)
        ratio = x.new_zeros(())
        for index in range(min(baseline.at), bb.depth):
            if index in baseline.at:
                stage = baseline.at.index(index)
                alive = alive * _drawn(_keep_logits(baseline.predictors[stage], x[:, bb.prefix :], alive), dice)
                ratio = ratio + (alive.mean(dim=1) - baseline.rho ** (stage + 1)).square().mean() / len(baseline.at)
            x = _masked_block(bb, index, x, alive)
        loss, divergence = distillation_loss(bb.classify(bb.norm(x)), step.targets.logits)
        return loss + 2 * ratio, {"divergence": divergence.item(), "ratio": ratio.item()}


def _keep_logits(predictor: nn.Module, patches: Tensor, alive: Tensor) -> Tensor:
    """(batch, patches, 2): log-probability of keeping and of dropping; what is shared is the mean of the living."""
    assert isinstance(predictor, Predictor)
    features = predictor.features(patches)
    weight = (alive / alive.sum(dim=1, keepdim=True))[:, None]
    shared = (weight @ features[..., predictor.own :]).expand(-1, patches.shape[1], -1)
    return predictor.decide(torch.cat((features[..., : predictor.own], shared), dim=-1)).log_softmax(dim=-1)


def _drawn(logits: Tensor, dice: torch.Generator) -> Tensor:
    """(batch, patches): 1 for kept, 0 for dropped, with the gradient of a Gumbel softmax."""
    uniform = torch.rand(logits.shape, generator=dice).clamp(1e-9, 1 - 1e-9).to(logits.device)
    soft = (logits - (-uniform.log()).log()).softmax(dim=-1)[..., 0]
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach()


def _masked_block(bb: Backbone, index: int, x: Tensor, alive: Tensor) -> Tensor:
    """A block in which nobody sees the dropped patches, but every token sees itself."""
    seen = F.pad(alive, (bb.prefix, 0), value=1.0)
    self_seen = torch.eye(x.shape[1], device=x.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, tokens, dim)
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
        mask = seen[:, None, None, :] * (1 - self_seen) + self_seen
        weight = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp() * mask
        return (weight / weight.sum(dim=-1, keepdim=True) @ v).transpose(1, 2)

    return bb.block_with(index, x, attend, None)
