"""Training targets of an image for dense prediction, from one forward pass of the dense model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..backbones import Backbone
from ..evaluation.agreement import kl_divergence
from .dense import DenseTarget, patch_features
from .targets import Targets, block_importance

__all__ = ["answer_errors", "compute_dense_targets", "feature_errors", "importance_of"]

_FLOOR = 0.01  # of the mean of an image; no patch has the importance 0, whose logarithm the scorer cannot learn
_ANSWER_POWER, _FEATURE_POWER = 0.25, 0.5  # of the errors: a few patches have very large ones
_READ_POWER = 0.5  # of what other patches read from a patch
_AT_ONCE = 4  # images whose answers are in memory: those of a head at full resolution are large


@torch.no_grad()
def compute_dense_targets(
    backbone: Backbone, images: Float[Tensor, "batch channels height width"], dense: DenseTarget
) -> Targets:
    """The targets of ``images`` for dense prediction, from one forward pass of the dense model ``backbone``.

    The importance of a patch follows from the error where its later blocks are skipped: its features are those of its
    state at the start block. Without a head it is the error of the features, with one that of the answers, times what
    other patches read from the patch (the importance for a classifier), each to a power.

    The similarity embedding is the change of the patch from the start block to the last distilled block, which a
    dropped patch takes from its merge target, and with a head its answer too: the cosine of two patches is the mean of
    the cosines of their changes and of the roots of their class probabilities. Other choices are compared in
    docs/learning.md.
    """
    embedded, prefix = backbone.embed(images), backbone.prefix
    x = tokens = embedded.tokens
    tapped, read = {}, []
    for index in range(dense.end):
        tokens = x if index == dense.start else tokens
        if index >= dense.start and dense.head is not None:
            read.append(block_importance(x, embedded.rope, backbone, index))
        x = backbone.block(index, x, backbone.rope_of(embedded.rope, index))
        if index in dense.blocks:
            tapped[index] = x
    features = patch_features(backbone, list(tapped.values()))
    skipped = dense.with_late(features, patch_features(backbone, [tokens] * len(dense.late)))
    change = (x - tokens)[:, prefix:]
    if dense.head is None:
        importance, embedding = importance_of(feature_errors(features, skipped, dense), _FEATURE_POWER), change
    else:
        errors, probability = answer_errors(features, skipped, dense, embedded.grid)
        importance = importance_of(errors, _ANSWER_POWER, torch.stack(read).mean(dim=0) ** _READ_POWER)
        embedding = torch.cat((F.normalize(change.float(), dim=2), probability.sqrt()), dim=2)
    return Targets(tokens, importance, embedding, tokens[:, 0, :0], features, tokens[:, :0])


def answer_errors(
    features: Float[Tensor, "batch patches all_dim"],
    skipped: Float[Tensor, "batch patches all_dim"],
    dense: DenseTarget,
    grid: tuple[int, int],
) -> tuple[Float[Tensor, "batch patches"], Float[Tensor, "batch patches classes"]]:
    """(errors, probabilities of the classes), means over the pixels of each patch.

    The error of a pixel is the KL divergence in nats of the answer on ``skipped`` from that on ``features``.
    """
    errors, probabilities = [], []
    for expected, found in zip(features.split(_AT_ONCE), skipped.split(_AT_ONCE), strict=True):
        reference = dense.answers(expected, grid).float()
        error = kl_divergence(reference, dense.answers(found, grid).float()).clamp(min=0)
        errors.append(F.adaptive_avg_pool2d(error[:, None], grid).flatten(1))
        probabilities.append(F.adaptive_avg_pool2d(reference.softmax(dim=1), grid).flatten(2).transpose(1, 2))
    return torch.cat(errors), torch.cat(probabilities)


def feature_errors(
    features: Float[Tensor, "batch patches all_dim"],
    skipped: Float[Tensor, "batch patches all_dim"],
    dense: DenseTarget,
) -> Float[Tensor, "batch patches"]:
    """Squared distance of the features of the late blocks, mean over channels.

    Channels are in units of their standard deviation over the patches of the image; at least a hundredth of the root
    mean square of all channels of the block.
    """
    expected, found = dense.late_part(features), dense.late_part(skipped)
    least = 0.01 * expected.square().mean(dim=(1, 3), keepdim=True).sqrt()
    scale = expected.std(dim=1, keepdim=True, correction=0).maximum(least).clamp(min=1e-6)
    return ((expected - found) / scale).square().mean(dim=(2, 3))


def importance_of(
    errors: Float[Tensor, "batch patches"], power: float, factor: Float[Tensor, "batch patches"] | float = 1.0
) -> Float[Tensor, "batch patches"]:
    """A power of the errors, with a floor, times ``factor``, as shares of their sum over the image."""
    raised = errors**power
    raised = (raised + _FLOOR * raised.mean(dim=1, keepdim=True).clamp(min=1e-6)) * factor
    return raised / raised.sum(dim=1, keepdim=True)
