"""A Vision Transformer as the parts that the method needs: embed, blocks, norm, classify.

A `Backbone` holds the user's model and calls its modules one by one. The model keeps its modules and its weights. There
is one class for each library: `timm.py`, `transformers.py`, `open_clip.py`. `adapt.py` chooses it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..data import Preprocess
from ..errors import ConfigError, UnsupportedModelError
from ..flop_counter import counted
from .attached import attachments
from .attention import Attend, Projected, identity_prefix
from .gates import GatedWeights
from .skeleton import skeleton

__all__ = [
    "Backbone",
    "Embedded",
    "RunBlocks",
]

M = TypeVar("M", bound=nn.Module)


class Embedded(NamedTuple):
    """Tokens that enter block 0, with the tables of rotary positions, the patch grid and the image size in pixels.

    A rotary table holds the sines, then the cosines: ``rope_dim`` is two head widths.
    """

    tokens: Float[Tensor, "batch tokens dim"]
    rope: Float[Tensor, "depth_or_1 batch_or_1 heads_or_1 patches rope_dim"] | None
    grid: tuple[int, int]
    image_size: tuple[int, int]


class RunBlocks(Protocol):
    """A function that computes all blocks."""

    def __call__(self, embedded: Embedded, all_tokens: bool, taps: dict[int, Tensor]) -> Tensor:
        """Tokens after the last block.

        With ``all_tokens`` in grid order, else without dropped patches. ``taps`` gets the tokens after each block that
        it names, in grid order.
        """


class Backbone(nn.Module):
    """The parts of a Vision Transformer. The model is held, and no setting of it is copied.

    Attributes:
        model: the model that was wrapped. Its weights are changed only by a gated weight delta.
        gated: the gated weight delta of the model's weights; None without one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # Any: its private attributes are used here
        self.training = model.training  # only of this module; the flags of the model's modules stay unchanged
        self.gated: GatedWeights | None = None
        self._skeleton: tuple[tuple, Self] | None = None

    # ---- what the model is

    library: ClassVar[str]
    """The package of the model's library, by the name under which it is installed."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Any]:
        """The transformer blocks."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm after the last block; an nn.Identity for a model without it."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    @abstractmethod
    def dim(self) -> int:
        """Token width."""

    @property
    @abstractmethod
    def prefix(self) -> int:
        """Number of prefix tokens (class, distillation, registers). They precede the patches and are never dropped."""

    @property
    @abstractmethod
    def reads_class(self) -> bool:
        """Whether the output is computed from prefix tokens only. Otherwise it is computed from the patches too."""

    @property
    @abstractmethod
    def pools(self) -> bool:
        """Whether the output is one vector per image. Otherwise it is one per token, in grid order."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes; 0 for a model without a classifier, whose output is an embedding."""

    @property
    def output_name(self) -> Literal["logits", "embedding"]:
        """What `output` gives."""
        return "logits" if self.num_classes else "embedding"

    @property
    @abstractmethod
    def name(self) -> str:
        """The library's name of the architecture; empty if it is not known. For people only."""

    @property
    def multi_label(self) -> bool:
        """Whether an image can be of several classes, so that probabilities are sigmoids of the logits."""
        return False

    @property
    @abstractmethod
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes; empty if the model does not have them."""

    @property
    @abstractmethod
    def preprocess(self) -> Preprocess | None:
        """How a photo becomes the model's input; None if the model does not say it."""

    @property
    @abstractmethod
    def family(self) -> str:
        """Class and special parts of the model, such as 'Eva, RoPE, 5 prefix tokens'. Adapters store this text.

        It is the same text for the same model in another library.
        """

    @property
    @abstractmethod
    def patch_size(self) -> tuple[int, int]:
        """Size (height, width) of a patch in pixels."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Image size (height, width) in pixels that the model is built for."""

    @property
    def trained_size(self) -> tuple[int, int]:
        """Image size (height, width) in pixels of the position embeddings, which are interpolated for `image_size`."""
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid (rows, cols) at `image_size`."""
        return (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])

    @property
    @abstractmethod
    def any_size(self) -> bool:
        """Whether the model takes images of other sizes than `image_size`."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Number of image channels."""

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patch grid (rows, cols) of ``images``."""
        return (images.shape[-2] // self.patch_size[0], images.shape[-1] // self.patch_size[1])

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device that images must be on."""
        return next(self.model.parameters()).device

    @property
    @abstractmethod
    def state_key(self) -> tuple:
        """Settings of the model that can change after it was built and that FLOPs depend on."""

    # ---- attachments

    def containers(self) -> Sequence[tuple[str, nn.Module]]:
        """(name, module) of the modules that are not called themselves, because the method calls the blocks."""
        return [("the model itself", self.model), ("blocks (all of them as one)", self.blocks)]

    def check_attached(self, opened: bool, masked: bool) -> None:
        """Raise UnsupportedModelError for attachments of modules that are not called themselves, only their parts.

        ``opened``: blocks are not called either (adaptive mode). ``masked``: blocks get an attention bias.
        """
        for name, module in self.containers():
            if attached := attachments(module):
                raise UnsupportedModelError(
                    f"{attached} on {name} would have no effect, because patchlife calls the blocks one by one; attach "
                    "it to the wrapped model, or to the modules inside"
                )
        for index in range(self.depth) if opened or masked else ():
            self.check_openable(index, opened)

    @abstractmethod
    def check_openable(self, index: int, opened: bool) -> None:
        """`check_attached` for block ``index``, which gets a bias, and with ``opened`` is not called itself."""

    # ---- the parts of a forward pass

    @abstractmethod
    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Embedded:
        """Patch tokens with positions, after the prefix tokens.

        Raises ConfigError if ``images`` is not a batch of an image size and channels that the model takes.
        """

    def present_grid(self, tokens: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]) -> tuple[int, int]:
        """``grid`` (rows, cols); one row if patch dropout in training left random patches, which have no grid."""
        present = tokens.shape[1] - self.prefix
        return grid if grid[0] * grid[1] == present else (1, present)

    @abstractmethod
    def block(self, index: int, x: Tensor, rope: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The output of block ``index`` for tokens ``x``, with gradient checkpointing if the model uses it.

        ``rope``: table of this block, see `rope_of`. ``bias`` (batch or 1, heads or 1, queries or 1, keys) is added to
        the attention logits.
        """

    @abstractmethod
    def block_with(self, index: int, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
        """The output of block ``index`` with ``attend`` as its attention; ``rope`` comes from `token_rope`."""

    @abstractmethod
    def project(self, index: int, x: Tensor, rope: Tensor | None = None) -> Projected:
        """Queries, keys and values of block ``index`` for tokens ``x``; ``rope`` comes from `token_rope`."""

    @abstractmethod
    def class_row(self, index: int, x: Tensor, rope: Tensor | None = None) -> Float[Tensor, "batch heads tokens"]:
        """The class token's attention logits in block ``index``."""

    def norm(self, x: Tensor) -> Tensor:
        """The norm after the last block."""
        return self.final_norm(x)

    @abstractmethod
    def classify(self, x: Tensor) -> Tensor:
        """Logits, or the embedding, from the normalised tokens (patches in any order)."""

    def pooled(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch width"]:
        """The embedding, from the normalised tokens (patches in any order): the vector that the classifier reads.

        For a model without a classifier it is `classify`.
        """
        return self.classify(x)

    def output(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Logits, or the embedding, of the dense model."""
        embedded = self.embed(images)
        x = embedded.tokens
        for index in range(self.depth):
            x = self.block(index, x, self.rope_of(embedded.rope, index))
        return self.classify(self.norm(x))

    # ---- the library's own methods

    own_methods: ClassVar[tuple[str, ...]] = ()
    """Methods of the model that `call` runs with other blocks, such as ``forward``.

    Empty for models that take images and give a tensor: `output` says what they compute.
    """

    def call(self, method: str, run: RunBlocks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``method`` of the model gives for these arguments when ``run`` computes the blocks."""
        raise NotImplementedError

    def image_size_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """Size (height, width) of the images among the arguments of these methods."""
        raise NotImplementedError

    # ---- rotary positions

    @staticmethod
    def rope_of(rope: Tensor | None, index: int) -> Tensor | None:
        """Table of block ``index``, of shape (batch or 1, heads or 1, patches, rope_dim)."""
        return None if rope is None else rope[index if rope.shape[0] > 1 else 0]

    def token_rope(self, rope: Tensor | None, index: int) -> Tensor | None:
        """Table of block ``index`` for all tokens, of shape (batch or 1, tokens, heads or 1, rope_dim)."""
        table = self.rope_of(rope, index)
        return None if table is None else identity_prefix(table, self.prefix).transpose(-3, -2)

    # ---- cost

    @abstractmethod
    def block_flops(self, index: int) -> tuple[int, int]:
        """(a, c): block ``index`` costs ``a * n + c * n**2`` FLOPs on n tokens."""

    def blank(self, image_size: tuple[int, int] | None = None) -> Float[Tensor, "1 channels height width"]:
        """A batch of one image of zeros, with the device and data type of the weights. Default size: the model's."""
        size = image_size or self.image_size
        return torch.zeros(1, self.channels, *size, device=self.device, dtype=self.dtype)

    def of(self, module: M) -> M:
        """`skeleton` of another module, to use together with `Backbone.skeleton`."""
        return skeleton(module)

    def skeleton(self) -> Self:
        """A copy without weights and attachments, on the meta device, for counting FLOPs. Cached."""
        if self._skeleton is None or self._skeleton[0] != self.state_key:
            self._skeleton = (self.state_key, type(self)(skeleton(self.model, repeated=self.blocks)))
        return self._skeleton[1]

    def outer_flops(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """FLOPs per image of (embedding, norm + pooling + classifier)."""
        copy = self.skeleton()
        embedding, embedded = counted(copy.embed, copy.blank(image_size or self.image_size))
        classifier, _ = counted(lambda x: copy.classify(copy.norm(x)), embedded.tokens)
        return embedding, classifier

    # ---- weights

    @abstractmethod
    def shared_names(self, weights: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The model's weights under the names that all libraries share, which are timm's.

        Args:
            weights: by the names of this library.

        Returns:
            The parts of each weight: tensors that form it when they are concatenated along their first dimension.
            They are views, so writing into them writes into ``weights``.
        """

    @abstractmethod
    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier, with random weights. Raises UnsupportedModelError for models without one."""

    # ---- errors

    def check_batch(self, images: Tensor) -> None:
        """Raise ConfigError unless ``images`` is a batch of images with the model's channels."""
        if not isinstance(images, Tensor):
            raise ConfigError(
                f"images must be a tensor (batch, channels, height, width), got {type(images).__name__}; only output, "
                "predict, embedding and lives of a slimmed model take lists of images"
            )
        if images.ndim != 4:
            raise ConfigError(f"images must be (batch, channels, height, width), got shape {tuple(images.shape)}")
        if images.shape[1] != self.channels:
            raise ConfigError(f"this model takes images of {self.channels} channel(s), got {images.shape[1]}")
