"""A timm Vision Transformer as the parts that the method needs: embed, blocks, norm, classify.

`Backbone` holds the user's model and calls its modules one by one. The model keeps its modules and its weights.
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


class _Container(NamedTuple):
    """Classes that hold a Vision Transformer, and what to do instead of wrapping them."""

    classes: tuple[str, ...]
    advice: str


_CONTAINERS = {  # by the name of the submodule that is the Vision Transformer
    "_orig_mod": _Container(
        ("OptimizedModule",), "wrap the model before torch.compile: torch.compile(patchlife.wrap(model._orig_mod))"
    ),
    "module": _Container(
        ("DataParallel", "DistributedDataParallel"),
        "wrap the model inside first: DistributedDataParallel(patchlife.wrap(model.module))",
    ),
    "_fsdp_wrapped_module": _Container(
        ("FullyShardedDataParallel",), "wrap the model before it is sharded: fully_shard(patchlife.wrap(vit))"
    ),
    "base_model": _Container(
        ("PeftModel",), "wrap the model with the LoRA layers: patchlife.wrap(model.base_model.model)"
    ),
    "timm_model": _Container(
        ("TimmWrapperModel", "TimmWrapperForImageClassification"),
        "wrap the timm model in its place: model.timm_model = patchlife.wrap(model.timm_model)",
    ),
    "trunk": _Container(
        ("TimmModel",), "wrap the timm model in its place: visual.trunk = patchlife.wrap(visual.trunk)"
    ),
    "model": _Container(("FeatureGetterNet",), "wrap the model inside: model.model = patchlife.wrap(model.model)"),
}

# Methods of timm that `Backbone` replaces or calls: a subclass that overrides one of them is refused.
_RELIED_ON = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


class Embedded(NamedTuple):
    """Tokens that enter block 0, with the tables of rotary positions, the patch grid and the image size in pixels."""

    tokens: Float[Tensor, "batch tokens dim"]
    rope: Float[Tensor, "depth_or_1 batch_or_1 heads_or_1 patches rope_dim"] | None
    grid: tuple[int, int]
    image_size: tuple[int, int]


class Backbone(nn.Module):
    """The parts of a timm Vision Transformer. The model is held, not changed, and no setting of it is copied.

    Attributes:
        vit: the model that was wrapped.
    """

    def __init__(self, vit: VisionTransformer | Eva) -> None:
        super().__init__()
        self.vit: Any = vit  # Any: its private attributes are used here
        self.training = vit.training  # only of this module; the flags of the model's modules stay unchanged
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
        """Number of prefix tokens (class, distillation, registers). They precede the patches and are never dropped."""
        return self.vit.num_prefix_tokens

    @property
    def reads_class(self) -> bool:
        """Whether the classifier reads the class token only. Otherwise it reads the patches too."""
        return self.vit.global_pool == "token" and self.vit.cls_token is not None

    @property
    def pools(self) -> bool:
        """Whether the classifier gives one prediction per image. Otherwise it gives one per token, in grid order."""
        return bool(self.vit.global_pool) or self.vit.attn_pool is not None

    @property
    def settings(self) -> tuple:
        """Settings of the model that can change after it was built and that FLOPs depend on."""
        return (self.vit.num_classes, self.vit.global_pool, self.image_size, self.patch_size, self.depth)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(p.dtype for p in self.vit.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device that images must be on."""
        return next(self.vit.parameters()).device

    @property
    def family(self) -> str:
        """Class and special parts of the model, such as 'Eva, RoPE, 5 prefix tokens'. Adapters store this text."""
        vit, block = self.vit, self.vit.blocks[0]
        parts = [type(vit).__name__]
        parts += [type(block).__name__] if type(block).__name__ not in ("Block", "EvaBlock") else []
        parts += ["RoPE"] if getattr(vit, "rope", None) is not None else []
        parts += [f"{self.prefix} prefix tokens"] if self.prefix else ["no class token"]
        parts += ["reads the class token"] if self.reads_class else [f"pools patches ({vit.global_pool or 'none'})"]
        return ", ".join(parts)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Size (height, width) of a patch in pixels."""
        return tuple(self.vit.patch_embed.feat_ratio(as_scalar=False))

    @property
    def image_size(self) -> tuple[int, int]:
        """Image size (height, width) in pixels that the model is built for."""
        return tuple(self.vit.patch_embed.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (rows, cols) at `image_size`."""
        return tuple(self.vit.patch_embed.grid_size)

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return next(m for m in self.vit.patch_embed.modules() if isinstance(m, nn.Conv2d)).in_channels

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patch grid (rows, cols) of ``images``."""
        return tuple(self.vit.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1])))

    # ---- attachments

    def check_attached(self, opened: bool, masked: bool) -> None:
        """Raise UnsupportedModelError for attachments of modules that are not called themselves, only their parts.

        ``opened``: blocks are not called either (adaptive mode). ``masked``: blocks get an attention bias.
        """
        for name, module in (("the model itself", self.vit), ("blocks (all of them as one)", self.vit.blocks)):
            if attached := attachments(module):
                raise UnsupportedModelError(
                    f"{attached} on {name} would have no effect, because patchlife calls the blocks one by one; attach "
                    "it to the wrapped model, or to the modules inside"
                )
        for index, block in enumerate(self.vit.blocks if opened or masked else ()):
            timm_blocks.check_openable(block, index, opened)

    # ---- the parts of a forward pass

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Embedded:
        """Patch tokens with positions, after the prefix tokens.

        Raises ConfigError if ``images`` is not a batch of the model's image size and channels.
        """
        vit = self.vit
        self._check_images(images)
        x = vit.patch_embed(images)
        grid = (x.shape[1], x.shape[2]) if vit.dynamic_img_size else self.grid  # a fixed-size model flattens the grid
        rope = None
        if isinstance(vit, Eva):
            x, rope = vit._pos_embed(x)
            rope = None if rope is None else _per_block(rope, getattr(vit, "rope_mixed", False))
        else:
            x = vit.patch_drop(vit._pos_embed(x))
        patches = x.shape[1] - self.prefix
        if patches != grid[0] * grid[1]:  # patch dropout in training leaves random patches: there is no grid
            grid = (1, patches)
        return Embedded(vit.norm_pre(x), rope, grid, (images.shape[-2], images.shape[-1]))

    def block(self, index: int, x: Tensor, rope: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The output of block ``index`` for tokens ``x``, with gradient checkpointing if the model uses it.

        ``rope``: table of this block, see `rope_of`. ``bias`` (batch or 1, heads or 1, queries or 1, keys) is added to
        the attention logits.
        """
        arguments: dict[str, Any] = {} if rope is None else {"rope": rope}
        arguments |= {} if bias is None else {"attn_mask": bias}
        block = self.vit.blocks[index]
        if self.vit.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, **arguments)
        return block(x, **arguments)

    def block_with(self, index: int, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
        """The output of block ``index`` with ``attend`` as its attention; ``rope`` comes from `token_rope`."""
        return timm_blocks.run_block(self.vit.blocks[index], x, attend, rope)

    def project(self, index: int, x: Tensor, rope: Tensor | None = None) -> Projected:
        """Queries, keys and values of block ``index`` for tokens ``x``; ``rope`` comes from `token_rope`."""
        return timm_blocks.project(self.vit.blocks[index], x, rope)

    def class_row(self, index: int, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """The class token's attention logits (batch, heads, tokens) in block ``index``."""
        return timm_blocks.class_row(self.vit.blocks[index], x, rope)

    def norm(self, x: Tensor) -> Tensor:
        """The norm after the last block."""
        return self.vit.norm(x)

    def classify(self, x: Tensor) -> Tensor:
        """Logits from the normalised tokens (patches in any order)."""
        return self.vit.forward_head(x)

    # ---- rotary positions

    @staticmethod
    def rope_of(rope: Tensor | None, index: int) -> Tensor | None:
        """Table of block ``index``, of shape (batch or 1, heads or 1, patches, rope_dim)."""
        return None if rope is None else rope[index if rope.shape[0] > 1 else 0]

    def token_rope(self, rope: Tensor | None, index: int) -> Tensor | None:
        """Table of block ``index`` for all tokens, of shape (batch or 1, tokens, heads or 1, rope_dim)."""
        table = self.rope_of(rope, index)
        return None if table is None else timm_blocks.identity_prefix(table, self.prefix).transpose(-3, -2)

    # ---- cost

    def block_flops(self, index: int) -> tuple[int, int]:
        """(a, c): block ``index`` costs ``a * n + c * n**2`` FLOPs on n tokens."""
        return timm_blocks.block_flops(self.vit.blocks[index])

    def blank(self, image_size: tuple[int, int] | None = None) -> Float[Tensor, "1 channels height width"]:
        """A batch of one image of zeros, with the device and data type of the weights. Default size: the model's."""
        size = image_size or self.image_size
        return torch.zeros(1, self.channels, *size, device=self.device, dtype=self.dtype)

    def of(self, module: M) -> M:
        """`skeleton` of another module, to use together with `Backbone.skeleton`."""
        return skeleton(module)

    def skeleton(self) -> Backbone:
        """A copy without weights and attachments, on the meta device, for counting FLOPs. Cached."""
        key = (*self.settings, id(self.vit.head))
        if self._skeleton is None or self._skeleton[0] != key:
            self._skeleton = (key, Backbone(skeleton(self.vit, repeated=self.vit.blocks)))
        return self._skeleton[1]

    def outer_flops(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """FLOPs per image of (embedding, norm + pooling + classifier)."""
        copy = self.skeleton()
        embedding, embedded = counted(copy.embed, copy.blank(image_size or self.image_size))
        classifier, _ = counted(lambda x: copy.classify(copy.norm(x)), embedded.tokens)
        return embedding, classifier

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
    """The `Backbone` of a timm Vision Transformer.

    Raises UnsupportedModelError for models whose patches cannot be dropped exactly.
    """
    if (advice := _advice(vit)) is not None:
        raise UnsupportedModelError(advice)
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
    backbone = Backbone(vit)
    blocks = [original(block) for block in vit.blocks]
    width = None
    if getattr(vit, "rope", None) is not None:
        width = 2 * timm_blocks.head_dim(blocks[0].attn)
    for block in {_blueprint(block): block for block in blocks}.values():
        timm_blocks.check_block(block, backbone.dim, backbone.prefix, width)
    return backbone


def _advice(model: Any) -> str | None:
    """Error text for a model that contains a Vision Transformer or is wrapped already; None for other models."""
    kind = type(model).__name__
    for name, container in _CONTAINERS.items():
        held = getattr(model, "_modules", {}).get(name) if isinstance(model, nn.Module) else None
        if held is not None and kind in container.classes:
            return f"expected a Vision Transformer of timm, got one inside a {kind}: {container.advice}"
    if hasattr(type(model), "unwrap") and kind == "SlimModel":
        return "this model is wrapped already; use set_budget and set_mode, or wrap(model.unwrap(), ...)"
    if not isinstance(model, nn.Module):
        return f"expected a Vision Transformer of timm (an nn.Module), got {type(model).__name__}"
    return None


def _per_block(rope: Tensor, mixed: bool) -> Float[Tensor, "depth_or_1 batch_or_1 heads_or_1 patches rope_dim"]:
    """timm's rotation table(s) in the shape of `Embedded.rope`. With patch dropout each image has its own table."""
    if mixed:  # (depth, heads, patches, E), or (depth, batch, heads, patches, E)
        return rope.unsqueeze(1) if rope.ndim == 4 else rope
    return rope[None] if rope.ndim == 4 else rope[None, None, None]  # (batch, 1, patches, E), or (patches, E)


def _blueprint(block: nn.Module) -> str:
    """Description of a block's structure. Of several blocks with the same description only one is checked."""
    return repr(block)
