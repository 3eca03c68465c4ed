"""Parity: comparing the outputs of an exported graph with those of the model that it was made from.

Images run through both at batch 1, 2 and 5; one image is NaN. The decision is also compared alone, on scores that
photos rarely give: tied, all equal, NaN, infinite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ExportError
from ..runtime.sessions import ModuleSession, Session
from ..runtime.tensor_module import DecisionModule, TensorModule
from ..slimming.schedule import Schedule

__all__ = ["BATCHES", "Parity", "check_decision", "check_int8", "check_outputs", "hard_cases", "sample_images"]

BATCHES = (1, 2, 5)
_MAX_UNDECIDED = 0.1  # fraction of the images
_ROUNDING = 1e-5  # size of the pixel noise that stands for rounding noise, relative to the image's standard deviation


@dataclass(frozen=True)
class Parity:
    """How close the outputs of an exported graph are to those of the model.

    Attributes:
        images: number of images compared.
        difference: the largest between two logits; of embeddings the largest between two components, relative to the
            largest component of the image's embedding.
        agreement: fraction of the images with the same predicted class; None for embeddings.
        undecided: number of images left out because the model's own decision changes under rounding noise: two patches
            have equal scores or similarities up to the sixth digit.
        note: a part that was not compared; empty if all was.
        cosine: mean cosine between the embeddings of graph and model; None for logits.
    """

    images: int
    difference: float
    agreement: float | None = None
    undecided: int = 0
    note: str = ""
    cosine: float | None = None

    @property
    def closeness(self) -> float:
        """Agreement or cosine, whichever there is; 1 is best."""
        closeness = self.agreement if self.cosine is None else self.cosine
        assert closeness is not None
        return closeness

    def to_dict(self) -> dict[str, Any]:
        """The fields that apply, for the metadata."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        text = f"{self.images} images, "
        if self.cosine is None:
            text += f"largest difference of a logit {self.difference:.1e}, "
            text += f"top-1 agreement {100 * self.closeness:.2f} %"
        else:
            text += f"largest difference of an embedding {self.difference:.1e} of its largest component, "
            text += f"mean cosine {self.cosine:.6f}"
        text += f", {self.undecided} left out (a tie to the sixth digit)" if self.undecided else ""
        return text + (f" ({self.note})" if self.note else "")


def check_outputs(
    session: Session, module: TensorModule, images: Float[Tensor, "n channels height width"], tolerance: float
) -> Parity:
    """Compare outputs and lives of images in batches of 1, 2 and 5, and of a batch with a NaN image.

    Differences of logits are absolute, or relative to a tenth of the largest logit if that is above 10. Differences of
    embeddings are relative (see `Parity`).

    Raises ExportError that names the first difference.
    """
    reference, largest, close, compared, undecided = ModuleSession(module), 0.0, 0.0, 0, 0
    for batch in _batches(images):
        expected, actual = reference.run(batch.numpy()), session.run(batch.numpy())
        differences = _differences(expected[0], actual[0], module)
        different = differences > tolerance * (1.0 if module.embeds else max(1.0, _largest(expected[0]) / 10))
        different |= _distance(expected[1], actual[1]) > 0 if len(expected) > 1 else False
        for i in np.flatnonzero(different):
            if not _changes_under_rounding(reference, batch[i : i + 1], module, tolerance):
                raise ExportError(_first_difference(expected, actual, int(i), len(batch), module))
        undecided += int(different.sum())
        compared += int((~different).sum())
        largest = max([largest, *differences[~different].tolist()])
        close += float(_closeness(expected[0], actual[0], module)[~different].sum())
    if undecided > 1 + _MAX_UNDECIDED * compared:
        raise ExportError(
            f"the prediction changes under rounding noise for {undecided} of {undecided + compared} images, too "
            "many for a comparison; give photos like those that the model is used for"
        )
    _check_nan(reference, session, images[:3].clone(), module, tolerance)
    return _parity(compared, largest, close, module, undecided)


def check_int8(
    session: Session, module: TensorModule, images: Float[Tensor, "n channels height width"], minimum: float
) -> Parity:
    """Compare predicted classes, or embeddings.

    Raises ExportError if the fraction of classes that agree, or the mean cosine, is below ``minimum``.
    """
    reference, largest, close, count = ModuleSession(module), 0.0, 0.0, 0
    for batch in images.split(16):
        expected, actual = reference.run(batch.numpy())[0], session.run(batch.numpy())[0]
        largest = max([largest, *_differences(expected, actual, module).tolist()])
        close += float(_closeness(expected, actual, module).sum())
        count += len(batch)
    if close < minimum * count:
        found = (
            f"the mean cosine of int8 and float32 embeddings of {count} images is {close / count:.3f}, expected at "
            f"least {minimum:g}"
            if module.embeds
            else f"int8 predicts the same class as float32 for {close:.0f} of {count} images "
            f"({100 * close / count:.1f} %), expected at least {100 * minimum:g} %"
        )
        raise ExportError(f"{found}; give photos like those that the model is used for, or export without int8")
    return _parity(count, largest, close, module)


def check_decision(session: Session, schedule: Schedule, grid: tuple[int, int]) -> None:
    """Compare lives, order and merge targets on the hard cases. Raises ExportError that names the first difference."""
    cases, scores = hard_cases(schedule.kept[0])
    expected = ModuleSession(DecisionModule(schedule, grid)).run(scores.numpy())
    actual = session.run(scores.numpy())
    for output, a, b in zip(("lives", "order", "merge targets"), expected, actual, strict=True):
        for i in np.flatnonzero((a != b).any(axis=1)):
            place = int(np.flatnonzero(a[i] != b[i])[0])
            raise ExportError(
                f"the decision of this engine differs from torch's if scores are {cases[i]}: {output} at {place} is "
                f"{b[i, place]:g}, {a[i, place]:g} in torch; nothing was written, please report the engine's version"
            )


def hard_cases(patches: int) -> tuple[list[str], Float[Tensor, "6 patches 1_and_8"]]:
    """(names, scores and similarity embeddings) of cases that engines may sort differently. Embeddings repeat."""
    draw = torch.Generator().manual_seed(0)
    score = torch.randn(6, patches, generator=draw)
    score[1] = (score[1] * 2).round()
    score[2] = 0.25
    score[3, ::3] = torch.nan
    score[4] = torch.nan
    score[5, ::4], score[5, 1::4] = torch.inf, -torch.inf
    embedding = torch.eye(8)[torch.randint(0, 8, (6, patches), generator=draw)]
    return ["all different", "tied", "all equal", "partly NaN", "all NaN", "infinite"], torch.cat(
        (score[..., None], embedding), dim=2
    )


def sample_images(count: int, channels: int, size: tuple[int, int]) -> Float[Tensor, "count channels *size"]:
    """Random images used if there are no photos: noise at three scales, normalised to a standard deviation of 1."""
    draw = torch.Generator().manual_seed(0)
    image = torch.zeros(count, channels, *size)
    for cells, strength in ((3, 1.0), (9, 0.6), (40, 0.25)):
        noise = torch.randn(count, channels, min(cells, size[0]), min(cells, size[1]), generator=draw)
        image += strength * nn.functional.interpolate(noise, size, mode="bilinear")
    return image / image.std()


def _batches(images: Tensor) -> Iterator[Tensor]:
    """Batches of 1, 2, 5, 1, ... until every image occurred; the first images fill up the last batches."""
    endless, left = cycle(images), len(images)
    for size in islice(cycle(BATCHES), max(len(BATCHES), len(images))):
        yield torch.stack([*islice(endless, size)])
        left -= size
        if left <= 0 and size == BATCHES[-1]:
            return


def _distance(a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, "batch"]:
    """The largest difference for each image. Two NaN are equal; one NaN counts as infinite."""
    gap = np.where(np.isnan(a) & np.isnan(b), 0.0, np.abs(a - b))
    return np.nan_to_num(gap, nan=np.inf).reshape(len(a), -1).max(axis=1)


def _differences(expected: np.ndarray, actual: np.ndarray, module: TensorModule) -> Float[np.ndarray, "batch"]:
    """The largest difference of each image's output; of an embedding relative to its largest component."""
    differences = _distance(expected, actual)
    if not module.embeds:
        return differences
    sizes = np.abs(np.nan_to_num(expected)).reshape(len(expected), -1).max(axis=1)
    return differences / np.maximum(sizes, np.finfo(np.float32).tiny)


def _closeness(expected: np.ndarray, actual: np.ndarray, module: TensorModule) -> Float[np.ndarray, "batch"]:
    """For each image 1 or 0, for equal classes or not (of all tokens, if each has its own), or the mean cosine."""
    if module.embeds:
        a, b = (np.nan_to_num(array.astype(np.float64)) for array in (expected, actual))
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        closeness = np.where(lengths > 0, (a * b).sum(-1) / np.where(lengths > 0, lengths, 1), (a == b).all(-1))
        return closeness.reshape(len(a), -1).mean(axis=1)
    return (expected.argmax(-1) == actual.argmax(-1)).reshape(len(expected), -1).all(axis=1).astype(float)


def _parity(images: int, difference: float, close: float, module: TensorModule, undecided: int = 0) -> Parity:
    """The parity from a sum of `_closeness`."""
    mean = close / images
    agreement, cosine = (None, mean) if module.embeds else (mean, None)
    return Parity(images, difference, agreement, undecided, cosine=cosine)


def _largest(logits: np.ndarray) -> float:
    return float(np.nanmax(np.abs(logits), initial=0.0))


def _changes_under_rounding(reference: Session, image: Tensor, module: TensorModule, tolerance: float) -> bool:
    """Whether pixel noise of the size of rounding errors changes the model's own lives, or its output as much."""
    draw = torch.Generator().manual_seed(0)
    noisy_images = image + _ROUNDING * image.std() * torch.randn(8, *image.shape[1:], generator=draw)
    plain, noisy = reference.run(image.numpy()), reference.run(noisy_images.numpy())
    lives_change = any((a != b).any() for a, b in zip(plain[1:], noisy[1:], strict=True))
    differences = _differences(np.broadcast_to(plain[0], noisy[0].shape), noisy[0], module)
    return lives_change or bool(differences.max() > 10 * tolerance)


def _first_difference(expected: list, actual: list, image: int, batch: int, module: TensorModule) -> str:
    """The message for outputs of the model (``expected``) and of the graph (``actual``) that differ on an image."""
    where = f"image {image} of a batch of {batch}"
    if len(expected) > 1 and (expected[1][image] != actual[1][image]).any():
        patch = int(np.flatnonzero(expected[1][image] != actual[1][image])[0])
        block = int(min(expected[1][image, patch], actual[1][image, patch]))
        return (
            f"the exported graph first differs at block {block} of {module.model.backbone.depth}: {where}, the life of "
            f"patch {patch} is {actual[1][image, patch]:g} blocks, {expected[1][image, patch]:g} in torch; nothing was "
            "written"
        )
    place = np.unravel_index(int(np.abs(expected[0][image] - actual[0][image]).argmax()), expected[0][image].shape)
    outputs, one = ("embeddings", "component") if module.embeds else ("logits", "logit")
    return (
        f"the exported graph makes the same decision but its {outputs} differ: {where}, {one} "
        f"{'.'.join(map(str, place))} is {actual[0][image][place]:.6f}, {expected[0][image][place]:.6f} in torch; "
        "nothing was written"
    )


def _check_nan(reference: Session, session: Session, images: Tensor, module: TensorModule, tolerance: float) -> None:
    """Raise ExportError unless an image of NaN gives an output of NaN, and leaves the other images unchanged."""
    if len(images) > 1:
        images[0] = torch.nan
        expected, actual = reference.run(images.numpy())[0], session.run(images.numpy())[0]
        if np.isfinite(actual[0]).all() or (_differences(expected, actual, module)[1:] > 10 * tolerance).any():
            raise ExportError(
                f"an image of NaN gives finite {'components' if module.embeds else 'logits'} in the exported graph, or "
                "changes the other images of the batch; nothing was written"
            )
