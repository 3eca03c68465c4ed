"""Evaluation on cached targets: the tokens at the start block are cached, so only the slimmed blocks are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..backbones import Embedded
from ..evaluation.agreement import kl_divergence, same_class
from ..evaluation.embeddings import NEIGHBOURS, cosines, neighbour_classes, one_vector
from ..slimming import SlimModel
from .dense import DenseTarget
from .target_cache import TargetCache
from .targets import Targets, at_start, target_starts

__all__ = [
    "CachedDenseScore",
    "CachedEmbeddingScore",
    "CachedScore",
    "evaluate_cached",
    "evaluate_cached_dense",
    "evaluate_cached_embeddings",
    "measured",
]

_BATCH = 50
_DENSE_BATCH = 4  # answers of a head at full resolution are large

FromTokens = Callable[[Float[Tensor, "batch tokens dim"]], Tensor]
"""From the tokens of the targets, on the model's device, to the output of the model."""


class CachedScore(NamedTuple):
    """Means over the photos of a cache.

    Attributes:
        top1: fraction of photos whose predicted class is their label. dense_top1: the same for the dense model.
        agreement: fraction of photos with the same predicted class as the dense model.
        kl: KL divergence from the dense model, in nats.
    """

    top1: float
    agreement: float
    kl: float
    dense_top1: float


class CachedEmbeddingScore(NamedTuple):
    """Results of a model without a classifier on the photos of a cache.

    Attributes:
        cosine: similarity to the dense model's embedding, mean over the photos. low_cosine: its 5 % quantile.
        knn: fraction of photos whose label is that of their nearest neighbours among the others. None without labels.
        dense_knn: the same for the dense model.
    """

    cosine: float
    low_cosine: float
    knn: float | None
    dense_knn: float | None


class CachedDenseScore(NamedTuple):
    """Results of a model that is used for dense prediction, on the photos of a cache.

    Attributes:
        patch_cosine: similarity to the patch features of the dense model, mean over patches and blocks from the start
            block on. low_patch_cosine: its 5 % quantile.
        pixel_agreement: fraction of pixels with the same answer as the dense model. None without a head.
        pixel_kl: KL divergence of the answers from the dense model's, in nats per pixel. None without a head.
    """

    patch_cosine: float
    low_patch_cosine: float
    pixel_agreement: float | None
    pixel_kl: float | None


Score = CachedScore | CachedEmbeddingScore | CachedDenseScore


@torch.no_grad()
def measured(model: SlimModel, cache: TargetCache, dense: DenseTarget | None = None) -> Score:
    """Evaluate ``model`` as it is set on all photos of ``cache``, which has the targets of ``dense`` if it is given."""
    embedded = model.backbone.embed(model.backbone.blank(cache.image_size))
    if dense is not None:
        return evaluate_cached_dense(model, cache, dense, embedded)
    evaluate = evaluate_cached if model.backbone.num_classes else evaluate_cached_embeddings
    starts = target_starts(model)
    return evaluate(
        lambda tokens: model.resume(at_start(tokens, model.start, starts), embedded), cache, embedded.tokens.device
    )


@torch.no_grad()
def evaluate_cached(logits_of: FromTokens, cache: TargetCache, device: torch.device) -> CachedScore:
    """Evaluate ``logits_of`` on all photos of ``cache``."""
    sums = torch.zeros(4, dtype=torch.double)
    for targets, labels, logits in _outputs(logits_of, cache, device):
        counts = (
            logits.argmax(dim=1) == labels,
            same_class(targets.output, logits),
            kl_divergence(targets.output, logits),
            targets.output.argmax(dim=1) == labels,
        )
        sums += torch.stack([count.double().sum() for count in counts])
    return CachedScore(*(sums / max(1, len(cache))).tolist())


@torch.no_grad()
def evaluate_cached_embeddings(output_of: FromTokens, cache: TargetCache, device: torch.device) -> CachedEmbeddingScore:
    """Evaluate ``output_of``, which gives embeddings, on all photos of ``cache``."""
    dense, slimmed, classes = [], [], []
    for targets, labels, output in _outputs(output_of, cache, device):
        dense.append(one_vector(targets.output))
        slimmed.append(one_vector(output))
        classes.append(labels)
    reference, embeddings, label = torch.cat(dense), torch.cat(slimmed), torch.cat(classes)
    cosine = cosines(reference, embeddings).double()
    knn = dense_knn = None
    if len(label) > 1 and bool((label >= 0).all()):
        knn, dense_knn = (
            (neighbour_classes(vectors, vectors, label, NEIGHBOURS, leave_one_out=True) == label).double().mean().item()
            for vectors in (embeddings, reference)
        )
    return CachedEmbeddingScore(cosine.mean().item(), cosine.quantile(0.05).item(), knn, dense_knn)


@torch.no_grad()
def evaluate_cached_dense(
    model: SlimModel, cache: TargetCache, dense: DenseTarget, embedded: Embedded
) -> CachedDenseScore:
    """Evaluate the patch features of ``model``, and the answers of the head on them, on all photos of ``cache``."""
    cosine, agreement, divergence = [], [], []
    for begin in range(0, len(cache), _DENSE_BATCH):
        targets = cache.targets(range(begin, min(begin + _DENSE_BATCH, len(cache)))).to(embedded.tokens.device)
        features = dense.slimmed(model, targets, embedded)
        late = dense.late_part(targets.patches), dense.late_part(features)
        cosine.append(torch.cosine_similarity(*late, dim=-1).flatten().cpu())
        if dense.head is not None:
            answers = [dense.answers(each, embedded.grid).float() for each in (targets.patches, features)]
            agreement.append(same_class(*answers).double().mean(dim=(1, 2)).cpu())
            divergence.append(kl_divergence(*answers).double().mean(dim=(1, 2)).cpu())
    cosines_of_patches = torch.cat(cosine).double()
    lowest = cosines_of_patches.kthvalue(max(1, round(0.05 * len(cosines_of_patches)))).values
    of_pixels = [torch.cat(each).mean().item() if each else None for each in (agreement, divergence)]
    return CachedDenseScore(cosines_of_patches.mean().item(), lowest.item(), *of_pixels)


def _outputs(
    output_of: FromTokens, cache: TargetCache, device: torch.device
) -> Iterator[tuple[Targets, Tensor, Tensor]]:
    """(targets, labels, output) of all photos in batches, on the CPU."""
    for begin in range(0, len(cache), _BATCH):
        rows = range(begin, min(begin + _BATCH, len(cache)))
        targets = cache.targets(rows)
        yield targets, cache.labels(rows), output_of(targets.tokens.to(device)).float().cpu()
