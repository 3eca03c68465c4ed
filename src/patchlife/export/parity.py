"""Parity: comparing the outputs of an exported graph with those of the model that it was made from.

Images run through both at batch 1, 2 and 5; one image is NaN. The decision is also compared alone, on scores that
photos rarely give: tied, all equal, NaN, infinite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

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
        images: number of images compared. difference: the largest between two logits.
        agreement: fraction of the images with the same predicted class.
        undecided: number of images left out because the model's own decision changes under rounding noise: two patches
            have equal scores or similarities up to the sixth digit.
        note: a part that was not compared; empty if all was.
    """

    images: int
    difference: float
    agreement: float
    undecided: int = 0
    note: str = ""

    def __str__(self) -> str:
        text = (
            f"{self.images} images, largest difference of a logit {self.difference:.1e}, "
            f"top-1 agreement {100 * self.agreement:.2f} %"
        )
        text += f", {self.undecided} left out (a tie to the sixth digit)" if self.undecided else ""
        return text + (f" ({self.note})" if self.note else "")


def check_outputs(
    session: Session, module: TensorModule, images: Float[Tensor, "n channels height width"], tolerance: float
) -> Parity:
    """Compare logits and lives of images in batches of 1, 2 and 5, and of a batch with a NaN image.

    Differences of logits are absolute, or relative to a tenth of the largest logit if that is above 10.

    Raises ExportError that names the first difference.
    """
    reference, largest, same, compared, undecided = ModuleSession(module), 0.0, 0, 0, 0
    for batch in _batches(images):
        expected, actual = reference.run(batch.numpy()), session.run(batch.numpy())
        differences = [_distance(a, b) for a, b in zip(expected, actual, strict=True)]
        different = differences[0] > tolerance * max(1.0, _largest(expected[0]) / 10)
        different |= differences[1] > 0 if len(differences) > 1 else False
        for i in np.flatnonzero(different):
            if not _changes_under_rounding(reference, batch[i : i + 1], tolerance):
                raise ExportError(_first_difference(expected, actual, int(i), len(batch), module))
        undecided += int(different.sum())
        compared += int((~different).sum())
        largest = max([largest, *differences[0][~different].tolist()])
        same += int((expected[0].argmax(1) == actual[0].argmax(1))[~different].sum())
    if undecided > 1 + _MAX_UNDECIDED * compared:
        raise ExportError(
            f"the prediction changes under rounding noise for {undecided} of {undecided + compared} images, too "
            "many for a comparison; give photos like those that the model is used for"
        )
    _check_nan(reference, session, images[:3].clone(), tolerance)
    return Parity(compared, largest, same / compared, undecided)


def check_int8(
    session: Session, module: TensorModule, images: Float[Tensor, "n channels height width"], minimum: float
) -> Parity:
    """Compare predicted classes. Raises ExportError if the fraction that agrees is below ``minimum``."""
    reference, largest, same, count = ModuleSession(module), 0.0, 0, 0
    for batch in images.split(16):
        expected, actual = reference.run(batch.numpy())[0], session.run(batch.numpy())[0]
        largest = max(largest, float(np.abs(expected - actual).max()))
        same += int((expected.argmax(1) == actual.argmax(1)).sum())
        count += len(batch)
    if same < minimum * count:
        raise ExportError(
            f"int8 predicts the same class as float32 for {same} of {count} images ({100 * same / count:.1f} %), "
            f"expected at least {100 * minimum:g} %; give photos like those that the model is used for, or export "
            "without int8"
        )
    return Parity(count, largest, same / count)


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


def _largest(logits: np.ndarray) -> float:
    return float(np.nanmax(np.abs(logits), initial=0.0))


def _changes_under_rounding(reference: Session, image: Tensor, tolerance: float) -> bool:
    """Whether pixel noise of the size of rounding errors changes the model's own lives, or its logits as much."""
    draw = torch.Generator().manual_seed(0)
    noisy_images = image + _ROUNDING * image.std() * torch.randn(8, *image.shape[1:], generator=draw)
    plain, noisy = reference.run(image.numpy()), reference.run(noisy_images.numpy())
    lives_change = any((a != b).any() for a, b in zip(plain[1:], noisy[1:], strict=True))
    return lives_change or bool(np.abs(plain[0] - noisy[0]).max() > 10 * tolerance)


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
    return (
        f"the exported graph makes the same decision but its logits differ: {where}, logit {'.'.join(map(str, place))} "
        f"is {actual[0][image][place]:.6f}, {expected[0][image][place]:.6f} in torch; nothing was written"
    )


def _check_nan(reference: Session, session: Session, images: Tensor, tolerance: float) -> None:
    """Raise ExportError unless an image of NaN gives logits of NaN, and leaves the other images unchanged."""
    if len(images) > 1:
        images[0] = torch.nan
        expected, actual = reference.run(images.numpy())[0], session.run(images.numpy())[0]
        if np.isfinite(actual[0]).all() or (_distance(expected, actual)[1:] > 10 * tolerance).any():
            raise ExportError(
                "an image of NaN gives finite logits in the exported graph, or changes the other images of the batch; "
                "nothing was written"
            )
