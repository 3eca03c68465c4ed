"""A Vision Transformer seen as the parts that the method needs: embed, blocks, norm, classify.

This folder is the only one that knows timm's private names. Everything is composed: the model that the user
built keeps its modules and its weights, and is called piece by piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from . import blocks as timm_blocks
from .blocks import Attend, Projected

__all__ = ["FAMILIES", "Backbone", "Embedded", "adapt"]

FAMILIES = (
    "ViT / AugReg / DeiT / DeiT distilled / DeiT3 / DINOv2 (with registers too) / CLIP / SigLIP / qk-norm / "
    "parallel blocks (timm VisionTransformer), and EVA, EVA-02, DINOv3, RoPE ViT (timm Eva)"
)

# What we rely on: a subclass that replaces one of these computes something we have not read.
_RELIED_ON = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


class Embedded(NamedTuple):
    """Images as tokens, ready for block 0."""

    tokens: Float[Tensor, "batch tokens dim"]
    rope: Float[Tensor, "depth_or_1 batch_or_1 heads_or_1 patches rope_dim"] | None
    grid: tuple[int, int]
    image_size: tuple[int, int]


class Backbone(nn.Module):
    """The parts of one timm ViT. Holds the model, changes nothing in it.

    Attributes:
        vit: the model that was wrapped.
        depth: number of blocks. dim: token width. heads: attention heads.
        prefix: tokens before the patches (class, distillation, registers); they never die.
        reads_class: the classifier reads the class token only; otherwise it wants the patches too.
        pools: the classifier makes one answer of all tokens; otherwise it answers for each, in their order.
    """

    def __init__(self, vit: VisionTransformer | Eva) -> None:
        super().__init__()
        self.vit: Any = vit  # its private names are this folder's business, and only this folder's
        self.depth = len(vit.blocks)
        self.dim = vit.embed_dim
        self.prefix = vit.num_prefix_tokens
        self.reads_class = vit.global_pool == "token" and vit.cls_token is not None
        self.pools = bool(vit.global_pool) or vit.attn_pool is not None
        self.training = vit.training  # of this wrapper only: the model's own flag stays as it is
        self._flops: dict[tuple[int, int], tuple[int, int]] = {}

    @property
    def family(self) -> str:
        """Class and the special parts that matter here, for people: 'Eva, RoPE, 4 registers'."""
        vit, block = self.vit, self.vit.blocks[0]
        parts = [type(vit).__name__]
        parts += [type(block).__name__] if type(block).__name__ not in ("Block", "EvaBlock") else []
        parts += ["RoPE"] if getattr(vit, "rope", None) is not None else []
        parts += [f"{self.prefix} prefix tokens"] if self.prefix else ["no class token"]
        parts += ["reads the class token"] if self.reads_class else [f"pools patches ({vit.global_pool or 'none'})"]
        return ", ".join(parts)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels (height, width) that one patch covers."""
        return tuple(self.vit.patch_embed.feat_ratio(as_scalar=False))

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels (height, width) that the model was built for."""
        return tuple(self.vit.patch_embed.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (rows, cols) at `image_size`."""
        return tuple(self.vit.patch_embed.grid_size)

    @property
    def channels(self) -> int:
        """Image channels that the model takes."""
        return next(m for m in self.vit.patch_embed.modules() if isinstance(m, nn.Conv2d)).in_channels

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patch grid (rows, cols) that ``images`` are cut into."""
        return tuple(self.vit.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1])))

    # ---- the forward pass, piece by piece

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Embedded:
        """Patches with positions, prefix tokens in front.

        Raises ConfigError when the images are not a batch of the size and channels the model takes.
        """
        vit = self.vit
        self._check_images(images)
        x = vit.patch_embed(images)
        grid = (x.shape[1], x.shape[2]) if vit.dynamic_img_size else self.grid  # static models flatten at once
        rope = None
        if isinstance(vit, Eva):
            x, rope = vit._pos_embed(x)
            if rope is not None:  # (patches, E) or, one table a block, (depth, heads, patches, E)
                rope = rope.unsqueeze(1) if rope.ndim == 4 else rope[None, None, None]
        else:
            x = vit._pos_embed(x)
        return Embedded(vit.norm_pre(x), rope, grid, (images.shape[-2], images.shape[-1]))

    def block(self, index: int, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """Block ``index`` as timm runs it. ``rope``: this block's table, see `rope_of`."""
        return self.vit.blocks[index](x) if rope is None else self.vit.blocks[index](x, rope=rope)

    def block_with(self, index: int, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
        """Block ``index`` with its attention done by ``attend``; ``rope`` as `token_rope` gives it."""
        return timm_blocks.run_block(self.vit.blocks[index], x, attend, rope)

    def project(self, index: int, x: Tensor, rope: Tensor | None = None) -> Projected:
        """Queries, keys and values of block ``index`` for ``x``; ``rope`` as `token_rope` gives it."""
        return timm_blocks.project(self.vit.blocks[index], x, rope)

    def class_row(self, index: int, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """The class token's attention logits (batch, heads, tokens) in block ``index``."""
        return timm_blocks.class_row(self.vit.blocks[index], x, rope)

    def norm(self, x: Tensor) -> Tensor:
        """The norm after the last block."""
        return self.vit.norm(x)

    def classify(self, x: Tensor) -> Tensor:
        """Pool and classify the normalised tokens (patches in any order)."""
        return self.vit.forward_head(x)

    # ---- rotary positions: one home for their shapes

    @staticmethod
    def rope_of(rope: Tensor | None, index: int) -> Tensor | None:
        """Block ``index``'s own table (batch or 1, heads or 1, patches, rope_dim)."""
        return None if rope is None else rope[index if rope.shape[0] > 1 else 0]

    def token_rope(self, rope: Tensor | None, index: int) -> Tensor | None:
        """Block ``index``'s table for all tokens, tokens before heads: (batch or 1, tokens, heads or 1, rope_dim)."""
        table = self.rope_of(rope, index)
        return None if table is None else timm_blocks.identity_prefix(table, self.prefix).transpose(-3, -2)

    # ---- cost

    def block_flops(self, index: int) -> tuple[int, int]:
        """(a, c): block ``index`` on n tokens costs ``a * n + c * n**2`` FLOPs."""
        return timm_blocks.block_flops(self.vit.blocks[index])

    def blank(self, image_size: tuple[int, int] | None = None) -> Float[Tensor, "1 channels height width"]:
        """One image of zeros, of the model's own size if none is given, where the weights are and in their format."""
        return next(self.vit.parameters()).new_zeros(1, self.channels, *(image_size or self.image_size))

    def outer_flops(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """FLOPs per image of (embedding, norm + pooling + classifier), counted by running them once on zeros."""
        from ..measure.flops import counted

        size = image_size or self.image_size
        if size not in self._flops:
            embedding, embedded = counted(self.embed, self.blank(size))
            tail, _ = counted(lambda x: self.classify(self.norm(x)), embedded.tokens)
            self._flops[size] = (embedding, tail)
        return self._flops[size]

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4:
            raise ConfigError(f"images must be (batch, channels, height, width), got shape {tuple(images.shape)}")
        if images.shape[1] != self.channels:
            raise ConfigError(f"this model takes images of {self.channels} channel(s), got {images.shape[1]}")
        if not self.vit.dynamic_img_size and tuple(images.shape[-2:]) != self.image_size:
            raise ConfigError(
                f"this model takes images of {self.image_size[0]} x {self.image_size[1]} pixels, got "
                f"{images.shape[-2]} x {images.shape[-1]}; resize them, or build it with dynamic_img_size=True"
            )
        (height, width), (rows, cols) = images.shape[-2:], self.patch_size
        if (height % rows or width % cols) and not self.vit.patch_embed.dynamic_img_pad:
            raise ConfigError(
                f"images of {height} x {width} pixels cannot be cut into patches of {rows} x {cols}; resize them, or "
                "build the timm model with dynamic_img_pad=True"
            )


def adapt(vit: Any) -> Backbone:
    """See ``vit`` as a `Backbone`.

    Raises UnsupportedModelError, saying what was found, for anything whose patches cannot be dropped exactly.
    """
    known = next((t for t in (VisionTransformerDistilled, VisionTransformer, Eva) if isinstance(vit, t)), None)
    if known is None:
        raise UnsupportedModelError(
            f"patches of a {type(vit).__name__} cannot be dropped: windows, convolutions or relative positions need "
            f"the full grid, or patchlife does not know the model. It knows {FAMILIES}"
        )
    changed = [
        name
        for name in _RELIED_ON
        if name in vars(vit) or getattr(type(vit), name, None) is not getattr(known, name, None)
    ]
    if changed:
        raise UnsupportedModelError(
            f"{type(vit).__name__} replaces {', '.join(changed)} of timm's {known.__name__}, so what it computes is "
            f"unknown; wrap a plain {known.__name__} instead. patchlife knows {FAMILIES}"
        )
    backbone = Backbone(vit)
    width = None
    if getattr(vit, "rope", None) is not None:
        width = 2 * timm_blocks.head_dim(vit.blocks[0].attn)
    for block in {_blueprint(block): block for block in vit.blocks}.values():
        timm_blocks.check_block(block, backbone.prefix, width)
    return backbone


def _blueprint(block: nn.Module) -> str:
    """Blocks that print alike compute alike; checking one of a kind is enough."""
    return repr(block)
