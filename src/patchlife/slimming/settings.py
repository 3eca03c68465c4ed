"""The settings of a slimmed model, and the schedules that follow from them: budget, mode, calibration, state dict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
from torch import Tensor

from ..backbones import Backbone, Embedded, Origin, signature
from ..config import LifeConfig, Mode
from ..errors import ConfigError
from .calibration import Calibration, nearest
from .cost import Cost
from .counting import count_parts
from .layout import HasLayout
from .lives import Lives
from .schedule import Schedule, solve
from .scorers import AttentionScorer, Scorer
from .shapes import Layout, layout_of
from .weights import BudgetWeights, delta_of, described
from .wrapper import from_bytes, to_bytes

__all__ = ["SlimSettings"]

ImageSize = tuple[int, int]
"""(height, width) in pixels."""


class SlimSettings(HasLayout, BudgetWeights):
    """A wrapped backbone with settings that can change at run time. `SlimModel` adds the forward pass.

    Every change is transactional: a setting that the model cannot meet raises ConfigError and leaves the old ones.

    Attributes:
        backbone: the wrapped model, as the parts that the method needs.
        scorer: what scores the patches. Gradients reach a learned scorer in training mode where its parameters require
            them; those of loaded adapters do not.
        settings: budget, mode, drop points. Change them by `set_budget`, `set_mode` and `temporarily`.
        calibrations: the thresholds of adaptive mode, by (number of patches of an image, start block). An image of
            another number uses the nearest one, if the numbers differ by at most a quarter and the scorer allows it.
        origin: where the backbone came from, if known.
        base: the backbone's signature when it was wrapped; `patchlife.save` compares with it what was trained since.
        tuning: what `patchlife.tune` measured when the shapes were searched, as JSON values; None if they were not.
        delta: the weight delta of an adapter, which is merged into the backbone (see `use_delta`); None without one.
    """

    scorer: Scorer

    def __init__(self, backbone: Backbone, config: LifeConfig, scorer: Scorer | None = None) -> None:
        super().__init__(backbone.model, scorer or AttentionScorer())
        self.__dict__["backbone"] = backbone  # not a child module: all its modules are children of this one already
        self.calibrations: dict[tuple[int, int], Calibration] = {}
        self.origin: Origin | None = None
        self.base = signature(backbone)
        self.delta = None
        self.tuning: dict[str, Any] | None = None
        self._layout = self._layout_of(config)
        self._costs: dict[tuple, Cost] = {}
        self._schedules: dict[tuple, Schedule] = {}
        self.settings = config
        self._apply_config(config)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "scorer":  # thresholds and costs belong to the old one
            self.scorer.train(self.training)
            self.calibrations, self._costs = {}, {}
            self._apply_config(self.settings)

    # ---- budget and mode

    def set_budget(self, budget: float) -> Self:
        """Spend this fraction of the dense FLOPs from now on. No retraining; returns the model itself."""
        self._apply_config(self.settings.replace(budget=budget))
        return self

    def set_mode(self, mode: Mode) -> Self:
        """``fixed``: every image keeps the same number of patches; ``adaptive``: its own. Returns the model itself."""
        self._apply_config(self.settings.replace(mode=mode))
        return self

    @contextmanager
    def temporarily(self, **changes: Any) -> Iterator[Self]:
        """Change settings (fields of `LifeConfig`) inside a ``with`` block; afterwards the old ones apply again."""
        before = self.settings
        try:
            self._apply_config(before.replace(**changes))
            yield self
        finally:
            self._apply_config(before)

    def in_reach(self, budgets: Iterable[float]) -> list[float]:
        """Those of ``budgets`` that the model can meet, the largest first. A late start block leaves less to save."""
        found = []
        for budget in sorted(budgets, reverse=True):
            with suppress(ConfigError), self.temporarily(budget=budget):
                found.append(budget)
        return found

    def _apply_config(self, config: LifeConfig) -> None:
        """Use ``config`` if the schedule for the model's own image size can be solved; else raise and keep the old."""
        previous = self.settings, self._schedules, self._layout
        try:
            self.settings, self._schedules, self._layout = config, {}, self._layout_of(config)
            self._check_attached(config)
            self.schedule()
            self.follow_budget()
        except Exception:
            self.settings, self._schedules, self._layout = previous
            raise

    def _layout_of(self, config: LifeConfig) -> Layout:
        learned = any(True for _ in self.scorer.parameters())
        return layout_of(self.backbone.depth, config, learned, getattr(self.scorer, "starts", None))

    def apply_settings(self) -> None:
        """Apply the present settings again, because the weights or the backbone changed."""
        self._apply_config(self.settings)

    def _check_attached(self, config: LifeConfig, packed: bool = False) -> None:
        opened = packed or config.mode == "adaptive"
        self.backbone.check_attached(opened=opened, masked=config.merge and not opened)

    # ---- schedules and costs

    def schedule(self, image_size: ImageSize | None = None) -> Schedule:
        """Patches kept per block, for images of this size (height, width); in adaptive mode the mean over images."""
        size = image_size or self.backbone.image_size
        key = (size, self.backbone.state_key)
        if key not in self._schedules:
            self._schedules[key] = self._solve(self.cost(size))
        return self._schedules[key]

    def cost(self, image_size: ImageSize | None = None) -> Cost:
        """The FLOPs of the model's parts, for images of this size (height, width)."""
        size = image_size or self.backbone.image_size
        key = (size, self.settings.merge, self.start, self.backbone.state_key)
        if key not in self._costs:
            self._costs[key] = Cost(*self._counted(size, self.settings.merge))
        return self._costs[key]

    @property
    def dense_flops(self) -> float:
        """FLOPs per image of the dense model, for its own image size."""
        return self.cost().dense

    @property
    def spent(self) -> float:
        """The fraction of the dense FLOPs that is asked for, or that an explicit schedule spends."""
        if self.settings.kept is None:
            return self.settings.budget
        cost = self.cost()
        return cost.total(self.settings.kept) / cost.dense

    @property
    def device(self) -> torch.device:
        """Where the model expects images."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format in which the model expects images: that of its weights."""
        return self.backbone.dtype

    def flops_of(self, lives: Lives, image_size: ImageSize | None = None) -> list[int]:
        """FLOPs of each image of ``lives``."""
        cost, decided = self.cost(image_size), bool(self.schedule(image_size).drops)
        return [round(cost.total(counts, decided=decided)) for counts in lives.kept.tolist()]

    @torch.compiler.assume_constant_result  # integers, computed while a graph is traced, not in the graph
    def _counted(self, size: ImageSize, merge: bool) -> tuple:
        return count_parts(self.backbone, self.scorer, self.start, size, merge)

    def _solve(self, cost: Cost) -> Schedule:
        asked = self.settings.kept
        if asked is not None:
            if len(asked) != cost.depth or asked[0] != cost.patches:
                raise ConfigError(
                    f"kept must be {cost.depth} numbers that begin with {cost.patches}, got {len(asked)}: {asked}"
                )
            return Schedule(asked, self.start)
        shape = self.settings.budget, self.start, self.drops, self._layout.shape.power
        if self.settings.mode == "adaptive" and (calibration := self.calibration_for(cost.patches)):
            return calibration.solve(cost, *shape)
        return solve(cost, *shape)

    def _schedule_of(self, embedded: Embedded) -> Schedule:
        """For embedded images; where patch dropout has removed some patches, the same fractions of the rest."""
        schedule = self.schedule(embedded.image_size)
        patches, present = schedule.kept[0], embedded.grid[0] * embedded.grid[1]
        if present == patches or self.settings.mode == "adaptive":
            return schedule
        return Schedule(tuple(max(1, n * present // patches) for n in schedule.kept), self.start)

    # ---- calibration of adaptive mode

    @property
    def calibration(self) -> Calibration | None:
        """Thresholds for the model's own image size, or for the only size that was calibrated; None without any."""
        rows, cols = self.backbone.grid
        own = self._calibrations()
        return self.calibration_for(rows * cols) or (next(iter(own.values())) if len(own) == 1 else None)

    def calibration_for(self, patches: int) -> Calibration | None:
        """Thresholds for images of so many patches; None without any. See `Scorer.gives_shares`."""
        own = self._calibrations()
        return nearest(own, patches) if self.scorer.gives_shares else own.get(patches)

    def _calibrations(self) -> dict[int, Calibration]:
        """Those of the present start block, by the number of patches."""
        return {patches: found for (patches, start), found in self.calibrations.items() if start == self.start}

    def use_calibration(self, calibration: Calibration, start: int | None = None) -> Self:
        """Use the thresholds of ``calibration``, which must be of this scorer on this backbone.

        ``start``: the start block at which they hold; the present one if not given.
        """
        key = calibration.patches, self.start if start is None else start
        previous, self.calibrations = self.calibrations, {**self.calibrations, key: calibration}
        try:
            self._apply_config(self.settings)
        except Exception:
            self.calibrations = previous
            raise
        return self

    def _thresholds(
        self, schedule: Schedule, patches: int, image_size: ImageSize, device: torch.device | str
    ) -> Tensor:
        """The score that a patch must exceed to enter each block (depth). Raises ConfigError for an unknown size."""
        calibration = self.calibration_for(patches)
        if calibration is None:
            known = ", ".join(map(str, self._calibrations())) or "none"
            raise ConfigError(
                f"adaptive mode has no thresholds for images of {image_size[0]} x {image_size[1]} pixels ({patches} "
                f"patches; calibrated for: {known}); call model.calibrate(batches) with a few hundred unlabelled "
                "images of this size, or use fixed mode"
            )
        return calibration.thresholds(schedule.kept, patches, device)

    # ---- changes of the backbone that timm's models offer

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for the backbone, and for timm's models another pooling if ``global_pool`` is given."""
        if global_pool is None:
            self.backbone.reset_classifier(num_classes)
        else:
            self.wrapped.reset_classifier(num_classes, global_pool)
        self._apply_config(self.settings)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """As timm's: another image size for the backbone. Raises ConfigError where an explicit schedule is set."""
        if self.settings.kept is not None:
            raise ConfigError(
                f"this model has an explicit schedule for {self.settings.kept[0]} patches; call set_budget first, "
                "so that the schedule follows the image size"
            )
        self.wrapped.set_input_size(img_size=img_size, patch_size=patch_size)
        self._apply_config(self.settings)

    # ---- state dict

    def get_extra_state(self) -> Tensor:
        """Settings and calibrations, for the state dict: JSON text as a tensor of bytes."""
        state = {
            "config": self.settings.to_dict(),
            "full": self.full_settings().to_dict(),
            "calibrations": [found.to_dict() | {"start": start} for (_, start), found in self.calibrations.items()],
            "base": self.base,
            "delta": described(self.delta),
        }
        return to_bytes(json.dumps(state))

    def set_extra_state(self, state: Tensor) -> None:
        """Apply settings and calibrations of a state dict. Raises ConfigError for a tensor that does not hold them."""
        try:
            values = json.loads(from_bytes(state))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"the state dict's settings (_extra_state) are damaged: {error}") from None
        config = LifeConfig.from_dict(values["config"])
        if "full" in values:
            full = LifeConfig.from_dict(values["full"])
        else:  # written when all budgets had one start block
            full = config.replace(start=values["start"], drops=tuple(values["drops"]))
        layout = self._layout_of(full)
        config = config if self._layout_of(config) == layout else full  # defaults may have changed since
        self.calibrations = {
            (found["patches"], found.get("start", layout.start)): Calibration.from_dict(found)
            for found in values["calibrations"]
        }
        self._apply_config(config)
        self._loading = values

    def loaded(self, delta: dict[str, Tensor], bare: bool) -> None:
        """Called after a state dict was loaded; ``bare``: it was the backbone's own, without entries of this class.

        `patchlife.save` compares with the loaded weights from now on.
        """
        values = self.__dict__.pop("_loading")
        self.base = signature(self.backbone) if bare else values["base"]
        self.use_delta(None if bare else delta_of(delta, values["delta"]))

    def extra_repr(self) -> str:
        """Shown by ``repr`` beside the backbone's modules."""
        own = self.settings
        return f"budget={own.budget:g}, mode={own.mode}, kept={self.schedule()}, scorer={self.scorer}"
