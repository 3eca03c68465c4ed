"""A Vision Transformer seen as the parts that the method needs: embed, blocks, norm, classify.

This folder is the only one that knows timm's private names. Everything is composed: the model that the user
built keeps its modules and its weights, and is called piece by piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from timm.models import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from ..flop_counter import counted
from . import blocks as timm_blocks
from .attached import attachments, original
from .blocks import Attend, Projected
from .skeleton import skeleton

__all__ = ["FAMILIES", "Backbone", "Embedded", "adapt"]

M = TypeVar("M", bound=nn.Module)

FAMILIES = (
    "ViT / AugReg / DeiT / DeiT distilled / DeiT3 / DINOv2 (with registers too) / CLIP / SigLIP / qk-norm / "
    "parallel blocks (timm VisionTransformer), and EVA, EVA-02, DINOv3, RoPE ViT (timm Eva)"
)


class _Holder(NamedTuple):
    kinds: tuple[str, ...]
    advice: str


_HOLDERS = {  # by the name under which the model is held
    "_orig_mod": _Holder(
        ("OptimizedModule",), "wrap the model before torch.compile: torch.compile(patchlife.wrap(model._orig_mod))"
    ),
    "module": _Holder(
        ("DataParallel", "DistributedDataParallel"),
        "wrap the model inside first: DistributedDataParallel(patchlife.wrap(model.module))",
    ),
    "_fsdp_wrapped_module": _Holder(
        ("FullyShardedDataParallel",), "wrap the model before it is sharded: fully_shard(patchlife.wrap(vit))"
    ),
    "base_model": _Holder(
        ("PeftModel",), "wrap the model that holds the adapters: patchlife.wrap(model.base_model.model)"
    ),
    "timm_model": _Holder(
        ("TimmWrapperModel", "TimmWrapperForImageClassification"),
        "wrap the timm model in its place: model.timm_model = patchlife.wrap(model.timm_model)",
    ),
    "trunk": _Holder(("TimmModel",), "wrap the timm model in its place: visual.trunk = patchlife.wrap(visual.trunk)"),
    "model": _Holder(("FeatureGetterNet",), "wrap the model inside: model.model = patchlife.wrap(model.model)"),
}

# What we rely on: a subclass that replaces one of these computes something we have not read.
_RELIED_ON = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


class Embedded(NamedTuple):
    """Images as tokens, pipeline for block 0."""

    tokens: Float[Tensor, "batch tokens dim"]
    rope: Float[Tensor, "depth_or_1 batch_or_1 heads_or_1 patches rope_dim"] | None
    grid: tuple[int, int]
    image_size: tuple[int, int]


class Backbone(nn.Module):
    """The parts of one timm ViT. Holds the model, changes nothing in it, and keeps no copy of its settings.

    Attributes:
        vit: the model that was wrapped.
    """

    def __init__(self, vit: VisionTransformer | Eva) -> None:
        super().__init__()
        self.vit: Any = vit  # its private names are this folder's business, and only this folder's
        self.training = vit.training  # of this wrapper only: the model's own flag stays as it is
        self._skeleton: tuple[tuple, Backbone] | None = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def dim(self) -> int:
        """Token width."""
        return self.vit.embed_dim

    @property
    def prefix(self) -> int:
        """Tokens before the patches (class, distillation, registers); they are never dropped."""
        return self.vit.num_prefix_tokens

    @property
    def reads_class(self) -> bool:
        """Whether the classifier reads the class token only; otherwise it wants the patches too."""
        return self.vit.global_pool == "token" and self.vit.cls_token is not None

    @property
    def pools(self) -> bool:
        """Whether the classifier makes one answer of all tokens; otherwise it answers for each, in their order."""
        return bool(self.vit.global_pool) or self.vit.attn_pool is not None

    @property
    def settings(self) -> tuple:
        """What may change in a model without its being built anew, and what costs depend on."""
        return (self.vit.num_classes, self.vit.global_pool, self.image_size, self.patch_size, self.depth)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(p.dtype for p in self.vit.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where images have to be."""
        return next(self.vit.parameters()).device

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

    # ---- what users attach

    def check_attached(self, opened: bool, masked: bool) -> None:
        """Raise UnsupportedModelError for what is attached to modules that are not called as wholes.

        ``opened``: blocks are not called as wholes either (adaptive mode). ``masked``: blocks get an attention bias.
        """
        for name, module in (("the model itself", self.vit), ("blocks (all of them as one)", self.vit.blocks)):
            if found := attachments(module):
                raise UnsupportedModelError(
                    f"{found} on {name} would have no effect, because patchlife calls the blocks one by one; attach it "
                    "to the wrapped model, or to the modules inside"
                )
        for index, block in enumerate(self.vit.blocks if opened or masked else ()):
            timm_blocks.check_openable(block, index, opened)

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
            rope = None if rope is None else _per_block(rope, getattr(vit, "rope_mixed", False))
        else:
            x = vit.patch_drop(vit._pos_embed(x))
        patches = x.shape[1] - self.prefix
        if patches != grid[0] * grid[1]:  # patch dropout in training: a random few, in no grid
            grid = (1, patches)
        return Embedded(vit.norm_pre(x), rope, grid, (images.shape[-2], images.shape[-1]))

    def block(self, index: int, x: Tensor, rope: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Block ``index`` as timm runs it, checkpointed where the model is set to it.

        ``rope``: this block's table, see `rope_of`. ``bias`` (batch or 1, heads or 1, queries or 1, keys) is added to
        the attention logits.
        """
        given: dict[str, Any] = {} if rope is None else {"rope": rope}
        given |= {} if bias is None else {"attn_mask": bias}
        block = self.vit.blocks[index]
        if self.vit.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, **given)
        return block(x, **given)

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
        size = image_size or self.image_size
        return torch.zeros(1, self.channels, *size, device=self.device, dtype=self.dtype)

    def of(self, module: M) -> M:
        """``module`` without weights and attachments, to go with a `skeleton`."""
        return skeleton(module)

    def skeleton(self) -> Backbone:
        """The same parts without weights, on the meta device: to count with, for nothing attached is called."""
        key = (*self.settings, id(self.vit.head))
        if self._skeleton is None or self._skeleton[0] != key:
            self._skeleton = (key, Backbone(skeleton(self.vit, alike=self.vit.blocks)))
        return self._skeleton[1]

    def outer_flops(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """FLOPs per image of (embedding, norm + pooling + classifier)."""
        twin = self.skeleton()
        embedding, embedded = counted(twin.embed, twin.blank(image_size or self.image_size))
        tail, _ = counted(lambda x: twin.classify(twin.norm(x)), embedded.tokens)
        return embedding, tail

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
    if (advice := _advice(vit)) is not None:
        raise UnsupportedModelError(advice)
    known = next((t for t in (VisionTransformerDistilled, VisionTransformer, Eva) if isinstance(vit, t)), None)
    if known is None:
        raise UnsupportedModelError(
            f"expected a Vision Transformer of timm, got {type(vit).__module__}.{type(vit).__name__}: patches can be "
            "dropped where blocks take any number of tokens, without windows, convolutions or relative positions "
            f"between them. Supported: {FAMILIES}"
        )
    changed = [
        name
        for name in _RELIED_ON
        if name in vars(vit) or getattr(type(vit), name, None) is not getattr(known, name, None)
    ]
    if changed:
        raise UnsupportedModelError(
            f"{type(vit).__name__} replaces {', '.join(changed)} of timm's {known.__name__}, so what it computes is "
            f"unknown; wrap a plain {known.__name__} instead. Supported: {FAMILIES}"
        )
    backbone = Backbone(vit)
    blocks = [original(block) for block in vit.blocks]
    width = None
    if getattr(vit, "rope", None) is not None:
        width = 2 * timm_blocks.head_dim(blocks[0].attn)
    for block in {_blueprint(block): block for block in blocks}.values():
        timm_blocks.check_block(block, backbone.dim, backbone.prefix, width)
    return backbone


def _advice(model: Any) -> str | None:
    """What to do with a model that holds a Vision Transformer, or that is wrapped already; None for others."""
    kind = type(model).__name__
    for name, how in _HOLDERS.items():
        held = getattr(model, "_modules", {}).get(name) if isinstance(model, nn.Module) else None
        if held is not None and kind in how.kinds:
            return f"expected a Vision Transformer of timm, got one inside a {kind}: {how.advice}"
    if hasattr(type(model), "unwrap") and kind == "SlimModel":
        return "this model is wrapped already; use set_budget and set_mode, or wrap(model.unwrap(), ...)"
    if not isinstance(model, nn.Module):
        return f"expected a Vision Transformer of timm (an nn.Module), got {type(model).__name__}"
    return None


def _per_block(rope: Tensor, mixed: bool) -> Float[Tensor, "depth_or_1 batch_or_1 heads_or_1 patches rope_dim"]:
    """timm's table(s) of rotations, as `Embedded` holds them. Patch dropout gives each image its own."""
    if mixed:  # (depth, heads, patches, E), or (depth, batch, heads, patches, E)
        return rope.unsqueeze(1) if rope.ndim == 4 else rope
    return rope[None] if rope.ndim == 4 else rope[None, None, None]  # (batch, 1, patches, E), or (patches, E)


def _blueprint(block: nn.Module) -> str:
    """Blocks that print alike compute alike; checking one of a kind is enough."""
    return repr(block)
