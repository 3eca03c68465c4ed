"""Labelled photos that are looked at while the model learns. Nothing is learned from them.

What enters the start block is cached, as for the photos that are learned from: a look costs the slimmed blocks.
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
from .cached_evaluation import evaluate_cached
from .log import Log
from .stage import Stage, StageConfig
from .target_cache import Photo, TargetCache, collect
from .targets import Targets, compute_targets

__all__ = ["BUDGETS", "MOST_PHOTOS", "Validation", "set_names"]

BUDGETS = (0.61, 0.45)
"""At which a set is measured."""

MOST_PHOTOS = 500
"""Of a set that are looked at."""

_CHEAP = 8  # a stage with blocks is looked at twice an epoch if an epoch has this many times the photos validated


class Validation:
    """Measures a model that is learning, on photos and labels of its own.

    Attributes:
        model: as learning begins; stage 1 changes its head in place.
        sets: the photos, by name.
    """

    def __init__(self, model: SlimModel, sets: Mapping[str, TargetCache]) -> None:
        self.model, self.sets = model, dict(sets)

    @classmethod
    def collected(
        cls,
        model: SlimModel,
        sets: Mapping[str, Sequence[Photo]],
        preprocess: Preprocess,
        folder: Path,
        config: TrainingConfig,
    ) -> Validation:
        """Ask the dense model about all sets once; what it says is kept in ``folder``, about 75 kB a photo (ViT-Tiny).

        Raises ImageError and NumericalError as `collect` does.
        """
        backbone = model.backbone
        device = next(backbone.parameters()).device
        depends_on = {
            "backbone": signature(backbone),
            "start": model.start,
            "preprocess": preprocess.to_dict(),
            "validation": 1,
        }

        def ask(images: torch.Tensor) -> Targets:
            targets = compute_targets(backbone, images.to(device), model.start)
            return targets._replace(
                importance=targets.importance[:, :0], embedding=targets.embedding[:, :0]
            )  # nobody learns from these

        gather = {"depends_on": depends_on, "max_unreadable": config.max_unreadable}
        return cls(
            model,
            {
                name: collect(photos, ask, preprocess, folder / name.replace("-", "--").replace("/", "-"), **gather)  # type: ignore[arg-type]
                for name, photos in sets.items()
            },
        )

    def look(self, stage: Stage, stage_config: StageConfig, photos: int, step: int, log: Log) -> None:
        """Write what the model is importance after ``step`` steps, if it is time for that; the model stays as it is.

        Args:
            stage: what learns.
            stage_config: how; its epochs say when to look: at their ends, and at the very beginning.
            photos: in an epoch.
            step: steps behind us.
            log: where to write. What it has already is not measured again.
        """
        epoch = max(1, photos // stage_config.batch_size)
        model: SlimModel | None = getattr(stage, "model", None)
        twice = model is not None and photos >= _CHEAP * sum(map(len, self.sets.values()))
        if not log.active or (step % epoch and not (twice and step % epoch == epoch // 2)):
            return
        missing = [(budget, name) for budget in BUDGETS for name in self.sets if not log.has(step, name, budget)]
        for scores in _measured(model or self.model, self.sets, missing):
            log.write({"step": step, "epoch": step / epoch, "seconds": log.seconds, **scores})


def set_names(folders: Sequence[str]) -> list[str]:
    """What to call sets: the last parts of their paths, as few as tell them apart."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]  # without "..": names become folders
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"validation: expected folders that differ, got {', '.join(folders)}; name each once")


@torch.no_grad()
def _measured(
    model: SlimModel, sets: Mapping[str, TargetCache], wanted: Sequence[tuple[float, str]]
) -> Iterator[dict[str, str | float]]:
    """Scores of each (budget, set), in fixed mode; budgets that a late start block cannot reach are left out."""
    embedded = model.backbone.embed(model.backbone.blank())
    with model.temporarily(mode="fixed"):
        for budget, name in wanted:
            try:
                model.set_budget(budget)
            except ConfigError:
                continue
            cache = sets[name]
            score = evaluate_cached(lambda tokens: model.resume(tokens, embedded), cache, embedded.tokens.device)
            yield {"validation": name, "photos": cache.seen, "budget": budget, **score._asdict()}
