"""open_clip's Vision Transformer, the image tower of its CLIP models, as a `Backbone`.

Its own ``forward`` and ``forward_intermediates`` run with other modules in the places of its blocks
(`substitution.py`), so pooled embeddings, tokens and intermediate features are the library's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from open_clip.utils import feature_take_indices
from torch import Tensor, nn

from ..data import Preprocess
from ..errors import ConfigError, UnsupportedModelError
from . import open_clip_layers as layers
from .attached import original
from .attention import Attend, Projected
from .backbone import Backbone, Embedded, RunBlocks
from .open_clip_checks import check_class
from .open_clip_names import shared_names
from .substitution import slots, view

__all__ = ["OpenClipBackbone", "adapt"]

Pair = tuple[int, int]


class OpenClipBackbone(Backbone):
    """The parts of open_clip's ``VisionTransformer``. The output is the pooled and projected embedding."""

    library = "open_clip_torch"
    own_methods = ("forward", "forward_intermediates")

    @property
    def blocks(self) -> Sequence[Any]:
        """The transformer blocks."""
        return self.model.transformer.resblocks

    @property
    def _norm_comes_first(self) -> bool:
        """Whether ``ln_post`` is applied to the tokens, before they are pooled."""
        vit = self.model
        if vit.attn_pool is not None:
            return vit.attn_pool_contrastive is not None
        return not vit.final_ln_after_pool

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block; an nn.Identity where it is applied after pooling."""
        return self.model.ln_post if self._norm_comes_first else nn.Identity()

    @property
    def dim(self) -> int:
        """Token width."""
        return self.model.conv1.out_channels

    @property
    def prefix(self) -> int:
        """1: the class token."""
        return 1

    @property
    def reads_class(self) -> bool:
        """Whether the embedding is computed from the class token only."""
        return self.model.attn_pool is None and self.model.pool_type == "tok"

    @property
    def pools(self) -> bool:
        """Whether the output is computed by pooling. Otherwise it is one embedding per token, in grid order."""
        return self.model.attn_pool is not None or self.model.pool_type != "none"

    @property
    def num_classes(self) -> int:
        """0: the output is an embedding."""
        return 0

    @property
    def name(self) -> str:
        """Empty: open_clip's models do not know the name of their architecture."""
        return ""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Empty: the model has no classes."""
        return ()

    @property
    def preprocess(self) -> Preprocess | None:
        """What open_clip's factory stored in ``preprocess_cfg``; None if it is missing or pads with one colour."""
        cfg = getattr(self.model, "preprocess_cfg", None) or {}
        mode = {"shortest": "center", "squash": "squash"}.get(cfg.get("resize_mode", ""))
        if mode is None or cfg.get("interpolation") not in ("bicubic", "bilinear"):
            return None
        found = {name: list(cfg[name]) for name in ("mean", "std")} | {"interpolation": cfg["interpolation"]}
        return Preprocess.from_dict({"size": self.image_size, "crop_fraction": 1.0, "crop_mode": mode, **found})

    @property
    def family(self) -> str:
        """Class and special parts of the model, in timm's words."""
        vit, block = self.model, original(self.blocks[0])
        parts = ["VisionTransformer"]
        parts += [type(block).__name__] if not isinstance(block, layers.BLOCK_TYPES[0]) else []
        parts += ["1 prefix tokens"]
        if self.reads_class:
            return ", ".join([*parts, "reads the class token"])
        pool = vit.pool_type if vit.attn_pool is None else f"attention, {vit.attn_pool_type or vit.pool_type}"
        parts += [f"pools patches ({pool})", *(() if self._norm_comes_first else ["norm last"])]
        return ", ".join(parts)

    @property
    def patch_size(self) -> Pair:
        """Size (height, width) of a patch in pixels."""
        return tuple(self.model.patch_size)

    @property
    def image_size(self) -> Pair:
        """Image size (height, width) in pixels that the model is built for."""
        return tuple(self.model.image_size)

    @property
    def any_size(self) -> bool:
        """False: there is one position embedding for each patch."""
        return False

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return self.model.conv1.in_channels

    @property
    def dtype(self) -> torch.dtype:
        """Data type of images and tokens. Norms and position embeddings may have another one."""
        return self.model.conv1.weight.dtype

    @property
    def state_key(self) -> tuple:
        """Settings of the model that can change after it was built and that FLOPs depend on."""
        vit = self.model
        return (vit.pool_type, id(vit.attn_pool), vit.proj is None, self.image_size, self.patch_size, self.depth)

    # ---- attachments

    def containers(self) -> Sequence[tuple[str, nn.Module]]:
        """The model, its transformer and the list of its blocks."""
        transformer = self.model.transformer
        return [
            ("the model itself", self.model),
            ("transformer", transformer),
            ("transformer.resblocks", transformer.resblocks),
        ]

    def check_openable(self, index: int, opened: bool) -> None:
        """As in `Backbone`. Blocks that are called as modules take a bias without further conditions."""
        if opened:
            layers.check_openable(self.blocks[index], index)

    def check_attached(self, opened: bool, masked: bool) -> None:
        """As in `Backbone`; also refuses attention modules that an adapter replaced."""
        for index, block in enumerate(self.blocks):
            layers.check_attention(block, index)
        super().check_attached(opened, masked)
        if any("_hf_hook" in module.__dict__ for _, module in self.containers()):
            raise UnsupportedModelError(
                "the model is offloaded or dispatched over devices by accelerate; wrap it on one device, without that"
            )

    # ---- the parts of a forward pass

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Embedded:
        """Patch tokens with positions, after the class token. Raises ConfigError for images of another size."""
        size = self._checked_size(images)
        tokens = self.model._embeds(images)
        return Embedded(tokens, None, self.present_grid(tokens, self.grid), size)

    def _checked_size(self, images: Tensor) -> Pair:
        self.check_batch(images)
        size = (images.shape[-2], images.shape[-1])
        if self.grid_of(images) != self.grid:
            raise ConfigError(
                f"this model takes images of {self.image_size[0]} x {self.image_size[1]} pixels, got {size[0]} x "
                f"{size[1]}; resize them, or build the model with force_image_size"
            )
        return size

    def block(self, index: int, x: Tensor, rope: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The output of block ``index``, with gradient checkpointing if the model uses it."""
        return layers.call_block(self.blocks[index], x, bias, self.model.transformer.grad_checkpointing)

    def block_with(self, index: int, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
        """The output of block ``index`` with ``attend`` as its attention."""
        return layers.run_block(original(self.blocks[index]), x, attend)

    def project(self, index: int, x: Tensor, rope: Tensor | None = None) -> Projected:
        """Queries, keys and values of block ``index``."""
        return layers.project(self.blocks[index], x)

    def class_row(self, index: int, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """The class token's attention logits in block ``index``."""
        return layers.class_row(self.blocks[index], x)

    def classify(self, x: Tensor) -> Tensor:
        """The embedding from the normalised tokens (patches in any order)."""
        vit = self.model
        if vit.attn_pool is None:
            pooled, _ = vit._global_pool(x)
            pooled = pooled if self._norm_comes_first else vit.ln_post(pooled)
        elif vit.attn_pool_contrastive is None:
            pooled, _ = vit._global_pool(vit.ln_post(vit.attn_pool(x)))
        else:
            tokens = vit.attn_pool(x)  # also where only the other pool reads the tokens, as in open_clip's forward
            pooled = vit.attn_pool_contrastive(x if vit.attn_pool_type == "parallel" else tokens)
        return pooled if vit.proj is None else pooled @ vit.proj

    def output(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """The embedding of the dense model, by its own forward pass."""
        output = self.model(images)
        return output[0] if isinstance(output, tuple) else output

    # ---- open_clip's own methods

    def call(self, method: str, run: RunBlocks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``method`` of the model gives when ``run`` computes its blocks."""
        size, wanted = self.image_size_in(args, kwargs), self._requested(method, args, kwargs)
        sequence_first = not self.model.transformer.batch_first

        def run_all(tokens: Tensor, *_: Any, **__: Any) -> Mapping[int, Tensor]:
            tokens = tokens.transpose(0, 1) if sequence_first else tokens
            taps = dict.fromkeys(wanted, tokens)
            all_tokens = bool(wanted) or self.model.output_tokens or not self.reads_class
            taps.pop(self.depth - 1, None)
            last = run(
                Embedded(tokens, None, self.present_grid(tokens, self.grid), size), all_tokens, taps
            )  # fills in taps
            outputs = {**taps, self.depth - 1: last}
            return {index: x.transpose(0, 1) for index, x in outputs.items()} if sequence_first else outputs

        kind = type(original(self.blocks[0]))
        model: Any = view(self.model, "transformer.resblocks", slots(kind, self.depth, run_all))
        model.transformer.grad_checkpointing = False  # of the view: `block` does it
        return getattr(model, method)(*args, **kwargs)

    def _requested(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        """The blocks whose outputs are asked for."""
        if method == "forward":
            return []
        arguments = inspect.signature(getattr(self.model, method)).bind(*args, **kwargs).arguments
        return list(feature_take_indices(self.depth, arguments.get("indices"))[0])

    def image_size_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pair:
        """Size (height, width) of the images. Raises ConfigError without images that fit the model."""
        images = kwargs.get("x", args[0] if args else None)
        if not isinstance(images, Tensor):
            raise ConfigError(f"expected images (batch, channels, height, width), got {type(images).__name__}")
        return self._checked_size(images)

    def block_flops(self, index: int) -> Pair:
        """(a, c): block ``index`` costs ``a * n + c * n**2`` FLOPs on n tokens."""
        return layers.block_flops(self.blocks[index])

    # ---- weights

    def shared_names(self, weights: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The weights under timm's names and in timm's shapes, each in one part; ``proj`` is the head."""
        return shared_names(weights)

    def reset_classifier(self, num_classes: int) -> None:
        """Raises UnsupportedModelError: the model has no classifier."""
        raise UnsupportedModelError(
            "an image tower of open_clip has no classifier; use open_clip.build_zero_shot_classifier"
        )


def adapt(model: Any) -> OpenClipBackbone:
    """The `Backbone` of open_clip's ``VisionTransformer``.

    Raises UnsupportedModelError, with the reason, for other models.
    """
    check_class(model)
    backbone = OpenClipBackbone(model)
    for index, block in enumerate(backbone.blocks):
        if type(original(block)) not in layers.BLOCK_TYPES:
            known = " or ".join(kind.__name__ for kind in layers.BLOCK_TYPES)
            raise UnsupportedModelError(
                f"expected {known} as transformer.resblocks.{index}, got {type(original(block)).__name__}"
            )
        layers.check_attention(block, index)
    for block in {type(original(block)): original(block) for block in backbone.blocks}.values():
        layers.check_block(block, backbone.dim)
    return backbone
