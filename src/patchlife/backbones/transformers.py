"""transformers' Vision Transformers as a `Backbone`.

A model of transformers is a core, such as ``ViTModel``, or a core inside a model with a classifier or a projection. Its
own ``forward`` runs with other modules in the places of its layers (`substitution.py`), so outputs, losses and hidden
states are the library's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..data import Preprocess
from ..errors import ConfigError, UnsupportedModelError
from . import transformers_layers as layers
from .attached import original
from .backbone import Attend, Backbone, Embedded, Projected, RunBlocks
from .substitution import slots, view

__all__ = ["SUPPORTED", "TransformersBackbone", "adapt"]

Pairs = tuple[int, int]
Names = tuple[tuple[str, str], ...]
"""(regular expression, replacement) pairs that turn a name of transformers into timm's."""


@dataclass(frozen=True)
class Core:
    """A class of core models.

    Attributes:
        layers, norm: names of the list of layers and of the norm after them.
        pool: from the core and its normalised tokens (batch, tokens, dim) to an embedding (batch, dim).
        names: from names of weights to timm's.
        kind: timm's class of the same models.
        prefix: names of the embeddings' prefix tokens.
    """

    layers: str
    norm: str
    pool: Callable[[Any, Tensor], Tensor]
    names: Names
    kind: str = "VisionTransformer"
    reads_class: bool = True


@dataclass(frozen=True)
class Head:
    """A class of models with a core inside.

    Attributes:
        core: name of the core.
        output: from the model and the core's normalised tokens to logits or an embedding.
        reads_class: whether ``output`` reads prefix tokens only.
        pool: timm's name of the pooling.
        normed: whether the core's final norm is applied before ``output``.
        classifiers: names of the classifiers.
    """

    core: str
    output: Callable[[Any, Any, Tensor], Tensor]
    reads_class: bool = True
    pool: str = "avg"
    normed: bool = True
    classifiers: tuple[str, ...] = ("classifier",)


# ---- the models

_LAYER_NAMES: Names = (  # after the names of lists of layers were replaced by "blocks"
    (r"(layernorm_before|layer_norm1)", "norm1"),
    (r"(layernorm_after|layer_norm2)", "norm2"),
    (r"^(blocks\.\d+)\.(attention|self_attn)\.", r"\1.attn."),
    (r"attn\.(q|k|v)_proj\.", r"attn.qkv."),
    (r"attn\.(o_proj|out_proj)\.", "attn.proj."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"mlp\.(gate_proj|up_proj)\.", "mlp.fc1."),
    (r"mlp\.down_proj\.", "mlp.fc2."),
    (r"^embeddings\.patch_embeddings?(\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj_"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
_UNUSED = re.compile(r"(^|\.)mask_token$")  # read only where patches are masked, in pre-training
_HEAD_NAMES = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}
_HEAD_NAMES["visual_projection"] = "head"


def _first(_: Any, x: Tensor) -> Tensor:
    return x[:, 0]


def _vit_pooler(core: Any, x: Tensor) -> Tensor:
    return x[:, 0] if getattr(core, "pooler", None) is None else core.pooler(x)


def _siglip_head(core: Any, x: Tensor) -> Tensor:
    return core.head(x) if core.use_head else x.mean(dim=1)


_VIT = Core("layers", "layernorm", _vit_pooler, (("^layers", "blocks"), *_LAYER_NAMES))
_DINOV2 = Core("encoder.layer", "layernorm", _first, ((r"^encoder\.layer", "blocks"), *_LAYER_NAMES))
_DINOV3 = Core("model.layer", "norm", _first, ((r"^model\.layer", "blocks"), *_LAYER_NAMES), kind="Eva")
_ENCODER: Names = ((r"^encoder\.layers", "blocks"), *_LAYER_NAMES)
CORES = {
    "ViTModel": _VIT,
    "DeiTModel": _VIT,
    "ViTMAEModel": _VIT,
    "Dinov2Model": _DINOV2,
    "Dinov2Backbone": _DINOV2,
    "Dinov2WithRegistersModel": _DINOV2,
    "Dinov2WithRegistersBackbone": _DINOV2,
    "DINOv3ViTModel": _DINOV3,
    "DINOv3ViTBackbone": _DINOV3,
    "CLIPVisionModel": Core("encoder.layers", "post_layernorm", _first, _ENCODER),
    "SiglipVisionModel": Core("encoder.layers", "post_layernorm", _siglip_head, _ENCODER, reads_class=False),
}
"""By the name of the class."""


def _class_logits(model: Any, _: Any, x: Tensor) -> Tensor:
    return model.classifier(x[:, 0])


def _teacher_logits(model: Any, _: Any, x: Tensor) -> Tensor:
    return (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2


def _dinov2_logits(model: Any, core: Any, x: Tensor) -> Tensor:
    patches = x[:, 1 + getattr(core.config, "num_register_tokens", 0) :]
    return model.classifier(torch.cat((x[:, 0], patches.mean(dim=1)), dim=1))


def _mean_logits(model: Any, core: Any, x: Tensor) -> Tensor:
    return model.classifier(x[:, _prefix(core) :].mean(dim=1))


def _projection(model: Any, _: Any, x: Tensor) -> Tensor:
    return model.visual_projection(x[:, 0])


HEADS = {
    "ViTForImageClassification": Head("vit", _class_logits),
    "DeiTForImageClassification": Head("deit", _class_logits),
    "DeiTForImageClassificationWithTeacher": Head(
        "deit", _teacher_logits, classifiers=("cls_classifier", "distillation_classifier")
    ),
    "Dinov2ForImageClassification": Head("dinov2", _dinov2_logits, reads_class=False, pool="class and avg"),
    "Dinov2WithRegistersForImageClassification": Head(
        "dinov2_with_registers", _dinov2_logits, reads_class=False, pool="class and avg"
    ),
    "CLIPVisionModelWithProjection": Head("vision_model", _projection, classifiers=()),
    "CLIPForImageClassification": Head("vision_model", _mean_logits, reads_class=False, normed=False),
    "SiglipForImageClassification": Head("vision_model", _mean_logits, reads_class=False),
}
"""By the name of the class."""

SUPPORTED = ", ".join((*CORES, *HEADS))

_REFUSED = {  # by the beginning of the name of the class
    "Beit": "its relative position bias belongs to the full grid of patches",
    "Data2VecVision": "its relative position bias belongs to the full grid of patches",
    "Swin": "its blocks attend in windows of a full grid and merge patches between stages",
    "Hiera": "its blocks attend in windows and pool between stages",
    "Pvt": "its blocks shrink keys by convolutions over a full grid",
    "ConvNext": "it is a convolutional network without tokens",
    "DINOv3ConvNext": "it is a convolutional network without tokens",
    "ResNet": "it is a convolutional network without tokens",
    "Siglip2": "NaFlex batches are padded, with a mask and a size per image; use a SigLIP 2 checkpoint of a fixed size "
    "(model type siglip)",
    "Qwen": "its blocks attend in windows over patches of several images",
    "Glm": "its blocks attend over patches of several images",
    "Pixtral": "its batches are packed, with a mask per image",
    "VitDet": "its blocks attend in windows of a full grid",
    "Sam": "its blocks attend in windows of a full grid, with relative positions",
    "ViTMAEForPreTraining": "its decoder needs every patch; wrap the encoder: model.vit = patchlife.wrap(model.vit)",
}


def _prefix(core: Any) -> int:
    """Number of prefix tokens."""
    tokens = ("cls_token", "class_embedding", "distillation_token")
    single = sum(getattr(core.embeddings, name, None) is not None for name in tokens)
    registers = getattr(core.embeddings, "register_tokens", None)
    return single + (0 if registers is None else registers.shape[1])


class TransformersBackbone(Backbone):
    """The parts of a model of transformers."""

    library = "transformers"
    own_forward = True

    @property
    def _head(self) -> Head | None:
        return HEADS.get(_class_of(self.model, HEADS))

    @property
    def _kind(self) -> Core:
        return CORES[_class_of(self.core, CORES)]

    @property
    def core(self) -> Any:
        """The core model: the model itself, or one inside it."""
        return self.model if self._head is None else getattr(self.model, self._head.core)

    @property
    def _path(self) -> str:
        """Name of the list of layers."""
        return self._kind.layers if self._head is None else f"{self._head.core}.{self._kind.layers}"

    @property
    def blocks(self) -> Sequence[Any]:
        """The layers."""
        return attrgetter(self._kind.layers)(self.core)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        if self._head is not None and not self._head.normed:
            return nn.Identity()
        return getattr(self.core, self._kind.norm)

    @property
    def dim(self) -> int:
        """Token width."""
        return self.core.config.hidden_size

    @property
    def prefix(self) -> int:
        """Number of prefix tokens."""
        return _prefix(self.core)

    @property
    def reads_class(self) -> bool:
        """Whether the output is computed from prefix tokens only."""
        return (self._head or self._kind).reads_class

    @property
    def pools(self) -> bool:
        """True: the output is one vector per image."""
        return True

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a model without a classifier."""
        return 0 if self._head is None or not self._head.classifiers else self.model.num_labels

    @property
    def name(self) -> str:
        """Name of the hub or folder that the model came from, else the class."""
        return getattr(self.model, "name_or_path", "") or type(self.model).__name__

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes in the model's settings."""
        names = self.model.config.id2label if self.num_classes else {}
        found = tuple(str(names[index]) for index in sorted(names))
        return () if all(re.fullmatch(r"LABEL_\d+", name) for name in found) else found

    @property
    def preprocess(self) -> Preprocess | None:
        """None: it is in the files of the image processor, not in the model."""
        return None

    @property
    def family(self) -> str:
        """Class and special parts of the model, in timm's words."""
        distilled = type(self.model).__name__.startswith("DeiT") and self._kind.kind == "VisionTransformer"
        parts = [f"{self._kind.kind}Distilled" if distilled else self._kind.kind]
        parts += ["RoPE"] if self._rotary else []
        parts += [f"{self.prefix} prefix tokens"] if self.prefix else ["no class token"]
        pool = self._head.pool if self._head is not None else "map"
        parts += ["reads the class token"] if self.reads_class else [f"pools patches ({pool})"]
        return ", ".join(parts)

    @property
    def patch_size(self) -> Pairs:
        """Size (height, width) of a patch in pixels."""
        return _pair(self.core.config.patch_size)

    @property
    def image_size(self) -> Pairs:
        """Image size (height, width) in pixels that the model is built for."""
        return _pair(self.core.config.image_size)

    @property
    def any_size(self) -> bool:
        """True: positions are interpolated, or rotary."""
        return True

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return self.core.config.num_channels

    @property
    def state_key(self) -> tuple:
        """Settings of the model that can change after it was built and that FLOPs depend on."""
        heads = [id(getattr(self.model, name)) for name in (self._head.classifiers if self._head else ())]
        return (self.num_classes, self.image_size, self.patch_size, self.depth, *heads)

    @property
    def _rotary(self) -> bool:
        return hasattr(self.core, "rope_embeddings")

    # ---- attachments

    def containers(self) -> Sequence[tuple[str, nn.Module]]:
        """The model, and the modules on the way to its layers."""
        paths = _prefixes(self._path)
        return [("the model itself", self.model), *((path, self.model.get_submodule(path)) for path in paths)]

    def check_openable(self, index: int, opened: bool) -> None:
        """As in `Backbone`. Layers that are called as modules take a bias without further conditions."""
        if opened:
            layers.check_openable(self.blocks[index], index)

    def check_attached(self, opened: bool, masked: bool) -> None:
        """As in `Backbone`; also refuses attention implementations that are not supported."""
        super().check_attached(opened, masked)
        _check_attention(self.core)
        for name, module in self.containers():
            if "_hf_hook" in module.__dict__:
                raise UnsupportedModelError(
                    f"{name} is dispatched over devices by accelerate; load the model on one device (without "
                    "device_map) and wrap it there"
                )

    # ---- the parts of a forward pass

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Embedded:
        """Patch tokens with positions, after the prefix tokens; positions are interpolated for other image sizes."""
        self.check_batch(images)
        size, core = (images.shape[-2], images.shape[-1]), self.core
        if size[0] % self.patch_size[0] or size[1] % self.patch_size[1]:
            raise ConfigError(
                f"images of {size[0]} x {size[1]} pixels cannot be cut into patches of {self.patch_size[0]} x "
                f"{self.patch_size[1]}; resize them"
            )
        images = images.to(self.dtype)
        arguments: dict[str, Any] = {}
        if size != self.image_size and not (self._rotary or type(core).__name__.startswith("Dinov2")):
            arguments["interpolate_pos_encoding"] = True
        if "MAE" in type(core).__name__:  # noise in rising order: patches stay in grid order
            count = (size[0] // self.patch_size[0]) * (size[1] // self.patch_size[1])
            arguments["noise"] = torch.arange(count, device=images.device, dtype=torch.float32)[None].expand(
                images.shape[0], -1
            )
        tokens = core.embeddings(images, **arguments)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        if hasattr(core, "pre_layrnorm"):
            tokens = core.pre_layrnorm(tokens)
        rope = _table(*core.rope_embeddings(images)) if self._rotary else None
        return Embedded(tokens, rope, self._grid(tokens, size), size)

    def _grid(self, tokens: Tensor, size: Pairs) -> Pairs:
        rows, cols = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
        present = tokens.shape[1] - self.prefix
        return (rows, cols) if rows * cols == present else (1, present)

    def block(self, index: int, x: Tensor, rope: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The output of layer ``index``. Gradient checkpointing is part of the layers."""
        return _call(self.blocks[index], x, rope, bias)

    def block_with(self, index: int, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
        """The output of layer ``index`` with ``attend`` as its attention."""
        return layers.run_layer(original(self.blocks[index]), x, attend, rope)

    def project(self, index: int, x: Tensor, rope: Tensor | None = None) -> Projected:
        """Queries, keys and values of layer ``index``."""
        return layers.project(self.blocks[index], x, rope)

    def class_row(self, index: int, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """The class token's attention logits in layer ``index``."""
        return layers.class_row(self.blocks[index], x, rope)

    def classify(self, x: Tensor) -> Tensor:
        """Logits, or the embedding, from the normalised tokens."""
        if self._head is not None:
            return self._head.output(self.model, self.core, x)
        return self._kind.pool(self.core, x)

    # ---- transformers' own forward

    def call(self, run: RunBlocks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's outputs when ``run`` computes its layers."""
        size = self.image_size_in(args, kwargs)

        def run_all(tokens: Tensor, *layer_args: Any, **layer_kwargs: Any) -> Mapping[int, Tensor]:
            return self._run_slots(run, size, tokens, layer_args, layer_kwargs)

        kind = type(original(self.blocks[0]))
        path = self._path
        model = view(self.model, path, slots(kind, self.depth, run_all))
        for module in (model, *(model.get_submodule(name) for name in _prefixes(path))):
            vars(module).pop("_output_capturing_hooks_installed", None)  # the model's layers have them, not the slots
        return model(*args, **kwargs)

    def _run_slots(
        self, run: RunBlocks, size: Pairs, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Mapping[int, Tensor]:
        """What the layers give for the arguments of the first one: the last output, and requested hidden states."""
        mask = args[0] if args else kwargs.get("attention_mask")
        if mask is not None:
            raise ConfigError("a slimmed model takes no attention_mask; call it without, or use model.unwrap()")
        positions = kwargs.get("position_embeddings")
        rope = None if positions is None else _table(*positions)
        with _recording() as recorded:
            if "attentions" in recorded:
                raise ConfigError(
                    "attention maps of a slimmed model differ in size from layer to layer; call it without "
                    "output_attentions, with set_budget(1.0), or use model.unwrap()"
                )
            chosen = recorded.get("_hidden_states_layers")
            wanted = range(self.depth) if "hidden_states" in recorded else ()
            taps = dict.fromkeys([i for i in wanted if chosen is None or i + 1 in chosen], tokens)
            all_tokens = bool(taps) or self._head is None or not self.reads_class
            taps.pop(self.depth - 1, None)
            embedded = Embedded(tokens, rope, self._grid(tokens, size), size)
            last = run(embedded, all_tokens, taps)  # fills in taps
            return {**taps, self.depth - 1: last}

    def image_size_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pairs:
        """Size (height, width) of ``pixel_values``. Raises ConfigError without them."""
        images = kwargs.get("pixel_values", args[0] if args else None)
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = "nothing" if images is None else getattr(images, "shape", type(images).__name__)
            raise ConfigError(f"expected pixel_values (batch, channels, height, width), got {got}")
        return (images.shape[-2], images.shape[-1])

    def block_flops(self, index: int) -> tuple[int, int]:
        """(a, c): layer ``index`` costs ``a * n + c * n**2`` FLOPs on n tokens."""
        return layers.layer_flops(self.blocks[index])

    # ---- weights

    def shared_names(self, weights: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The weights under timm's names; q, k and v are parts of one weight, as are the halves of a gated MLP."""
        core = f"{self._head.core}." if self._head is not None else ""
        found: dict[str, dict[str, Any]] = {}
        for name, weight in weights.items():
            if _UNUSED.search(name):
                continue
            head = "" if core and name.startswith(core) else _HEAD_NAMES.get(name.partition(".")[0], "")
            if head and core:
                found.setdefault(f"{head}.{name.partition('.')[2]}", {})[name] = weight
                continue
            shared = name.removeprefix(core)
            for pattern, replacement in self._kind.names:
                shared = re.sub(pattern, replacement, shared)
            found.setdefault(shared, {})[name] = _shaped(shared, weight)
        return {name: [parts[own] for own in sorted(parts, key=_part)] for name, parts in found.items()}

    def reset_classifier(self, num_classes: int) -> None:
        """New classifiers with random weights. Raises UnsupportedModelError for models without one."""
        if self._head is None or not self._head.classifiers:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no classifier that could be replaced")
        for name in self._head.classifiers:
            old = getattr(self.model, name)
            new = nn.Linear(old.in_features, num_classes).to(next(self.model.parameters()))
            setattr(self.model, name, new)
        self.model.config.num_labels = self.model.num_labels = num_classes


def adapt(model: Any) -> TransformersBackbone:
    """The `Backbone` of a model of transformers.

    Raises UnsupportedModelError, with the reason, for models whose patches cannot be dropped exactly.
    """
    name = type(model).__name__
    known = _class_of(model, CORES) or _class_of(model, HEADS)
    reasons = [reason for start, reason in _REFUSED.items() if name.startswith(start)]
    if not known or reasons:
        reason = reasons[0] if reasons else "its forward pass is not known to patchlife"
        raise UnsupportedModelError(
            f"patches of transformers' {name} cannot be dropped: {reason}. Supported of transformers: {SUPPORTED}"
        )
    defined: Any = next(kind for kind in type(model).__mro__ if kind.__name__ == known)
    if type(model).forward is not defined.forward or "forward" in vars(model):
        raise UnsupportedModelError(f"{name} replaces forward of transformers' {known}, so what it computes is unknown")
    backbone = TransformersBackbone(model)
    core = backbone.core
    if getattr(core.config, "mask_ratio", 0) and "MAE" in type(core).__name__:
        raise UnsupportedModelError(
            f"{name} masks {core.config.mask_ratio:.0%} of the patches at random; to use it as an encoder set "
            "model.config.mask_ratio = 0.0 first"
        )
    _check_attention(core)
    kinds = {type(original(layer)).__name__ for layer in backbone.blocks}
    if unknown := kinds - layers.LAYERS.keys():
        raise UnsupportedModelError(f"expected layers of {', '.join(layers.LAYERS)}, got {', '.join(sorted(unknown))}")
    layer = original(backbone.blocks[0])
    layers.check_layer(layer, backbone.dim, backbone.prefix, backbone._rotary, _call)
    return backbone


def _prefixes(path: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    names = path.split(".")
    return [".".join(names[: count + 1]) for count in range(len(names))]


def _class_of(model: Any, known: Mapping[str, Any]) -> str:
    """Name of the class of transformers that ``model`` is an instance of, if it is a known one; else empty."""
    return next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in known), "")


def _check_attention(core: Any) -> None:
    implementation = core.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} is not supported; call model.set_attn_implementation('sdpa')"
        )


def _call(layer: Any, x: Tensor, rope: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """The output of ``layer`` for tokens ``x``; ``rope`` (batch or 1, heads or 1, patches, 2 * head_dim)."""
    if rope is None:
        return layer(x, bias)
    sin, cos = rope.chunk(2, dim=-1)
    return layer(x, attention_mask=bias, position_embeddings=(cos, sin))


def _table(cos: Tensor, sin: Tensor) -> Tensor:
    """`Embedded.rope` from transformers' tables (patches, head_dim)."""
    return torch.cat((sin, cos), dim=-1)[None, None, None]


def _pair(value: Any) -> Pairs:
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return (height, width)


def _shaped(name: str, weight: Any) -> Any:
    """A weight in timm's shape: a table of positions and a class token have a batch dimension there."""
    if isinstance(weight, Tensor):
        if name == "pos_embed" and weight.ndim == 2:
            return weight[None]
        if name == "cls_token" and weight.ndim == 1:
            return weight[None, None]
    return weight


def _part(name: str) -> int:
    """Place of a part in its weight, by the part's name in transformers."""
    order = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return next((place for place, part in enumerate(order) if f".{part}." in name), 0)


class _recording:
    """Within it transformers records no outputs of layers; gives what it was recording, by name."""

    def __enter__(self) -> dict[str, Any]:
        from transformers.utils.output_capturing import _active_collector

        self.collector = _active_collector
        recorded = _active_collector.get()
        self.token = _active_collector.set(None) if recorded else None
        return recorded or {}

    def __exit__(self, *_: object) -> None:
        if self.token is not None:
            self.collector.reset(self.token)
