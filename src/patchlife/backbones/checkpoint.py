"""Loading weights from a safetensors file into a model of timm or open_clip.

Prefixes that training scripts add to keys are removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError

__all__ = ["load_weights", "read_weights", "without_prefix"]

_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar"}

# Parts of keys added by torch's wrappers: data parallel, torch.compile, sharding, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Model arguments that explain a key that does not fit: (list of the key, beginning of the key, arguments).
_ARGUMENT_HINTS = (
    ("extra", "fc_norm.", "global_pool=avg"),
    ("missing", "fc_norm.", "global_pool=token"),
    ("extra", "attn_pool.", "global_pool=map"),
    ("missing", "cls_token", "class_token=false global_pool=avg"),
    ("extra", "blocks.0.ls1.", "init_values=1e-5"),
    ("extra", "blocks.0.attn.q_norm.", "qk_norm=true"),
    ("extra", "norm_pre.", "pre_norm=true"),
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Pickles are refused, because opening one can run code. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a .safetensors file")
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is opened; if you trust it, convert it once: "
            "safetensors.torch.save_file(weights, 'model.safetensors'), where weights is what torch.load(path, "
            "weights_only=True) returns, or the dict of tensors in it"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); is the download complete?"
        ) from None


def without_prefix(weights: Mapping[str, Tensor], wanted: Collection[str], name: str | Path) -> dict[str, Tensor]:
    """``weights`` with the keys of the model, without prefixes.

    The names of torch's wrappers are removed anywhere in a key (``module.``, ``_orig_mod.``). So is the prefix of at
    least half of the model's keys (``model.``, ``state_dict.backbone.``). Keys without this prefix stay unchanged:
    the classifier may be among them, and `load_weights` names the others.

    Args:
        weights: tensors of the file. wanted: keys of the model. name: the file, for the error.

    Raises:
        CheckpointError: the file holds several models, such as a model and its running average.
    """
    plain = {_unwrapped(key): value for key, value in weights.items()}
    if len(plain) < len(weights):
        plain = dict(weights)  # keys with and without a wrapper: two models in one file
    prefixes = [prefix for prefix, count in _prefixes(plain, wanted).items() if 2 * count >= len(wanted)]
    if len(prefixes) > 1:
        shown = ", ".join(repr(prefix) if prefix else "none" for prefix in sorted(prefixes))
        raise CheckpointError(
            f"{name} holds {len(prefixes)} models, whose keys have the prefixes {shown}; save one of them to a file"
        )
    prefix = prefixes[0] if prefixes else ""
    return {key.removeprefix(prefix): value for key, value in plain.items()}


def load_weights(vit: nn.Module, weights: Mapping[str, Tensor], name: str | Path) -> None:
    """Load ``weights`` into ``vit``. Raises CheckpointError that names missing, extra and misshaped keys."""
    wanted = vit.state_dict()
    missing = sorted(wanted.keys() - weights.keys())
    extra = sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{k} {tuple(weights[k].shape)} for {tuple(wanted[k].shape)}"
        for k in sorted(wanted.keys() & weights.keys())
        if weights[k].shape != wanted[k].shape
    ]
    problems = [
        f"{what}: {_listed(keys)}"
        for what, keys in (("missing", missing), ("not of this model", extra), ("of another shape", shapes))
        if keys
    ]
    if problems:
        hint = _hint(missing, extra, weights, wanted)
        raise CheckpointError(f"{name} does not fit {type(vit).__name__}: " + "; ".join(problems) + hint)
    damaged = sorted(k for k, v in weights.items() if v.is_floating_point() and not torch.isfinite(v.float()).all())
    if damaged:
        raise CheckpointError(f"{name} holds NaN or infinite weights in {', '.join(damaged[:8])}")
    vit.load_state_dict(weights)


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _prefixes(keys: Collection[str], wanted: Collection[str]) -> Counter[str]:
    """Number of wanted keys found behind each prefix; the prefix can be empty."""
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        for cut in range(len(parts)):  # the longest match: attn_pool.norm.weight is not norm.weight
            if ".".join(parts[cut:]) in wanted:
                counts["".join(f"{part}." for part in parts[:cut])] += 1
                break
    return counts


def _hint(missing: list[str], extra: list[str], weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Text that suggests model arguments with which the file may fit, found from its keys; may be empty."""
    lists = {"missing": missing, "extra": extra}
    arguments = [
        argument for which, start, argument in _ARGUMENT_HINTS if any(key.startswith(start) for key in lists[which])
    ]
    if "reg_token" in extra and weights["reg_token"].ndim == 3:
        arguments.append(f"reg_tokens={weights['reg_token'].shape[1]}")
    arguments += _shape_arguments(weights, wanted)
    return f". If it was built with other arguments, give them: --model-args {' '.join(arguments)}" if arguments else ""


def _shape_arguments(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Model arguments found from the shapes of the patch embedding and of the position embeddings."""
    arguments, missing = [], torch.empty(0, 0, 0, 0)
    in_file, in_model = (tensors.get("patch_embed.proj.weight", missing).shape for tensors in (weights, wanted))
    if len(in_file) == len(in_model) == 4 and in_file[0] == in_model[0]:
        if in_file[1] != in_model[1]:
            arguments.append(f"in_chans={in_file[1]}")
        if in_file[2:] != in_model[2:]:
            arguments.append(f"patch_size={in_file[2]},{in_file[3]}")
    in_file, in_model = (tensors.get("pos_embed", missing).shape for tensors in (weights, wanted))
    if len(in_file) == len(in_model) == 3 and in_file != in_model and in_file[2] == in_model[2]:
        arguments.append("img_size=HEIGHT,WIDTH")
    return arguments


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
