"""Feature extraction with the methods of timm's models: tokens in grid order, dropped patches as `restore` says."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..backbones import Backbone
from ..errors import ConfigError
from .layout import HasLayout
from .plan import Plan
from .run.fixed import Taps
from .similarity import take

__all__ = ["FeatureExtraction", "Indices", "block_indices", "intermediates"]

ImageBatch = Float[Tensor, "batch channels height width"]
Indices = int | list[int] | tuple[int, ...] | None


class FeatureExtraction(HasLayout):
    """The feature methods of `SlimModel`."""

    backbone: Backbone

    def _run(self, images: Tensor, keep_dropped: bool, taps: Taps | None = None) -> tuple[Tensor, Plan | None]:
        raise NotImplementedError

    def forward_features(self, images: ImageBatch) -> Float[Tensor, "batch tokens dim"]:
        """Normalised tokens, as timm's ``forward_features``."""
        tokens, plan = self._run(images, keep_dropped=True)
        if plan is not None:
            tokens = plan.in_grid_order(tokens, self.backbone.prefix)
        return self.backbone.norm(tokens)

    def forward_intermediates(
        self,
        x: ImageBatch,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Tokens after some blocks, as timm's ``forward_intermediates``.

        Args:
            x: images.
            indices: the last n blocks for a number, these blocks for a list, all for None.
            return_prefix_tokens: give pairs of patches and prefix tokens.
            norm: apply the final norm to them.
            stop_early: accepted and ignored: all blocks run.
            output_fmt: NCHW for (batch, dim, rows, cols), NLC for (batch, patches, dim).
            intermediates_only: give the list only, not (final normalised tokens, list).
            output_dict: give a dict with timm's keys.

        Raises ConfigError for blocks that the model does not have, or another format.
        """
        taps: Taps = dict.fromkeys(block_indices(self.backbone.depth, indices), x)
        tokens, plan = self._run(x, keep_dropped=True, taps=taps)
        prefix, grid = self.backbone.prefix, self.backbone.grid_of(x)

        if plan is not None:
            index = plan.grid_index(prefix)
            taps = {block: take(tapped, index) if block >= self.start else tapped for block, tapped in taps.items()}
            tokens = tokens if intermediates_only else take(tokens, index)
        each = [self.backbone.norm(tapped) if norm else tapped for tapped in taps.values()]
        if not output_dict:
            found = intermediates(each, prefix, grid, output_fmt, return_prefix_tokens)
            return found if intermediates_only else (self.backbone.norm(tokens), found)
        result: dict[str, Any] = {"image_intermediates": intermediates(each, prefix, grid, output_fmt, False)}
        if return_prefix_tokens and prefix:
            result["image_intermediates_prefix"] = [tapped[:, :prefix] for tapped in each]
        return result if intermediates_only else result | {"image_features": self.backbone.norm(tokens)}

    def get_intermediate_layers(
        self,
        x: ImageBatch,
        n: Indices = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """`forward_intermediates` with DINO's name and arguments; (batch, patches, dim) unless ``reshape``."""
        return FeatureExtraction.forward_intermediates(  # a library's own method may have other arguments
            self,
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """The block numbers that ``indices`` means, for timm's feature extractors; no block is removed."""
        return block_indices(self.backbone.depth, indices)


def block_indices(depth: int, indices: Indices) -> list[int]:
    """Block numbers in rising order: the last n for a number, these for a list, all for None. Raises ConfigError."""
    if indices is None or isinstance(indices, int):
        count = depth if indices is None else indices
        if not 0 < count <= depth:
            raise ConfigError(f"indices must be a number of last blocks from 1 to {depth}, got {count}")
        return list(range(depth - count, depth))
    if wrong := [index for index in indices if not -depth <= index < depth]:
        raise ConfigError(f"indices must be blocks from {-depth} to {depth - 1}, got {wrong}")
    return sorted({index % depth for index in indices})


def intermediates(
    tokens: list[Tensor], prefix: int, grid: tuple[int, int], output_fmt: str, return_prefix_tokens: bool
) -> list[Any]:
    """Patches of each entry (batch, tokens, dim) as (batch, dim, rows, cols) for NCHW, (batch, patches, dim) for NLC.

    With ``return_prefix_tokens`` each is a pair: patches, and the prefix tokens (batch, prefix, dim).
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ConfigError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
    patches = [x[:, prefix:] for x in tokens]
    if output_fmt == "NCHW":
        patches = [x.transpose(1, 2).reshape(x.shape[0], -1, *grid).contiguous() for x in patches]
    if return_prefix_tokens and prefix:
        return [(patch, x[:, :prefix]) for patch, x in zip(patches, tokens, strict=True)]
    return patches
