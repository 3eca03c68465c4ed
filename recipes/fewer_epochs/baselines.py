"""EViT, DynamicViT, TNT and ToMe as stages of our training loop, from the tokens that enter block 3.

ToMe merges from block 0 on, so its stage starts at the tokens that enter block 0. At inference all of them run as
`patchlife bench` measures them (`patchlife.benchmarks.baselines`). This file has the rules that their papers use in
training. All train every weight from block 3 on with the same loss as our stage 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchlife.backbones import Backbone
from patchlife.benchmarks.baselines.dynamicvit import DynamicViT, Predictor
from patchlife.benchmarks.baselines.evit import EViT
from patchlife.benchmarks.baselines.tnt import TokenNoise
from patchlife.benchmarks.baselines.tome import ToMe
from patchlife.training.losses import distillation_loss
from patchlife.training.stage import Stage, Step

__all__ = ["DynamicViTStage", "EViTStage", "TNTStage", "ToMeStage"]


class EViTStage(Stage):
    """EViT, which drops and fuses patches in training as at inference.

    The keep rate falls to its target linearly over the first third of the steps (in the paper: along a cosine, over the
    first epochs).
    """

    def __init__(self, baseline: EViT, steps: int) -> None:
        super().__init__()
        self.baseline, self.steps, self.done, self.target = baseline, steps, 0, baseline.rate

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits from tokens that enter block 3."""
        baseline, bb, x = self.baseline, self.baseline.backbone, tokens
        for index in range(min(baseline.at), bb.depth):
            patches = x.shape[1] - bb.prefix
            reduces = index in baseline.at and baseline.keep(patches) < patches
            x = baseline.reducing_block(index, x) if reduces else bb.block(index, x)
        return bb.classify(bb.norm(x))

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Distillation at the keep rate of this step."""
        progress = min(1.0, (self.done + 1) / (self.steps / 3))
        self.baseline.rate = 1 - (1 - self.target) * progress
        self.done += 1
        loss, divergence = distillation_loss(self.logits(step.targets.tokens), step.targets.output)
        self.baseline.rate = self.target
        return loss, {"divergence": divergence.item()}


class DynamicViTStage(Stage):
    """DynamicViT: in training, patches dropped by a Gumbel draw are masked out of attention; at inference they go.

    The loss adds the paper's ratio term, twice the squared distance of the fraction kept from its target. The paper's
    distillation of single tokens is left out: all methods here get the logits of the teacher only.
    """

    def __init__(self, baseline: DynamicViT) -> None:
        super().__init__()
        self.baseline = baseline

    def lr_multiplier(self, name: str) -> float:
        """Larger for the predictors, which start from random weights, as in the paper."""
        return 10.0 if "predictors" in name else 1.0

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits from tokens that enter block 3; patches are really dropped."""
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
        generator = torch.Generator().manual_seed(int(step.random_draw * 2**40))
        kept = x.new_ones(x.shape[0], x.shape[1] - bb.prefix)
        ratio = x.new_zeros(())
        for index in range(min(baseline.at), bb.depth):
            if index in baseline.at:
                stage = baseline.at.index(index)
                keep_logits = _keep_logits(baseline.predictors[stage], x[:, bb.prefix :], kept)
                kept = kept * _random_mask(keep_logits, generator)
                ratio = ratio + (kept.mean(dim=1) - baseline.rho ** (stage + 1)).square().mean() / len(baseline.at)
            x = _masked_block(bb, index, x, kept)
        loss, divergence = distillation_loss(bb.classify(bb.norm(x)), step.targets.output)
        return loss + 2 * ratio, {"divergence": divergence.item(), "ratio": ratio.item()}


class TNTStage(Stage):
    """TNT: in training noise is added to the patches and none is dropped; at inference they are dropped.

    The noise of a patch is Gaussian with a standard deviation of ``noise * (1 - relevance)``. The relevances of an
    image sum to one, so they cannot remove all noise, and they grow where noise costs most. ``noise`` is in units of
    the standard deviation of the image's patches (our reading, for models whose tokens have other scales). Since
    nothing is dropped in training, one run serves all keep rates.
    """

    def __init__(self, baseline: TokenNoise, noise: float = 0.5) -> None:
        super().__init__()
        self.baseline, self.noise = baseline, noise

    def lr_multiplier(self, name: str) -> float:
        """Larger for the relevance layer, which starts from random weights, as for DynamicViT's predictors."""
        return 10.0 if "relevance" in name else 1.0

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits from tokens that enter block 3; patches are really dropped."""
        return self.baseline.resume(tokens)

    def noisy(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """``tokens`` with noise on the patches."""
        prefix = self.baseline.backbone.prefix
        patches = tokens[:, prefix:]
        drawn = torch.randn(patches.shape, generator=generator).to(patches)
        scale = self.noise * patches.std(dim=(1, 2), keepdim=True)
        noise = scale * (1 - self.baseline.alpha(patches))[..., None] * drawn
        return torch.cat((tokens[:, :prefix], patches + noise), dim=1)

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Distillation on noisy patches."""
        generator = torch.Generator().manual_seed(int(step.random_draw * 2**40))
        logits = self.baseline.rest(self.noisy(step.targets.tokens, generator))
        loss, divergence = distillation_loss(logits, step.targets.output)
        return loss, {"divergence": divergence.item()}


class ToMeStage(Stage):
    """ToMe, which merges in training as at inference; gradients flow through the means of merged patches."""

    def __init__(self, baseline: ToMe) -> None:
        super().__init__()
        self.baseline = baseline

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits from tokens that enter block 0."""
        bb, x = self.baseline.backbone, tokens
        size = x.new_ones(len(x), x.shape[1] - bb.prefix)
        for index in range(bb.depth):
            x, size = self.baseline.block(index, x, size)
        return bb.classify(bb.norm(x))

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Distillation with merging."""
        loss, divergence = distillation_loss(self.logits(step.targets.tokens), step.targets.output)
        return loss, {"divergence": divergence.item()}


def _keep_logits(predictor: nn.Module, patches: Tensor, kept: Tensor) -> Tensor:
    """(batch, patches, 2): log-probability of keeping and of dropping; shared features are means over kept patches."""
    assert isinstance(predictor, Predictor)
    features = predictor.features(patches)
    weight = (kept / kept.sum(dim=1, keepdim=True))[:, None]
    shared = (weight @ features[..., predictor.own :]).expand(-1, patches.shape[1], -1)
    return predictor.decide(torch.cat((features[..., : predictor.own], shared), dim=-1)).log_softmax(dim=-1)


def _random_mask(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(batch, patches): 1 for kept, 0 for dropped, with the gradient of a Gumbel softmax."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-9).to(logits.device)
    soft = (logits - (-uniform.log()).log()).softmax(dim=-1)[..., 0]
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach()


def _masked_block(bb: Backbone, index: int, x: Tensor, kept: Tensor) -> Tensor:
    """A block in which no token attends to dropped patches, except each to itself."""
    attended = F.pad(kept, (bb.prefix, 0), value=1.0)
    itself = torch.eye(x.shape[1], device=x.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, tokens, dim)
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
        mask = attended[:, None, None, :] * (1 - itself) + itself
        weight = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp() * mask
        return (weight / weight.sum(dim=-1, keepdim=True) @ v).transpose(1, 2)

    return bb.block_with(index, x, attend, None)
