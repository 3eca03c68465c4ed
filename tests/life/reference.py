"""The method as slowly and plainly as it can be said, to compare ours with.

timm's model runs on all tokens in grid order by its own code. Hooks on its blocks hide the dead patches from
attention as keys and put back what they were before the block. Only the lives are taken from patchlife.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patchlife.life import LifeHead


class GivenScores(LifeHead):
    """A head that returns the scores it was given, whatever it sees."""

    kind = "given-scores"

    def __init__(self, score: Tensor) -> None:
        super().__init__()
        self.score = score

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        """The given scores of the first images."""
        return self.score[: len(tokens)].to(tokens.device)


@contextmanager
def mortal(vit: nn.Module, life: Tensor) -> Iterator[None]:
    """Within it, a patch takes part in block ``l`` of ``vit`` only while ``l < life`` (batch, patches)."""
    immortal = torch.full((len(life), vit.num_prefix_tokens), torch.inf)
    life = torch.cat((immortal, life), dim=1)
    handles = []
    for index, block in enumerate(vit.blocks):
        alive = life > index

        def hide(_: nn.Module, args: tuple, kwargs: dict, keys: Tensor = alive[:, None, None]) -> tuple:
            return args, {**kwargs, "attn_mask": keys}

        def freeze(_: nn.Module, args: tuple, out: Tensor, rows: Tensor = alive[..., None]) -> Tensor:
            return torch.where(rows, out, args[0])

        handles.append(block.register_forward_pre_hook(hide, with_kwargs=True))
        handles.append(block.register_forward_hook(freeze))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def masked(vit: nn.Module, images: Tensor, life: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, features in grid order) of ``vit`` when patches live for ``life`` (batch, patches) blocks."""
    with mortal(vit, life):
        features = vit.forward_features(images)
    return vit.forward_head(features), features


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, relative to the larger of 1 and the largest value."""
    assert ours.shape == theirs.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert torch.isfinite(theirs).all(), "a reference that is not finite proves nothing"
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
