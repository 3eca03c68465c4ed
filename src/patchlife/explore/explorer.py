"""A model opened for looking at: photos, budgets and modes in, everything that a page shows of them out.

Nothing here knows how it is shown; `panels.py` draws, and `page.py` is the page.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..config import Mode
from ..data import read_photo
from ..errors import ConfigError
from ..evaluation.agreement import kl_divergence
from ..runtime.inference import calibrate
from ..runtime.pipeline import Pipeline
from ..slimming import Lives, SlimModel
from .merges import Merges

__all__ = ["Answer", "Explorer", "Opened", "View"]

_SHOWN = 1024  # longer side in pixels of the picture that is kept of a photo
_ROUNDS, _ENOUGH = 3, 0.06  # a time is the median of so many calls, fewer if all take so many seconds together


@dataclass(frozen=True)
class Answer:
    """What a model says of one photo.

    Attributes:
        output: probabilities of the classes, or the embedding of a model without a classifier.
        seconds: of a call with this one photo, on this machine now.
        flops: of the call.
    """

    output: Float[Tensor, "classes"]
    seconds: float
    flops: float


@dataclass(frozen=True)
class Opened:
    """A photo that was read.

    Attributes:
        name: of its file.
        picture: the upright photo, at most 1024 pixels long.
        images: the model's input, a batch of one.
    """

    name: str
    picture: Image.Image
    images: Float[Tensor, "1 channels height width"]


@dataclass(frozen=True)
class View:
    """A photo at one budget.

    Attributes:
        photo: that was opened.
        budget, mode: of the slimmed model.
        dense: the dense model's answer; None where there is no dense model, as for an exported file.
        answer: of the slimmed model. Both were timed in turns.
        lives: of the patches.
        merges: where patches are merged; empty for an exported file, which does not tell.
        dense_flops: of the dense model.
    """

    photo: Opened
    budget: float
    mode: Mode
    dense: Answer | None
    answer: Answer
    lives: Lives
    merges: Merges
    dense_flops: float

    @property
    def divergence(self) -> float:
        """KL divergence of the slimmed model's probabilities from the dense model's, in nats; NaN without them."""
        if self.dense is None:
            return float("nan")
        logs = (answer.output.clamp_min(1e-12).log()[None] for answer in (self.dense, self.answer))
        return kl_divergence(*logs).item()


class Explorer:
    """A model for one person, or a few, to look at; one call runs at a time.

    Args:
        pipeline: of a slimmed model, or of an exported file or bundle.
        photos: on which adaptive mode is calibrated when it is first asked for, if it needs that.

    Attributes:
        budgets: the budgets to choose from, the lowest first: of a bundle or file those in it, else None (any).
        classes: whether the model has a classifier.
    """

    def __init__(self, pipeline: Pipeline, photos: Sequence[Path] = (), budgets: Sequence[float] | None = None) -> None:
        self.pipeline, self.photos = pipeline, list(photos)
        self.budgets = sorted(budgets) if budgets is not None else None
        self.classes = bool(pipeline.labels.names)
        self.slim: SlimModel | None = pipeline.model if isinstance(pipeline.model, SlimModel) else None
        self._dense = self.slim.dense_backbone() if self.slim is not None else None
        self._lock = Lock()
        self._warm: set[tuple[int, int]] = set()  # sizes of images that have been run; the first run is slow

    # ---- what can be asked for

    @property
    def can_adapt(self) -> bool:
        """Whether adaptive mode is possible: not for exported files, nor without thresholds and photos for them."""
        return self.slim is not None and (self._calibrated() or bool(self.photos))

    def _calibrated(self) -> bool:
        model = self.slim
        return model is not None and set(model.starts) <= {start for _, start in model.calibrations}

    # ---- photos

    def open(self, photo: str | Path) -> Opened:
        """Read a photo. Raises ImageError if it cannot be read."""
        picture = read_photo(Path(photo))
        images = self.pipeline.preprocess(picture)[None].to(self.pipeline.device, self.pipeline.dtype)
        shown = picture.copy()
        shown.thumbnail((_SHOWN, _SHOWN))
        return Opened(Path(photo).name, shown, images)

    # ---- budgets

    def view(self, photo: Opened, budget: float, mode: Mode = "fixed") -> View:
        """The photo at a budget.

        Raises ConfigError for a budget that is out of reach, or adaptive mode where `can_adapt` is False.
        """
        model, images = self.pipeline.model, photo.images
        if mode == "adaptive" and not self.can_adapt:
            raise ConfigError(
                "adaptive mode needs thresholds, which this model does not have; start the page with photos, on which "
                "they are set"
            )
        with self._lock, torch.inference_mode():
            model.set_mode(mode).set_budget(budget)
            if mode == "adaptive" and not self._calibrated():
                calibrate(self.pipeline, self.photos)
            run = model.predict if self.classes else model.embedding
            size = (images.shape[-2], images.shape[-1])
            dense_flops = self.slim.cost(size).dense if self.slim is not None else model.dense_flops
            calls: list[Callable[[], Any]] = [lambda: run(images)]
            if (dense_model := self._dense) is not None:
                calls.append(lambda: dense_model.output(images))
            if size not in self._warm:
                for call in calls:
                    call()
                self._warm.add(size)
            ((output, lives), seconds), *others = _in_turns(calls, self.pipeline.device)
            dense = [Answer(self._told(theirs), time, dense_flops) for theirs, time in others]
            merges = Merges({}, {})
            if self.slim is not None and int(lives.kept[0, -1]) < lives.life.shape[1]:
                merges = Merges.of(self.slim.plan(images))
        answer = Answer(self._told(output), seconds, model.flops_of(lives, size)[0])
        cpu = Lives(lives.life.cpu(), lives.kept.cpu(), lives.score.cpu(), lives.grid)
        return View(photo, budget, mode, dense[0] if dense else None, answer, cpu, merges, dense_flops)

    def outputs(self, images: Tensor, budgets: Sequence[float | None]) -> list[Tensor]:
        """Probabilities (or embeddings) of a batch at several budgets in fixed mode; None is the dense model.

        Raises ConfigError for a budget that is out of reach, and for None without a dense model.
        """
        model = self.pipeline.model
        images, found = images.to(self.pipeline.device, self.pipeline.dtype), []
        with self._lock, torch.inference_mode():
            for budget in budgets:
                if budget is None:
                    if self._dense is None:
                        raise ConfigError("an exported file has no dense model to compare with")
                    output = self._dense.output(images)
                else:
                    model.set_mode("fixed").set_budget(budget)
                    output, _ = model.predict(images) if self.classes else model.embedding(images)
                found.append(self._probabilities(output))
        return found

    def _told(self, output: Tensor) -> Tensor:
        """The output for the only image of a batch."""
        return self._probabilities(output)[0]

    def _probabilities(self, output: Tensor) -> Tensor:
        output = output.float().cpu()
        return self.pipeline.probabilities(output) if self.classes else output


def _in_turns(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[tuple[Any, float]]:
    """(result, median of the seconds) of each call; they run in turns, so that other work slows them alike."""
    rounds: list[list[float]] = []
    while len(rounds) < _ROUNDS and sum(map(sum, rounds)) < _ENOUGH:
        results, seconds = [], list[float]()
        for call in calls:
            started = time.perf_counter()
            results.append(call())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        rounds.append(seconds)
    return list(zip(results, map(statistics.median, zip(*rounds, strict=True)), strict=True))
