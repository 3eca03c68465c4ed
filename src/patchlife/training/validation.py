"""Evaluation on labelled photos during training; nothing is learned from them.

Of a classifier accuracy is measured; of other models the cosine to the dense embedding, and the accuracy of neighbours;
for dense prediction the agreement of patch features and answers with those of the dense model.

Their tokens at the start block are cached, as for the training photos, so an evaluation costs the slimmed blocks only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..backbones import signature
from ..config import TrainingConfig
from ..data import Preprocess
from ..errors import ConfigError
from ..slimming import SlimModel
from .cached_evaluation import measured
from .dense import DenseTarget
from .dense_targets import compute_dense_targets
from .log import Log
from .stage import Stage, StageConfig
from .target_cache import Photo, TargetCache, collect
from .targets import Targets, compute_targets, target_starts

__all__ = ["BUDGETS", "MAX_PHOTOS", "Validation", "set_names"]

BUDGETS = (0.61, 0.45)
"""The budgets at which accuracy is measured."""

MAX_PHOTOS = 500
"""The most photos of a set that are used."""

_CHEAP_RATIO = (
    8  # stage 2 is also evaluated in the middle of epochs with this many training photos per validation photo
)


class Validation:
    """Evaluates a model during training, on labelled photos.

    Attributes:
        model: at the beginning of training; stage 1 trains its scorer in place.
        sets: the targets of the photos of each validation set, by name.
        dense: what they are targets of, for dense prediction; else None.
    """

    def __init__(self, model: SlimModel, sets: Mapping[str, TargetCache], dense: DenseTarget | None = None) -> None:
        self.model, self.sets, self.dense = model, dict(sets), dense

    @classmethod
    def from_photos(
        cls,
        model: SlimModel,
        sets: Mapping[str, Sequence[Photo]],
        preprocess: Preprocess,
        folder: Path,
        config: TrainingConfig,
        dense: DenseTarget | None = None,
    ) -> Validation:
        """Run the dense model once on all sets; the targets are kept in ``folder``, about 75 kB a photo (ViT-Tiny).

        Raises ImageError and NumericalError as `collect` does.
        """
        backbone = model.backbone
        device = next(backbone.parameters()).device
        starts = target_starts(model)
        depends_on = {
            "backbone": signature(backbone),
            "start": starts[0] if len(starts) == 1 else list(starts),
            "preprocess": preprocess.to_dict(),
            "validation": 1,
        } | (dense.settings() if dense else {})

        def targets_of(images: torch.Tensor) -> Targets:
            images = images.to(device)
            if dense is not None:
                targets = compute_dense_targets(backbone, images, dense)
            else:
                targets = compute_targets(backbone, images, starts)
            # importance and embedding are for training only
            return targets._replace(importance=targets.importance[:, :0], embedding=targets.embedding[:, :0])

        return cls(
            model,
            {
                name: collect(
                    photos,
                    targets_of,
                    preprocess,
                    folder / name.replace("-", "--").replace("/", "-"),
                    depends_on=depends_on,
                    max_unreadable=config.max_unreadable,
                )
                for name, photos in sets.items()
            },
            dense,
        )

    @property
    def content(self) -> dict[str, str]:
        """The checksum of each set's photos and labels, by name."""
        return {name: cache.labelled_content for name, cache in self.sets.items()}

    def measure(self, stage: Stage, stage_config: StageConfig, photos: int, step: int, log: Log) -> None:
        """Evaluate and log the model after ``step`` steps, if an evaluation is due; the model is not changed.

        Args:
            stage: the stage in training.
            stage_config: its settings; an evaluation is due before the first step and after each epoch.
            photos: training photos in an epoch.
            step: number of completed steps.
            log: where the results go. Results that it already has are not computed again.
        """
        epoch = max(1, photos // stage_config.batch_size)
        model: SlimModel | None = getattr(stage, "model", None)
        twice = model is not None and photos >= _CHEAP_RATIO * sum(map(len, self.sets.values()))
        if not log.active or (step % epoch and not (twice and step % epoch == epoch // 2)):
            return
        missing = [(budget, name) for budget in BUDGETS for name in self.sets if not log.has(step, name, budget)]
        for scores in _evaluated(model or self.model, self.sets, missing, self.dense):
            log.write({"step": step, "epoch": step / epoch, "seconds": log.seconds, **scores})


def set_names(folders: Sequence[str]) -> list[str]:
    """A distinct name for each folder: the last parts of its path, as few as possible."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]  # without "..": names become folders
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"validation: expected different folders, got {', '.join(folders)}; name each once")


@torch.no_grad()
def _evaluated(
    model: SlimModel,
    sets: Mapping[str, TargetCache],
    runs: Sequence[tuple[float, str]],
    dense: DenseTarget | None,
) -> Iterator[dict[str, str | float]]:
    """Results of each (budget, set), in fixed mode; a budget that the model cannot reach is left out."""
    with model.temporarily(mode="fixed"):
        for budget, name in runs:
            try:
                model.set_budget(budget)
            except ConfigError:
                continue
            cache = sets[name]
            score = measured(model, cache, dense)
            yield {"validation": name, "photos": cache.labelled_content, "budget": budget, **score._asdict()}
