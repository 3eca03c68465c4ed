"""ToMe for dense prediction: merged patches are un-merged wherever the features of the whole grid are asked for.

Un-merging copies a merged token to the places of all the patches in it (Bolya and Hoffman, Token Merging for Fast
Stable Diffusion, CVPR workshops 2023, arXiv 2303.17604). The two other ways that our own method knows are here too, so
that each method can be compared at its best:

    target      the merged token
    residual    the patch's own state when it was merged, plus what later blocks changed in the merged token
    last        the patch's own state when it was merged; a patch that others were merged into is its token
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...backbones import Backbone
from ...config import Restore
from .base import Images, check_no_rope, take
from .tome import Pairs, ToMe, merge_pairs

__all__ = ["UnmergingToMe"]


class UnmergingToMe(ToMe):
    """`ToMe` that gives normalised features of every patch, by `features`; ``restore`` as above."""

    def __init__(self, backbone: Backbone, pairs: tuple[int, ...], restore: Restore = "target") -> None:
        super().__init__(backbone, pairs)
        self.restore = restore

    def features(self, images: Images, blocks: tuple[int, ...]) -> list[Float[Tensor, "batch dim rows cols"]]:
        """The normalised features after each of ``blocks`` (rising), patches in their places on the grid."""
        bb, found = self.backbone, []
        embedded = bb.embed(images)
        check_no_rope(embedded.rope, "ToMe")
        x = embedded.tokens
        size = x.new_ones(len(x), x.shape[1] - bb.prefix)
        self._places = _Places(size.shape, self.restore, x)
        try:
            for index in range(max(blocks) + 1):
                x, size = self.block(index, x, size)
                if index in blocks:
                    patches = bb.norm(self._places.unmerged(x[:, bb.prefix :]))
                    found.append(patches.transpose(1, 2).reshape(len(x), -1, *embedded.grid))
        finally:
            del self._places
        return found

    def merged(self, patches: Tensor, size: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """As `ToMe`; what un-merging needs is kept."""
        after, new_size = merge_pairs(patches, size, pairs)
        if hasattr(self, "_places"):
            self._places.merge(patches, after, pairs)
        return after, new_size


class _Places:
    """For each patch of the grid: the token that it is in now, and what is added to that token's state."""

    def __init__(self, shape: torch.Size, restore: Restore, like: Tensor) -> None:
        self.restore = restore
        self.token: Int[Tensor, "batch patches"] = torch.arange(shape[1], device=like.device).expand(shape)
        self.added: Float[Tensor, "batch patches dim"] = like.new_zeros(*shape, like.shape[2])
        self.frozen = torch.zeros(shape, dtype=torch.bool, device=like.device)  # for "last": already merged away

    def merge(self, before: Tensor, after: Tensor, pairs: Pairs) -> None:
        """Tokens ``before`` became tokens ``after``."""
        unmerged, merged, target = pairs
        first, kept = (before.shape[1] + 1) // 2, unmerged.shape[1]
        second = torch.arange(before.shape[1] - first, device=before.device).expand(len(before), -1)
        moved = torch.empty(before.shape[:2], dtype=torch.long, device=before.device)  # token before -> token after
        moved[:, 1::2] = kept + second
        moved[:, ::2].scatter_(1, merged, kept + target)
        moved[:, ::2].scatter_(1, unmerged, torch.arange(kept, device=before.device).expand_as(unmerged))
        new = moved.gather(1, self.token)
        if self.restore == "residual":
            self.added = self.added + take(before, self.token) - take(after, new)
        if self.restore == "last":
            gone = torch.zeros(before.shape[:2], dtype=torch.bool, device=before.device)
            gone[:, ::2] = gone[:, ::2].scatter(1, merged, True)
            freezes = gone.gather(1, self.token) & ~self.frozen
            self.added = torch.where(freezes[..., None], take(before, self.token), self.added)
            self.frozen = self.frozen | freezes
        self.token = new

    def unmerged(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch patches dim"]:
        """The state of every patch of the grid."""
        states = take(tokens, self.token)
        return torch.where(
            self.frozen[..., None], self.added, states if self.restore == "last" else states + self.added
        )
