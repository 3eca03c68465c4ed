"""timm's Vision Transformers as a `Backbone`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.models import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..data import Preprocess
from ..errors import ConfigError, UnsupportedModelError
from . import timm_blocks
from .attached import original
from .attention import Attend, Projected
from .backbone import Backbone, Embedded

__all__ = ["FAMILIES", "TimmBackbone", "adapt_timm", "pretrained_cfg"]

FAMILIES = (
    "ViT / AugReg / DeiT / DeiT distilled / DeiT3 / DINOv2 (with registers too) / CLIP / SigLIP / qk-norm / "
    "parallel blocks (timm VisionTransformer), and EVA, EVA-02, DINOv3, RoPE ViT (timm Eva)"
)

# Methods of timm that `TimmBackbone` replaces or calls: a subclass that overrides one of them is refused.
_RELIED_ON = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


class TimmBackbone(Backbone):
    """The parts of a model of timm's classes ``VisionTransformer`` and ``Eva``."""

    library = "timm"

    @property
    def blocks(self) -> Sequence[Any]:
        """The transformer blocks."""
        return self.model.blocks

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        return self.model.norm

    @property
    def dim(self) -> int:
        """Token width."""
        return self.model.embed_dim

    @property
    def prefix(self) -> int:
        """Number of prefix tokens (class, distillation, registers). They precede the patches and are never dropped."""
        return self.model.num_prefix_tokens

    @property
    def reads_class(self) -> bool:
        """Whether the classifier reads the class token only. Otherwise it reads the patches too."""
        return self.model.global_pool == "token" and self.model.cls_token is not None

    @property
    def pools(self) -> bool:
        """Whether the classifier gives one prediction per image. Otherwise it gives one per token, in grid order."""
        return bool(self.model.global_pool) or self.model.attn_pool is not None

    @property
    def state_key(self) -> tuple:
        """Settings of the model that can change after it was built and that FLOPs depend on."""
        vit = self.model
        return (vit.num_classes, vit.global_pool, self.image_size, self.patch_size, self.depth, id(vit.head))

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a model without a classifier."""
        return self.model.num_classes

    @property
    def name(self) -> str:
        """timm's name of the architecture; empty for a model that was built from its class."""
        return pretrained_cfg(self.model).get("architecture") or ""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, where timm has them."""
        return tuple(pretrained_cfg(self.model).get("label_names") or ())

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing of timm's ``pretrained_cfg``, at the model's image size."""
        own = Preprocess.from_timm_cfg(pretrained_cfg(self.model), self.channels)
        return dataclasses.replace(own, size=self.image_size)

    @property
    def family(self) -> str:
        """Class and special parts of the model, such as 'Eva, RoPE, 5 prefix tokens'."""
        vit, block = self.model, self.model.blocks[0]
        parts = [type(vit).__name__]
        kind = type_before_parametrizations(block).__name__
        parts += [kind] if kind not in ("Block", "EvaBlock") else []
        parts += ["RoPE"] if getattr(vit, "rope", None) is not None else []
        parts += [f"{self.prefix} prefix tokens"] if self.prefix else ["no class token"]
        parts += ["reads the class token"] if self.reads_class else [f"pools patches ({vit.global_pool or 'none'})"]
        return ", ".join(parts)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Size (height, width) of a patch in pixels."""
        return tuple(self.model.patch_embed.feat_ratio(as_scalar=False))

    @property
    def image_size(self) -> tuple[int, int]:
        """Image size (height, width) in pixels that the model is built for."""
        return tuple(self.model.patch_embed.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (rows, cols) at `image_size`."""
        return tuple(self.model.patch_embed.grid_size)

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return next(m for m in self.model.patch_embed.modules() if isinstance(m, nn.Conv2d)).in_channels

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patch grid (rows, cols) of ``images``."""
        return tuple(self.model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1])))

    @property
    def any_size(self) -> bool:
        """Whether the model was built with ``dynamic_img_size``."""
        return self.model.dynamic_img_size

    def check_openable(self, index: int, opened: bool) -> None:
        """As in `Backbone`."""
        timm_blocks.check_openable(self.model.blocks[index], index, opened)

    # ---- the parts of a forward pass

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Embedded:
        """Patch tokens with positions, after the prefix tokens.

        Raises ConfigError if ``images`` is not a batch of the model's image size and channels.
        """
        vit = self.model
        self._check_images(images)
        x = vit.patch_embed(images)
        grid = (x.shape[1], x.shape[2]) if vit.dynamic_img_size else self.grid  # a fixed-size model flattens the grid
        rope = None
        if isinstance(vit, Eva):
            x, rope = vit._pos_embed(x)
            rope = None if rope is None else _per_block(rope, getattr(vit, "rope_mixed", False))
        else:
            x = vit.patch_drop(vit._pos_embed(x))
        return Embedded(vit.norm_pre(x), rope, self.present_grid(x, grid), (images.shape[-2], images.shape[-1]))

    def block(self, index: int, x: Tensor, rope: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The output of block ``index`` for tokens ``x``, with gradient checkpointing if the model uses it.

        ``rope``: table of this block, see `rope_of`. ``bias`` (batch or 1, heads or 1, queries or 1, keys) is added to
        the attention logits.
        """
        arguments: dict[str, Any] = {} if rope is None else {"rope": rope}
        arguments |= {} if bias is None else {"attn_mask": bias}
        block = self.model.blocks[index]
        if self.model.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, **arguments)
        return block(x, **arguments)

    def block_with(self, index: int, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
        """The output of block ``index`` with ``attend`` as its attention; ``rope`` comes from `token_rope`."""
        return timm_blocks.run_block(self.model.blocks[index], x, attend, rope)

    def project(self, index: int, x: Tensor, rope: Tensor | None = None) -> Projected:
        """Queries, keys and values of block ``index`` for tokens ``x``; ``rope`` comes from `token_rope`."""
        return timm_blocks.project(self.model.blocks[index], x, rope)

    def class_row(self, index: int, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """The class token's attention logits (batch, heads, tokens) in block ``index``."""
        return timm_blocks.class_row(self.model.blocks[index], x, rope)

    def classify(self, x: Tensor) -> Tensor:
        """Logits from the normalised tokens (patches in any order)."""
        return self.model.forward_head(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The vector that the classifier reads; of a distilled model the mean of its two."""
        if not self.num_classes:  # the head, if there is one, is a projection
            return self.classify(x)
        return self.model.forward_head(x, pre_logits=True)

    def output(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Logits of the dense model, by its own forward pass."""
        return self.model(images)

    def block_flops(self, index: int) -> tuple[int, int]:
        """(a, c): block ``index`` costs ``a * n + c * n**2`` FLOPs on n tokens."""
        return timm_blocks.block_flops(self.model.blocks[index])

    # ---- weights

    def shared_names(self, weights: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The weights by timm's own names, each in one part."""
        return {name: [weight] for name, weight in weights.items()}

    def reset_classifier(self, num_classes: int) -> None:
        """As timm's, on the device and in the precision of the model."""
        like = next(self.model.parameters())
        self.model.reset_classifier(num_classes)
        for name in ("head", "head_dist"):
            if isinstance(module := getattr(self.model, name, None), nn.Module):
                module.to(like)

    def _check_images(self, images: Tensor) -> None:
        self.check_batch(images)
        if not self.model.dynamic_img_size and tuple(images.shape[-2:]) != self.image_size:
            raise ConfigError(
                f"this model takes images of {self.image_size[0]} x {self.image_size[1]} pixels, got "
                f"{images.shape[-2]} x {images.shape[-1]}; resize them, or build it with dynamic_img_size=True"
            )
        (height, width), (rows, cols) = images.shape[-2:], self.patch_size
        if (height % rows or width % cols) and not self.model.patch_embed.dynamic_img_pad:
            raise ConfigError(
                f"images of {height} x {width} pixels cannot be cut into patches of {rows} x {cols}; resize them, or "
                "build the timm model with dynamic_img_pad=True"
            )


def adapt_timm(vit: Any) -> TimmBackbone:
    """The `Backbone` of a timm Vision Transformer.

    Raises UnsupportedModelError for models whose patches cannot be dropped exactly.
    """
    known = next((t for t in (VisionTransformerDistilled, VisionTransformer, Eva) if isinstance(vit, t)), None)
    if known is None:
        raise UnsupportedModelError(
            f"expected a Vision Transformer of timm, got {type(vit).__module__}.{type(vit).__name__}: patches can be "
            "dropped only where blocks take any number of tokens, without windows, convolutions or relative positions. "
            f"Supported: {FAMILIES}"
        )
    overridden = [
        name
        for name in _RELIED_ON
        if name in vars(vit) or getattr(type(vit), name, None) is not getattr(known, name, None)
    ]
    if overridden:
        raise UnsupportedModelError(
            f"{type(vit).__name__} replaces {', '.join(overridden)} of timm's {known.__name__}, so what it computes is "
            f"unknown; wrap a plain {known.__name__} instead. Supported: {FAMILIES}"
        )
    backbone = TimmBackbone(vit)
    blocks = [original(block) for block in vit.blocks]
    width = None
    if getattr(vit, "rope", None) is not None:
        width = 2 * timm_blocks.head_dim(blocks[0].attn)
    for block in {_blueprint(block): block for block in blocks}.values():
        timm_blocks.check_block(block, backbone.dim, backbone.prefix, width)
    return backbone


def pretrained_cfg(vit: nn.Module) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of a model as a dict; empty for a model that was built from its class."""
    cfg = getattr(vit, "pretrained_cfg", None) or {}
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return dataclasses.asdict(cfg)
    return dict(cfg) if isinstance(cfg, Mapping) else {}


def _per_block(rope: Tensor, mixed: bool) -> Float[Tensor, "depth_or_1 batch_or_1 heads_or_1 patches rope_dim"]:
    """timm's rotation table(s) in the shape of `Embedded.rope`. With patch dropout each image has its own table."""
    if mixed:  # (depth, heads, patches, E), or (depth, batch, heads, patches, E)
        return rope.unsqueeze(1) if rope.ndim == 4 else rope
    return rope[None] if rope.ndim == 4 else rope[None, None, None]  # (batch, 1, patches, E), or (patches, E)


def _blueprint(block: nn.Module) -> str:
    """Description of a block's structure. Of several blocks with the same description only one is checked."""
    return repr(block)
