"""What a fit for dense prediction distils: the patch features of some blocks, and the answers of a head on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Backbone, Embedded
from ..backbones.identity import fingerprints
from ..config import TrainingConfig
from ..errors import ConfigError
from ..slimming import SlimModel
from .target_cache import checksum
from .targets import Targets

__all__ = ["DenseHead", "DenseTarget", "dense_target", "patch_features", "predicts_densely"]


@dataclass(frozen=True)
class DenseHead:
    """A head for dense prediction, such as the segmentation head on a frozen backbone.

    Attributes:
        module: from a list of feature maps, each (batch, dim, rows, cols), to the logits of the classes of every pixel,
            (batch, classes, height, width). Height and width can be those of the patch grid, which costs least. The
            module is not trained and not changed.
        blocks: the blocks whose feature maps it gets, in rising order and normalised by the last norm, as
            ``forward_intermediates(images, blocks, norm=True)`` gives them. Negative numbers count from the end.
    """

    module: nn.Module
    blocks: tuple[int, ...] = (-1,)


@dataclass(frozen=True)
class DenseTarget:
    """What is distilled of a model that is used for dense prediction.

    Patch features are (batch, patches, blocks x dim): the features of all ``blocks``, one block after the other.

    Attributes:
        blocks: indices of blocks, rising. The last one is not before the start block.
        start: the start block; features of blocks before it are not changed by slimming.
        head: a frozen copy of the module of the `DenseHead`, or None if only features are distilled.
    """

    blocks: tuple[int, ...]
    start: int
    head: nn.Module | None = None

    @property
    def name(self) -> str:
        """The value of ``TrainingConfig.target``."""
        return "features" if self.head is None else "pixels"

    @property
    def late(self) -> tuple[int, ...]:
        """The blocks whose features slimming changes."""
        return tuple(block for block in self.blocks if block >= self.start)

    @property
    def end(self) -> int:
        """The number of blocks that are needed to compute all features."""
        return self.blocks[-1] + 1

    def late_part(
        self, features: Float[Tensor, "batch patches all_dim"]
    ) -> Float[Tensor, "batch patches late_blocks dim"]:
        """The features of the `late` blocks."""
        return features.unflatten(-1, (len(self.blocks), -1))[:, :, len(self.blocks) - len(self.late) :]

    def with_late(
        self, features: Float[Tensor, "batch patches all_dim"], late: Float[Tensor, "batch patches late_dim"]
    ) -> Float[Tensor, "batch patches all_dim"]:
        """``features`` with those of the `late` blocks replaced."""
        return torch.cat((features[..., : features.shape[-1] - late.shape[-1]], late), dim=-1)

    def answers(
        self, features: Float[Tensor, "batch patches all_dim"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch classes height width"]:
        """The answers of the head: logits of the classes of every pixel."""
        assert self.head is not None
        maps = features.transpose(1, 2).unflatten(2, grid).chunk(len(self.blocks), dim=1)
        return self.head([feature_map.contiguous() for feature_map in maps])

    def settings(self) -> dict[str, Any]:
        """All that the targets depend on, as JSON values."""
        settings: dict[str, Any] = {"target": self.name, "feature_blocks": list(self.blocks)}
        if self.head is not None:
            settings["head"] = checksum([str(self.head), fingerprints(self.head.state_dict())])
        return settings

    @torch.no_grad()
    def slimmed(self, model: SlimModel, targets: Targets, embedded: Embedded) -> Float[Tensor, "batch patches all_dim"]:
        """The patch features of ``model`` as it is set; ``targets`` has the input of its start block."""
        late = model.resume_intermediates(targets.tokens, embedded, self.late)
        return self.with_late(targets.patches, patch_features(model.backbone, late))


def patch_features(
    backbone: Backbone, tokens: Sequence[Float[Tensor, "batch tokens dim"]]
) -> Float[Tensor, "batch patches all_dim"]:
    """The patches of the tokens after some blocks, in grid order, after the last norm; one block after the other."""
    return torch.cat([backbone.norm(x)[:, backbone.prefix :] for x in tokens], dim=-1)


def predicts_densely(config: TrainingConfig, head: DenseHead | None) -> bool:
    """Whether the model is trained for dense prediction."""
    return head is not None or config.target in ("features", "pixels")


def dense_target(
    model: SlimModel, config: TrainingConfig, head: DenseHead | None, image_size: tuple[int, int]
) -> DenseTarget | None:
    """What ``config.target`` and ``head`` say is distilled; None for the output of the model.

    Raises ConfigError for settings that do not fit together, and for a head that does not work on this model.
    """
    target = config.target or ("pixels" if head else "logits" if model.backbone.num_classes else None)
    _check_settings(model, config, head, target)
    if target not in ("features", "pixels"):
        return None
    asked = head.blocks if head else (-1,) if config.feature_blocks is None else config.feature_blocks
    blocks = _blocks(asked, model, "head.blocks" if head else "feature_blocks")
    if head is None:
        return DenseTarget(blocks, model.start)
    dense = DenseTarget(blocks, model.start, _frozen(head.module))
    _check_answers(dense, model.backbone, image_size)
    return dense


def _check_settings(model: SlimModel, config: TrainingConfig, head: DenseHead | None, target: str | None) -> None:
    if target == "pixels" and head is None:
        raise ConfigError(
            "target pixels needs the head that answers for the pixels, which only Python can give: "
            "patchlife.training.fit.fit(..., head=DenseHead(module, blocks)); or take target features"
        )
    if target != "pixels" and head is not None:
        raise ConfigError(f"a head belongs to target pixels, got target {target}; set target to pixels, or to None")
    if target != "features" and config.feature_blocks is not None:
        where = "the head says which blocks it reads" if head else "set target to features"
        raise ConfigError(f"feature_blocks belongs to target features, got target {target}; {where}")
    if target == "logits" and not model.backbone.num_classes:
        raise ConfigError("target logits needs a classifier, which this model does not have; set target to features")
    if target in ("features", "pixels") and config.token_weight:
        raise ConfigError(
            f"target {target} distils patch features instead of image tokens, got token_weight "
            f"{config.token_weight:g}; set it to 0, or target to logits"
        )
    if target in ("features", "pixels") and config.label_weight:
        raise ConfigError(
            f"target {target} uses no labels, got label_weight {config.label_weight:g}; set it to 0, or target to "
            "logits"
        )


def _blocks(asked: Sequence[int], model: SlimModel, name: str) -> tuple[int, ...]:
    depth = model.backbone.depth
    if not asked or (wrong := [block for block in asked if not -depth <= block < depth]):
        raise ConfigError(f"{name} must be blocks from {-depth} to {depth - 1}, got {wrong if asked else 'none'}")
    blocks = tuple(sorted({block % depth for block in asked}))
    if blocks[-1] < model.start:
        raise ConfigError(
            f"{name} must have a block from the start block {model.start} on, got {list(blocks)}: slimming does not "
            "change these"
        )
    return blocks


def _frozen(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"the head must be a torch.nn.Module, got {type(module).__name__}; wrap it in one")
    if module.training:
        raise ConfigError("the head must be in eval mode, but it is in training mode; call .eval() first")
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def _check_answers(dense: DenseTarget, backbone: Backbone, image_size: tuple[int, int]) -> None:
    """Raise ConfigError unless the head gives the classes of every pixel from the features of two images."""
    rows, cols = backbone.grid_of(torch.empty(1, 1, *image_size, device="meta"))
    blank = torch.zeros(2, rows * cols, len(dense.blocks) * backbone.dim)
    device = next((value.device for value in dense.head.state_dict().values()), blank.device) if dense.head else "cpu"
    wanted = "(batch, classes, height, width) with at least two classes"
    given = f"{len(dense.blocks)} feature map(s) of shape {(2, backbone.dim, rows, cols)}"
    try:
        answers = dense.answers(blank.to(device), (rows, cols))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"the head fails on a list of {given}: {error}; it must give {wanted}") from error
    if not isinstance(answers, Tensor) or answers.ndim != 4 or answers.shape[0] != 2 or answers.shape[1] < 2:
        found = f"shape {tuple(answers.shape)}" if isinstance(answers, Tensor) else type(answers).__name__
        raise ConfigError(f"the head must give {wanted}, got {found} for {given}")
