"""Does an exported graph answer as the model that it was made from?

Photos go through both at batch 1, 2 and 5; one of them is NaN. The decision alone is tried, too, on scores that no
photo gives at will: ties, all equal, NaN, infinite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ExportError
from ..runtime.sessions import ModuleSession, Session
from ..runtime.tensor_module import Decision, TensorModule
from ..slimming.schedule import Schedule

__all__ = ["BATCHES", "Parity", "check_decision", "check_int8", "check_outputs", "hard_cases", "sample_images"]

BATCHES = (1, 2, 5)
_UNDECIDED = 0.1  # of the images at most
_ROUNDING = 1e-5  # of the images' spread; what pixels are shaken by to see whether an answer hangs on a rounding


@dataclass(frozen=True)
class Parity:
    """How close an exported graph came to the model that it was made from.

    Attributes:
        images: how many were compared. difference: the largest between two logits.
        agreement: fraction of the images whose likeliest class is the same.
        undecided: images left out, because the model's own answer on them turns on a rounding: two patches are
            equally important, or equally alike, to the sixth digit.
        note: what was not compared; empty if nothing.
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
    """Compare logits and lives of the same images, in batches of 1, 2 and 5, a NaN image among them.

    Differences are absolute, relative to the largest logit where that is above 10.

    Raises ExportError that says where they first differ.
    """
    eager, worst, same, compared, undecided = ModuleSession(module), 0.0, 0, 0, 0
    for batch in _batches(images):
        ours, theirs = eager.run(batch.numpy()), session.run(batch.numpy())
        off = [_distance(a, b) for a, b in zip(ours, theirs, strict=True)]
        wrong = off[0] > tolerance * max(1.0, _largest(ours[0]) / 10)
        wrong |= off[1] > 0 if len(off) > 1 else False
        for i in np.flatnonzero(wrong):
            if not _hangs_on_rounding(eager, batch[i : i + 1], tolerance):
                raise ExportError(_first_difference(ours, theirs, int(i), len(batch), module))
        undecided += int(wrong.sum())
        compared += int((~wrong).sum())
        worst = max([worst, *off[0][~wrong].tolist()])
        same += int((ours[0].argmax(1) == theirs[0].argmax(1))[~wrong].sum())
    if undecided > 1 + _UNDECIDED * compared:
        raise ExportError(
            f"{undecided} of {undecided + compared} images have an answer that turns on a rounding, so nothing can "
            "be compared; give photos of what the model is for"
        )
    _check_nan(eager, session, images[:3].clone(), tolerance)
    return Parity(compared, worst, same / compared, undecided)


def check_int8(
    session: Session, module: TensorModule, images: Float[Tensor, "n channels height width"], least: float
) -> Parity:
    """Compare the likeliest classes. Raises ExportError when fewer than ``least`` of the images agree."""
    eager, worst, same, count = ModuleSession(module), 0.0, 0, 0
    for batch in images.split(16):
        ours, theirs = eager.run(batch.numpy())[0], session.run(batch.numpy())[0]
        worst = max(worst, float(np.abs(ours - theirs).max()))
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        count += len(batch)
    if same < least * count:
        raise ExportError(
            f"int8 names the same class as float32 for {same} of {count} images ({100 * same / count:.1f} %), at "
            f"least {100 * least:g} % expected; calibrate on photos of what the model is for, or export without int8"
        )
    return Parity(count, worst, same / count)


def check_decision(session: Session, schedule: Schedule, grid: tuple[int, int]) -> None:
    """Compare order, lives and heirs on the hard cases. Raises ExportError that names the first that differs."""
    cases, scores = hard_cases(schedule.kept[0])
    ours = ModuleSession(Decision(schedule, grid)).run(scores.numpy())
    theirs = session.run(scores.numpy())
    for what, a, b in zip(("lives", "order", "merge"), ours, theirs, strict=True):
        for i in np.flatnonzero((a != b).any(axis=1)):
            place = int(np.flatnonzero(a[i] != b[i])[0])
            raise ExportError(
                f"this engine decides otherwise where scores are {cases[i]}: {what} of patch {place} are "
                f"{b[i, place]:g}, torch says {a[i, place]:g}; nothing was written, please report its version"
            )


def hard_cases(patches: int) -> tuple[list[str], Float[Tensor, "6 patches 1_and_8"]]:
    """(names, scores and embedding) of what sorting may do in more than one way. Kin vectors are often exactly alike."""
    draw = torch.Generator().manual_seed(0)
    score = torch.randn(6, patches, generator=draw)
    score[1] = (score[1] * 2).round()
    score[2] = 0.25
    score[3, ::3] = torch.nan
    score[4] = torch.nan
    score[5, ::4], score[5, 1::4] = torch.inf, -torch.inf
    embedding = torch.eye(8)[torch.randint(0, 8, (6, patches), generator=draw)]
    return ["all different", "tied", "all equal", "NaN here and there", "all NaN", "infinite"], torch.cat(
        (score[..., None], embedding), dim=2
    )


def sample_images(count: int, channels: int, size: tuple[int, int]) -> Float[Tensor, "count channels *size"]:
    """Images when there are no photos: large soft blots under finer grain, normalised."""
    draw = torch.Generator().manual_seed(0)
    image = torch.zeros(count, channels, *size)
    for cells, strength in ((3, 1.0), (9, 0.6), (40, 0.25)):
        blots = torch.randn(count, channels, min(cells, size[0]), min(cells, size[1]), generator=draw)
        image += strength * nn.functional.interpolate(blots, size, mode="bilinear")
    return image / image.std()


def _batches(images: Tensor) -> Iterator[Tensor]:
    """Batches of 1, 2, 5, and so on until each image had its turn; the first ones again to fill up."""
    endless, left = cycle(images), len(images)
    for size in islice(cycle(BATCHES), max(len(BATCHES), len(images))):
        yield torch.stack([*islice(endless, size)])
        left -= size
        if left <= 0 and size == BATCHES[-1]:
            return


def _distance(a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, "batch"]:
    """Each image's largest difference; two NaN are equal, one is infinitely far."""
    gap = np.where(np.isnan(a) & np.isnan(b), 0.0, np.abs(a - b))
    return np.nan_to_num(gap, nan=np.inf).reshape(len(a), -1).max(axis=1)


def _largest(logits: np.ndarray) -> float:
    return float(np.nanmax(np.abs(logits), initial=0.0))


def _hangs_on_rounding(eager: Session, image: Tensor, tolerance: float) -> Bool:
    """Whether a change of the pixels that nobody could see changes the model's own answer by as much."""
    draw = torch.Generator().manual_seed(0)
    shaken = image + _ROUNDING * image.std() * torch.randn(8, *image.shape[1:], generator=draw)
    plain, others = eager.run(image.numpy()), eager.run(shaken.numpy())
    lives_change = any((a != b).any() for a, b in zip(plain[1:], others[1:], strict=True))
    return lives_change or bool(np.abs(plain[0] - others[0]).max() > 10 * tolerance)


def _first_difference(ours: list, theirs: list, image: int, batch: int, module: TensorModule) -> str:
    where = f"image {image} of a batch of {batch}"
    if len(ours) > 1 and (ours[1][image] != theirs[1][image]).any():
        patch = int(np.flatnonzero(ours[1][image] != theirs[1][image])[0])
        start = int(min(ours[1][image, patch], theirs[1][image, patch]))
        return (
            f"the exported graph first differs at block {start} of {module.model.backbone.depth}: {where}, patch "
            f"{patch} lives {theirs[1][image, patch]:g} blocks, {ours[1][image, patch]:g} in torch; nothing was written"
        )
    place = np.unravel_index(int(np.abs(ours[0][image] - theirs[0][image]).argmax()), ours[0][image].shape)
    return (
        f"the exported graph decides alike but its logits differ: {where}, logit {'.'.join(map(str, place))} is "
        f"{theirs[0][image][place]:.6f}, {ours[0][image][place]:.6f} in torch; nothing was written"
    )


def _check_nan(eager: Session, session: Session, images: Tensor, tolerance: float) -> None:
    """An image of NaN must spoil itself and nobody else."""
    if len(images) > 1:
        images[0] = torch.nan
        ours, theirs = eager.run(images.numpy())[0], session.run(images.numpy())[0]
        if np.isfinite(theirs[0]).all() or (_distance(ours, theirs)[1:] > 10 * tolerance).any():
            raise ExportError(
                "the exported graph lets an image of NaN pass, or lets it spoil its batch mates; nothing was written"
            )
