"""transformers' Vision Transformers as a `Backbone`.

A model of transformers is a core, such as ``ViTModel``, or a core inside a model with a classifier or a projection. Its
own ``forward`` runs with other modules in the places of its layers (`substitution.py`), so outputs, losses and hidden
states are the library's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from ..flop_counter import counted
from . import transformers_layers as layers
from .attached import original
from .attention import Attend, Projected
from .backbone import Embedded, RunBlocks
from .substitution import RunOnce, Slots, is_current, slots, view
from .transformers_checks import (
    check_all_present,
    check_attention,
    check_class,
    check_countable,
    check_images,
    check_not_dispatched,
    check_one_device,
)
from .transformers_description import Description
from .transformers_models import SUPPORTED, class_name
from .transformers_recording import not_recording, recordable, recorded_layers

__all__ = ["SUPPORTED", "TransformersBackbone", "adapt"]

Pairs = tuple[int, int]

_NO_MASK = "a slimmed model takes no attention_mask; call it without, or use model.unwrap()"

_MARKS = frozenset({"_output_capturing_hooks_installed"})
"""Attributes that mark a model of transformers whose layers have hooks; `slots` do not have them."""


class TransformersBackbone(Description):
    """The parts of a model of transformers."""

    library = "transformers"
    own_methods = ("forward",)

    _traced: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._slots = Slots()
        self.__dict__["_traced"] = None  # not a child module: it shares the model's modules

    def __getstate__(self) -> dict[str, Any]:
        """Without the view for graphs: its layers are of a class that cannot be pickled."""
        return self.__dict__ | {"_traced": None, "_slots": Slots()}

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
        check_attention(self.core)
        check_not_dispatched(self.containers())
        if self._traced is None or not is_current(self._traced, self.model, self._path, _MARKS):
            self.__dict__["_traced"] = recordable(self._view(None, self._slots))

    # ---- the parts of a forward pass

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Embedded:
        """Patch tokens with positions, after the prefix tokens; positions are interpolated for other image sizes."""
        self.check_batch(images)
        size, core = (images.shape[-2], images.shape[-1]), self.core
        images = images.to(self.dtype)
        batch = images.shape[0]  # len() is not traced by torch.export: the batch would be fixed
        arguments: dict[str, Any] = {}
        if self._kind.masked:  # positions depend on it
            arguments["patch_attention_mask"] = images.new_ones(batch, *self.grid_of(images), dtype=torch.bool)
        elif size != self.trained_size and not self._kind.any_size:
            arguments["interpolate_pos_encoding"] = True
        if self._core_class == "ViTMAEModel":  # noise in rising order: patches stay in grid order
            rows, cols = self.grid_of(images)
            noise = torch.arange(rows * cols, device=images.device, dtype=torch.float32)
            arguments["noise"] = noise.expand(batch, -1)
        tokens = core.embeddings(images, **arguments)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        if hasattr(core, "pre_layrnorm"):
            tokens = core.pre_layrnorm(tokens)
        rope = layers.rotary_table(*core.rope_embeddings(images)) if self._rotary else None
        return Embedded(tokens, rope, self._grid(tokens, size), size)

    def _grid(self, tokens: Tensor, size: Pairs) -> Pairs:
        rows, cols = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
        return self.present_grid(tokens, (rows, cols))

    def check_batch(self, images: Tensor) -> None:
        """As in `Backbone`; also checks the size of the images and that the weights are loaded."""
        super().check_batch(images)
        check_images(self, images)

    def block(self, index: int, x: Tensor, rope: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The output of layer ``index``. Gradient checkpointing is part of the layers."""
        return layers.call_layer(self.blocks[index], x, rope, bias)

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

    def pooled(self, x: Tensor) -> Tensor:
        """The vector that the classifier reads; with two classifiers, the mean of the two vectors."""
        if self._head is not None and self._head.classifiers:
            return self._head.pooled(self.core, x)
        return self.classify(x)

    # ---- transformers' own forward

    def call(self, method: str, run: RunBlocks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's outputs when ``run`` computes its layers."""
        size = self.image_size_in(args, kwargs)
        if self._kind.masked:
            check_all_present(kwargs.get("patch_attention_mask", args[1] if len(args) > 1 else None))

        if torch.compiler.is_exporting():  # the library makes a mask then, also where none is given
            _check_no_mask(self.model, args, kwargs)

        def run_all(tokens: Tensor, *layer_args: Any, **layer_kwargs: Any) -> Mapping[int, Tensor]:
            return self._run_slots(run, size, tokens, layer_args, layer_kwargs)

        if not torch.compiler.is_dynamo_compiling():  # is_compiling is true in all threads while one exports
            return self._view(run_all, Slots())(*args, **kwargs)
        if self._traced is None:
            raise ConfigError("a copy of a slimmed model must be called once before torch.compile")
        self._slots.run = run_all  # a graph cannot make modules, so it has a view that was made before
        outputs = self._traced(*args, **kwargs)
        self._slots.run, self._slots.outputs = None, {}
        return outputs

    def _view(self, run: RunOnce | None, state: Slots) -> Any:
        """The model with `slots` in the places of its layers."""
        path = self._path
        model = view(self.model, path, slots(layers.class_of(self.blocks[0]), self.depth, run, state))
        for module in (model, *(model.get_submodule(name) for name in _prefixes(path))):
            for name in _MARKS:
                vars(module).pop(name, None)
        return model

    def _run_slots(
        self, run: RunBlocks, size: Pairs, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Mapping[int, Tensor]:
        """What the layers give for the arguments of the first one: the last output, and requested hidden states."""
        mask = args[0] if args else kwargs.get("attention_mask")
        by_library = self._kind.masked or torch.compiler.is_exporting()  # it hides nothing then: `call` checked that
        if mask is not None and not by_library:
            raise ConfigError(_NO_MASK)
        positions = kwargs.get("position_embeddings")
        rope = None if positions is None else layers.rotary_table(*positions)
        embedded = Embedded(tokens, rope, self._grid(tokens, size), size)
        with not_recording() as recorded:
            taps = dict.fromkeys(recorded_layers(recorded, self.depth), tokens)
            all_tokens = bool(taps) or self._gives_tokens or not self.reads_class
            taps.pop(self.depth - 1, None)
            last = run(embedded, all_tokens, taps)  # fills in taps
            return {**taps, self.depth - 1: last}

    @property
    def _gives_tokens(self) -> bool:
        """Whether the model's outputs contain the tokens."""
        return self._head is None or self._head.gives_tokens

    def image_size_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pairs:
        """Size (height, width) of ``pixel_values``. Raises ConfigError without them, or if they do not fit."""
        images = kwargs.get("pixel_values", args[0] if args else None)
        if not isinstance(images, Tensor):
            got = "nothing" if images is None else type(images).__name__
            advice = "; for a list of images call output(images) or predict(images)" if got in ("list", "tuple") else ""
            raise ConfigError(f"expected pixel_values (batch, channels, height, width), got {got}{advice}")
        self.check_batch(images)
        return (images.shape[-2], images.shape[-1])

    def outer_flops(self, image_size: Pairs | None = None) -> Pairs:
        """As in `Backbone`, with the core's pooling where transformers computes it and does not use the result."""
        embedding, classifier = super().outer_flops(image_size)
        if self._head is not None and self._head.pools_unread:
            copy = self.skeleton()
            tokens = copy.embed(copy.blank(image_size)).tokens
            classifier += counted(lambda x: copy._kind.pool(copy.core, x), tokens)[0]
        return embedding, classifier

    def block_flops(self, index: int) -> tuple[int, int]:
        """(a, c): layer ``index`` costs ``a * n + c * n**2`` FLOPs on n tokens."""
        return layers.layer_flops(self.blocks[index])


def adapt(model: Any) -> TransformersBackbone:
    """The `Backbone` of a model of transformers.

    Raises UnsupportedModelError, with the reason, for models whose patches cannot be dropped exactly.
    """
    check_class(model)
    backbone = TransformersBackbone(model)
    check_not_dispatched(backbone.containers())
    check_one_device(model)
    check_attention(backbone.core)
    if backbone._kind.masked:
        check_countable(backbone)
    ratio = getattr(backbone.core.config, "mask_ratio", 0)
    if ratio and backbone._core_class == "ViTMAEModel":
        raise UnsupportedModelError(
            f"{type(model).__name__} masks {ratio:.0%} of the patches at random; to use it as an encoder set "
            "model.config.mask_ratio = 0.0 first"
        )
    for kind, layer in {type(original(layer)): layer for layer in backbone.blocks}.items():
        if not class_name(original(layer), layers.LAYERS):
            raise UnsupportedModelError(f"expected layers of {', '.join(layers.LAYERS)}, got {kind.__name__}")
        layers.check_layer(original(layer), backbone.dim, backbone.prefix, backbone._rotary)
    return backbone


def _check_no_mask(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ConfigError if ``attention_mask`` is among the arguments of ``model``."""
    if inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments.get("attention_mask") is not None:
        raise ConfigError(_NO_MASK)


def _prefixes(path: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    names = path.split(".")
    return [".".join(names[: count + 1]) for count in range(len(names))]
