"""What a model of transformers is: its sizes, classes and weights, in the words that all libraries share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import nn

from ..data import Preprocess
from ..errors import UnsupportedModelError
from .backbone import Backbone
from .transformers_models import CORES, HEADS, class_name, prefix_tokens
from .transformers_names import shared_names

__all__ = ["Description"]

Pairs = tuple[int, int]
_SEQUENCES = (list, tuple)  # not list | tuple: torch.compile of torch 2.9 cannot trace it

_IMAGE_SIZE = "patchlife_image_size"  # attribute of a model: copies of the model and new backbones have it too


class Description(Backbone):
    """What a model of transformers is; `TransformersBackbone` adds how its parts run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._head = HEADS.get(class_name(model, HEADS))
        self._core_class = class_name(self.core, CORES)
        self._kind = CORES[self._core_class]

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
        return prefix_tokens(self.core)

    @property
    def reads_class(self) -> bool:
        """Whether the output is computed from prefix tokens only."""
        return (self._head or self._kind).reads_class

    @property
    def pools(self) -> bool:
        """Whether the output is one vector per image. Otherwise it is the tokens, in grid order."""
        return self._head is not None or self._kind.pools

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a model without a classifier."""
        return 0 if self._head is None or not self._head.classifiers else self.model.num_labels

    @property
    def name(self) -> str:
        """Name of the hub or folder that the model came from, else the class."""
        return getattr(self.model, "name_or_path", "") or type(self.model).__name__

    @property
    def multi_label(self) -> bool:
        """Whether the model was trained for several classes per image."""
        return getattr(self.model.config, "problem_type", None) == "multi_label_classification"

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
        parts = [f"{self._kind.kind}Distilled" if self._core_class == "DeiTModel" else self._kind.kind]
        parts += ["RoPE"] if self._rotary else []
        parts += [f"{self.prefix} prefix tokens"] if self.prefix else ["no class token"]
        pool = self._head.pool if self._head is not None else "map" if self.pools else "none"
        parts += ["reads the class token"] if self.reads_class else [f"pools patches ({pool})"]
        return ", ".join(parts)

    @property
    def patch_size(self) -> Pairs:
        """Size (height, width) of a patch in pixels."""
        return _pair(self.core.config.patch_size)

    @property
    def image_size(self) -> Pairs:
        """Image size (height, width) in pixels that the model is built for, or that `set_image_size` stored."""
        return getattr(self.model, _IMAGE_SIZE, None) or self.trained_size

    @property
    def trained_size(self) -> Pairs:
        """Image size (height, width) in pixels of the position embeddings."""
        return _pair(self.core.config.image_size)

    def set_image_size(self, size: Pairs) -> None:
        """Store another size (height, width) for schedules, FLOPs and files; positions are interpolated in `embed`."""
        setattr(self.model, _IMAGE_SIZE, size)

    @property
    def any_size(self) -> bool:
        """Whether positions are rotary, or a square table, which transformers can interpolate."""
        rows, cols = self.trained_size
        return self._rotary or (rows == cols and isinstance(self.core.config.patch_size, int))

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

    # ---- weights

    def shared_names(self, weights: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The weights under timm's names; q, k and v are parts of one weight, as are the halves of a gated MLP."""
        gated = getattr(self.core.config, "use_gated_mlp", False)
        core = "" if self._head is None else self._head.core
        return shared_names(weights, core, eva=self._kind.kind == "Eva", gated=gated)

    def reset_classifier(self, num_classes: int) -> None:
        """New classifiers with random weights. Raises UnsupportedModelError for models without one."""
        if self._head is None or not self._head.classifiers:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no classifier that could be replaced")
        width = self.dim * (2 if self._head.pool == "class and avg" else 1)
        for name in self._head.classifiers:
            new = nn.Linear(width, num_classes) if num_classes else nn.Identity()
            old = getattr(self.model, name)
            setattr(self.model, name, new.to(next(self.model.parameters())).train(old.training))
        self.model.config.num_labels = self.model.num_labels = num_classes


def _pair(value: Any) -> Pairs:
    height, width = value if isinstance(value, _SEQUENCES) else (value, value)
    return (height, width)
