"""Building a backbone by its timm name, with weights from a file or from timm's hub."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..files import sha256_of

__all__ = ["Origin", "build", "load_weights"]

_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar"}


@dataclass(frozen=True)
class Origin:
    """Where a backbone came from, so that an adapter can find it again.

    Attributes:
        model: timm's name for the architecture. options: arguments for ``timm.create_model``.
        checkpoint: safetensors file with the weights. sha256: of that file.
        pretrained: the weights are timm's own for this name.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    sha256: str | None = None
    pretrained: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def build(
    model: str, checkpoint: str | Path | None = None, pretrained: bool = False, image_size: int | None = None
) -> tuple[nn.Module, Origin]:
    """A timm model in eval mode, and where it came from.

    The number of classes follows the checkpoint. ``image_size`` in pixels replaces the model's own.

    Raises:
        UnsupportedModelError: timm has no model of this name.
        CheckpointError: the file is missing, no safetensors, damaged, or of another model.
    """
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if not timm.is_model(model):
        near = ", ".join(timm.list_models(f"*{model.split('.')[0][:14]}*")[:5])
        raise UnsupportedModelError(
            f"timm has no model named {model!r}" + (f"; did you mean one of {near}?" if near else "")
        )
    if checkpoint is None:
        return timm.create_model(model, pretrained=pretrained, **options).eval(), Origin(
            model, options, pretrained=pretrained
        )
    if pretrained:
        raise ConfigError("weights come from --checkpoint or from --pretrained, not from both")
    weights = read_weights(checkpoint)
    if "head.weight" in weights:
        options["num_classes"] = len(weights["head.weight"])
    vit: Any = timm.create_model(model, **{k: v for k, v in options.items() if k != "img_size"}).eval()
    load_weights(vit, weights, checkpoint)
    if image_size is not None:  # only now: the file's positions are for the model's own size
        vit.set_input_size(img_size=(image_size, image_size))
    path = Path(checkpoint).resolve()
    return vit, Origin(model, options, str(path), sha256_of(path))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Pickles are refused: opening one can run anything."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a .safetensors file")
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is opened; convert it once where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); is the download complete?"
        ) from None


def load_weights(vit: nn.Module, weights: dict[str, Tensor], name: str | Path) -> None:
    """Load ``weights`` into ``vit``; every missing, extra or ill-shaped key is named in the CheckpointError."""
    wanted = vit.state_dict()
    problems = []
    missing = sorted(wanted.keys() - weights.keys())
    extra = sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{k} {tuple(weights[k].shape)} for {tuple(wanted[k].shape)}"
        for k in sorted(wanted.keys() & weights.keys())
        if weights[k].shape != wanted[k].shape
    ]
    for what, keys in (("missing", missing), ("not of this model", extra), ("of another shape", shapes)):
        if keys:
            shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            problems.append(f"{what}: {shown}")
    if problems:
        raise CheckpointError(f"{name} does not fit {type(vit).__name__}: " + "; ".join(problems))
    damaged = sorted(k for k, v in weights.items() if v.is_floating_point() and not torch.isfinite(v).all())
    if damaged:
        raise CheckpointError(f"{name} holds NaN or infinite weights in {', '.join(damaged[:8])}")
    vit.load_state_dict(weights)
