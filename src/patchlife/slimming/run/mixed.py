"""Images of different sizes in one run: embedded and scored size by size, all blocks on one packed sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import Backbone, Embedded
from ...config import Restore
from ...errors import ConfigError
from ..lives import Lives
from ..plan import Plan
from ..schedule import Schedule
from .adaptive import Stage, rotations, run_packed, run_stage, split_rows

__all__ = ["SizeGroup", "before_start", "by_size", "from_start", "in_order", "lives_in_order"]

Image = Float[Tensor, "channels height width"]


@dataclass
class SizeGroup:
    """The images of one size among images of different sizes, somewhere on their way through the model.

    Attributes:
        places: their positions in the list of images, rising.
        embedded: their tokens that enter block 0, with rotary tables and grid.
        tokens: their tokens; after the start block in the order of ``plan``.
        plan: the decision; None if no patch is dropped, or before it.
    """

    places: list[int]
    embedded: Embedded
    tokens: Float[Tensor, "batch tokens dim"]
    plan: Plan | None = None


def by_size(images: Sequence[Tensor]) -> list[tuple[list[int], Float[Tensor, "batch channels height width"]]]:
    """(positions in the list, batch) of the images of each size, in the order in which the sizes occur.

    Raises ConfigError for an empty list, and for entries that are not single images.
    """
    if not isinstance(images, list | tuple) or not images:
        got = "an empty one" if isinstance(images, list | tuple) else type(images).__name__
        raise ConfigError(
            f"expected images as one tensor (batch, channels, height, width) or as a list of images, got {got}"
        )
    places: dict[tuple[int, ...], list[int]] = {}
    each = [_single(position, image) for position, image in enumerate(images)]
    for position, image in enumerate(each):
        places.setdefault(tuple(image.shape), []).append(position)
    return [(found, torch.stack([each[position] for position in found])) for found in places.values()]


def _single(position: int, image: Any) -> Image:
    if isinstance(image, Tensor) and (image.ndim == 3 or (image.ndim == 4 and len(image) == 1)):
        return image if image.ndim == 3 else image[0]
    got = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise ConfigError(
        f"expected a list of images, each (channels, height, width), got {got} at position {position}; give a batch of "
        "one size as one tensor (batch, channels, height, width)"
    )


def before_start(
    backbone: Backbone, batches: Sequence[tuple[list[int], Float[Tensor, "batch channels height width"]]], start: int
) -> list[SizeGroup]:
    """The inputs of the start block, for the result of `by_size`. Raises ConfigError for sizes that do not fit."""
    groups = [SizeGroup(places, embedded := backbone.embed(images), embedded.tokens) for places, images in batches]
    return _run_all_tokens(backbone, groups, range(start))


def from_start(
    backbone: Backbone, groups: Sequence[SizeGroup], start: int, restore: Restore = "last"
) -> list[SizeGroup]:
    """Tokens after the last block, in the order of each plan, dropped patches as ``restore`` says.

    Without plans, blocks ``start`` to the end run on all tokens.
    """
    if all(group.plan is None for group in groups):
        return _run_all_tokens(backbone, groups, range(start, backbone.depth))
    plans = [group.plan or _unchanged(group, start, backbone) for group in groups]
    tokens = [group.tokens for group in groups]
    done = run_packed(backbone, tokens, [group.embedded.rope for group in groups], plans, restore=restore)
    return [replace(group, tokens=x) for group, x in zip(groups, done, strict=True)]


def _run_all_tokens(backbone: Backbone, groups: Sequence[SizeGroup], blocks: range) -> list[SizeGroup]:
    tokens = [group.tokens for group in groups]
    rows = torch.cat([x.flatten(0, 1) for x in tokens])
    lengths = torch.cat([torch.full((len(x),), x.shape[1]) for x in tokens])
    none = torch.empty(0, dtype=torch.long, device=rows.device)
    every = torch.arange(len(rows), device=rows.device)
    offsets = (0, *lengths.cumsum(0).tolist())
    begins = torch.tensor(offsets, device=rows.device)
    stage = Stage(blocks, every, offsets, begins, none, none, none.float())
    ropes = [_for_each_image(group.embedded.rope, len(group.tokens)) for group in groups]
    rows = run_stage(backbone, stage, rows, None, rotations(backbone, ropes, stage))
    return [replace(group, tokens=x) for group, x in zip(groups, split_rows(rows, tokens), strict=True)]


def _for_each_image(rope: Tensor | None, batch: int) -> Tensor | None:
    """A rotary table of `Embedded.rope` with an entry for each image."""
    return None if rope is None else rope.expand(-1, batch, -1, -1, -1)


def _unchanged(group: SizeGroup, start: int, backbone: Backbone) -> Plan:
    """The plan by which images keep all patches in grid order, for sizes of which no patch is dropped."""
    batch, patches = group.tokens.shape[0], group.tokens.shape[1] - backbone.prefix
    order = torch.arange(patches, device=group.tokens.device).expand(batch, -1)
    full = Schedule((patches,) * backbone.depth, start)
    return Plan(torch.zeros(order.shape, device=order.device), order, full, group.embedded.grid)


# ---- results, in the order of the list


def in_order(
    groups: Sequence[SizeGroup], outputs: Callable[[Tensor, Plan | None], Tensor]
) -> Float[Tensor, "images _"]:
    """``outputs`` of each group's tokens and plan, one row for each image."""
    results = torch.cat([outputs(group.tokens, group.plan) for group in groups])
    places = torch.tensor([place for group in groups for place in group.places], device=results.device)
    return results[places.argsort()]


def lives_in_order(groups: Sequence[SizeGroup], depth: int) -> list[Lives]:
    """The lives of each image, as batches of one: their grids differ."""
    found: dict[int, Lives] = {}
    for group in groups:
        full = Lives.full(len(group.places), group.embedded.grid, depth, group.tokens.device)
        lives = group.plan.lives() if group.plan else full
        found |= {place: lives[image] for image, place in enumerate(group.places)}
    return [found[place] for place in sorted(found)]
