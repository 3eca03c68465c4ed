"""Training targets of an image for dense prediction, from one forward pass of the dense model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..backbones import Backbone
from ..evaluation.agreement import kl_divergence
from .dense import DenseTarget, patch_features
from .targets import Targets

__all__ = ["answer_errors", "compute_dense_targets", "feature_errors", "importance_of"]

_FLOOR = 0.01  # of the mean error of an image; no patch has the importance 0, whose logarithm the scorer cannot learn
_AT_ONCE = 4  # images whose answers are in memory: those of a head at full resolution are large


@torch.no_grad()
def compute_dense_targets(
    backbone: Backbone, images: Float[Tensor, "batch channels height width"], dense: DenseTarget
) -> Targets:
    """The targets of ``images`` for dense prediction, from one forward pass of the dense model ``backbone``.

    The importance of a patch is the error where its own change is not computed: its features are those of its state at
    the start block plus the mean change of all patches of the image. A dropped patch gets the change of another patch,
    so its own change is what is lost. With a head, errors are those of its answers; without one, of the features.
    The similarity embedding is the change itself, minus its mean: two patches are similar if the change of one can
    replace that of the other.
    """
    embedded, prefix = backbone.embed(images), backbone.prefix
    x = tokens = embedded.tokens
    tapped = {}
    for index in range(dense.end):
        tokens = x if index == dense.start else tokens
        x = backbone.block(index, x, backbone.rope_of(embedded.rope, index))
        if index in dense.blocks:
            tapped[index] = x
    features = patch_features(backbone, list(tapped.values()))
    changes = [(tapped[block] - tokens)[:, prefix:] for block in dense.late]
    skipped = [_with_mean_change(tokens, change, prefix) for change in changes]
    without = dense.with_late(features, patch_features(backbone, skipped))
    errors = (feature_errors if dense.head is None else answer_errors)(features, without, dense, embedded.grid)
    change = changes[-1] - changes[-1].mean(dim=1, keepdim=True)
    return Targets(tokens, importance_of(errors), change, tokens[:, 0, :0], features)


def _with_mean_change(
    tokens: Float[Tensor, "batch tokens dim"], change: Float[Tensor, "batch patches dim"], prefix: int
) -> Float[Tensor, "batch tokens dim"]:
    """``tokens`` with the mean change of the image added to each patch."""
    return torch.cat((tokens[:, :prefix], tokens[:, prefix:] + change.mean(dim=1, keepdim=True)), dim=1)


def answer_errors(
    features: Float[Tensor, "batch patches all_dim"],
    without: Float[Tensor, "batch patches all_dim"],
    dense: DenseTarget,
    grid: tuple[int, int],
) -> Float[Tensor, "batch patches"]:
    """KL divergence in nats of the answers on ``without`` from those on ``features``, mean over each patch's pixels."""
    each = []
    for expected, found in zip(features.split(_AT_ONCE), without.split(_AT_ONCE), strict=True):
        errors = kl_divergence(dense.answers(expected, grid).float(), dense.answers(found, grid).float())
        each.append(F.adaptive_avg_pool2d(errors.clamp(min=0)[:, None], grid).flatten(1))
    return torch.cat(each)


def feature_errors(
    features: Float[Tensor, "batch patches all_dim"],
    without: Float[Tensor, "batch patches all_dim"],
    dense: DenseTarget,
    grid: tuple[int, int],
) -> Float[Tensor, "batch patches"]:
    """Squared distance of the features of the late blocks, mean over channels.

    Channels are in units of their standard deviation over the patches of the image; at least a hundredth of the root
    mean square of all channels of the block.
    """
    expected, found = dense.late_part(features), dense.late_part(without)
    least = 0.01 * expected.square().mean(dim=(1, 3), keepdim=True).sqrt()
    scale = expected.std(dim=1, keepdim=True, correction=0).maximum(least).clamp(min=1e-6)
    return ((expected - found) / scale).square().mean(dim=(2, 3))


def importance_of(errors: Float[Tensor, "batch patches"]) -> Float[Tensor, "batch patches"]:
    """Errors with a floor, as shares of their sum over the image; equal shares where all errors are 0."""
    raised = errors + _FLOOR * errors.mean(dim=1, keepdim=True).clamp(min=1e-6)
    return raised / raised.sum(dim=1, keepdim=True)
