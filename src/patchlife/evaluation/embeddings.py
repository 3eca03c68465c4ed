"""Quality of embeddings: of models without a classifier, whose output is a vector and no class.

Two measures: the cosine to the dense model's embedding of the same photo, which needs no labels, and the accuracy of
nearest neighbours, which says what a search or a few labelled photos would find.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..config import Mode
from ..errors import ConfigError
from ..slimming.classifier import Classifier
from .accuracy import paired_interval

__all__ = [
    "NEIGHBOURS",
    "EmbeddingScore",
    "cosines",
    "evaluate_embeddings",
    "neighbour_classes",
    "one_vector",
]

NEIGHBOURS = 10
"""How many neighbours vote, unless stated otherwise."""

_QUERIES_AT_ONCE = 512  # the similarities of so many queries to the whole gallery are in memory at a time

Batches = Iterable[tuple[Float[Tensor, "batch channels height width"], Int[Tensor, "batch"]]]


@dataclass(frozen=True)
class EmbeddingScore:
    """Embeddings and cost of a model at one budget in one mode.

    Attributes:
        budget: requested fraction of the dense FLOPs. mode: fixed or adaptive.
        flops: mean per photo. fraction: ``flops`` as a fraction of the dense FLOPs.
        cosine: similarity to the dense model's embedding of the same photo, mean over the photos.
        low_cosine: its 5 % quantile: it is lower for one photo in twenty.
        knn: fraction of the photos whose label is the class of their nearest neighbours; the same model embeds photo
            and neighbours. None without labels.
        dense_knn: ``knn`` of the dense model.
        drop: ``dense_knn`` minus ``knn``. drop_interval: 95 % interval of ``drop``, from paired differences.
        photos_per_s: throughput of the model alone, in one pass without warm-up: an indication only.
    """

    budget: float
    mode: Mode
    flops: float
    fraction: float
    cosine: float
    low_cosine: float
    knn: float | None
    dense_knn: float | None
    drop: float | None
    drop_interval: tuple[float, float] | None
    photos_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def cosines(reference: Float[Tensor, "photos dim"], embeddings: Float[Tensor, "photos dim"]) -> Float[Tensor, "photos"]:
    """Cosine similarity of each photo's two embeddings."""
    return F.cosine_similarity(reference.double(), embeddings.double(), dim=1).to(reference.dtype)


def one_vector(output: Float[Tensor, "photos *tokens dim"]) -> Float[Tensor, "photos dim"]:
    """One vector per photo; of a model that gives a vector per token, their mean."""
    return output.flatten(1, -2).mean(dim=1) if output.ndim > 2 else output


def neighbour_classes(
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    classes: Int[Tensor, "gallery"],
    neighbours: int = NEIGHBOURS,
    leave_one_out: bool = False,
) -> Int[Tensor, "queries"]:
    """The class that the nearest neighbours of each query vote for.

    The neighbours are the vectors of ``gallery`` with the largest cosine similarity. Each votes for its class with its
    similarity as weight, or 0 if that is negative. Of several classes with the same votes the first wins.

    Args:
        queries: to classify.
        gallery: the vectors that are searched.
        classes: class of each of them, 0 or more.
        neighbours: how many vote; all of them if the gallery has fewer.
        leave_one_out: ``queries`` is ``gallery``, and a vector is no neighbour of itself.

    Raises:
        ConfigError: nothing to search, or fewer than one neighbour.
    """
    available = len(gallery) - leave_one_out
    if neighbours < 1 or available < 1:
        raise ConfigError(
            f"expected at least 1 neighbour and 1 vector to search, got {neighbours} and {max(0, available)}"
        )
    searched, found = F.normalize(gallery.float(), dim=1), []
    for begin in range(0, len(queries), _QUERIES_AT_ONCE):
        part = F.normalize(queries[begin : begin + _QUERIES_AT_ONCE].float(), dim=1)
        similarity = part @ searched.T
        if leave_one_out:
            row = torch.arange(len(part), device=part.device)
            similarity[row, begin + row] = -torch.inf
        nearest = similarity.topk(min(neighbours, available), dim=1)
        votes = similarity.new_zeros(len(part), int(classes.max()) + 1, dtype=torch.double)
        votes.scatter_add_(1, classes[nearest.indices], nearest.values.double().clamp(min=0))
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


@torch.inference_mode()
def evaluate_embeddings(
    model: Classifier,
    dense: Callable[[Tensor], Tensor],
    batches: Batches,
    settings: Sequence[tuple[float, Mode]],
    device: torch.device | None = None,
    gallery: Batches | None = None,
    neighbours: int = NEIGHBOURS,
) -> list[EmbeddingScore]:
    """Evaluate the embeddings of ``model`` at each (budget, mode); every photo is read once.

    The model's settings are restored at the end. The embeddings of all photos are kept in memory.

    Args:
        model: calibrated, if a mode is adaptive.
        dense: the dense model, the reference of cosine and drop.
        batches: images and labels. With a label below 0, neighbours are not searched.
        settings: (budget, mode) pairs.
        device: where images go; the model's device if not given.
        gallery: images and labels among which neighbours are searched; the same model embeds them. Without it each
            photo is left out in turn, and the neighbours are among all others.
        neighbours: how many vote.
    """
    device = device or model.device
    photos = _embed_all(model, dense, batches, settings, device)
    searched = None if gallery is None else _embed_all(model, dense, gallery, settings, device)
    return [
        _score(budget, mode, index, photos, searched, neighbours, model.dense_flops)
        for index, (budget, mode) in enumerate(settings)
    ]


class _Embedded(NamedTuple):
    """Embeddings of all photos: of the dense model, and of the slimmed one at each setting, with its mean FLOPs."""

    labels: Tensor
    dense: Tensor
    slimmed: list[Tensor]
    flops: list[float]
    seconds: list[float]


def _embed_all(
    model: Classifier,
    dense: Callable[[Tensor], Tensor],
    batches: Batches,
    settings: Sequence[tuple[float, Mode]],
    device: torch.device,
) -> _Embedded:
    labels, reference = [], []
    slimmed: list[list[Tensor]] = [[] for _ in settings]
    flops: list[list[int]] = [[] for _ in settings]
    seconds = [0.0] * len(settings)
    with model.temporarily():
        for images, label in batches:
            images = images.to(device, model.dtype)
            labels.append(label)
            reference.append(one_vector(dense(images)).float().cpu())
            for index, (budget, mode) in enumerate(settings):
                model.set_mode(mode).set_budget(budget)
                started = time.perf_counter()
                output, lives = model.predict(images)
                slimmed[index].append(one_vector(output).float().cpu())  # waits for the device
                seconds[index] += time.perf_counter() - started
                flops[index] += model.flops_of(lives)
    means = [sum(counts) / len(counts) for counts in flops]
    return _Embedded(torch.cat(labels), torch.cat(reference), [torch.cat(parts) for parts in slimmed], means, seconds)


def _score(
    budget: float,
    mode: Mode,
    index: int,
    photos: _Embedded,
    searched: _Embedded | None,
    neighbours: int,
    dense_flops: float,
) -> EmbeddingScore:
    """The score of the setting of this index; ``searched`` is the gallery, None to leave one out."""
    vectors, flops = photos.slimmed[index], photos.flops[index]
    cosine = cosines(photos.dense, vectors).double()
    knn = dense_knn = drop = interval = None
    if not bool((photos.labels < 0).any()):
        right, dense_right = (
            _right(own, photos.labels, among, searched.labels if searched else None, neighbours)
            for own, among in (
                (vectors, searched.slimmed[index] if searched else None),
                (photos.dense, searched.dense if searched else None),
            )
        )
        knn, dense_knn = right.double().mean().item(), dense_right.double().mean().item()
        drop, interval = dense_knn - knn, paired_interval(dense_right, right)
    return EmbeddingScore(
        budget,
        mode,
        flops,
        flops / dense_flops,
        cosine.mean().item(),
        cosine.quantile(0.05).item(),
        knn,
        dense_knn,
        drop,
        interval,
        len(vectors) / photos.seconds[index],
    )


def _right(
    vectors: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None, neighbours: int
) -> Tensor:
    """Whether the neighbours of each photo vote for its label."""
    if gallery is None or gallery_labels is None:
        return neighbour_classes(vectors, vectors, labels, neighbours, leave_one_out=True) == labels
    return neighbour_classes(vectors, gallery, gallery_labels, neighbours) == labels
