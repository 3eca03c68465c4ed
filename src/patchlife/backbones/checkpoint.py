"""Weights from a safetensors file, under whatever names a training script left them, into a timm model."""

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

# Parts of a key that a wrapper of torch's added: data parallel, torch.compile, sharding, activation checkpoints.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# What a key that does not fit says about how the model was built: (which list it is on, its beginning, arguments).
_BUILT_WITH = (
    ("extra", "fc_norm.", "global_pool=avg"),
    ("missing", "fc_norm.", "global_pool=token"),
    ("extra", "attn_pool.", "global_pool=map"),
    ("missing", "cls_token", "class_token=false global_pool=avg"),
    ("extra", "blocks.0.ls1.", "init_values=1e-5"),
    ("extra", "blocks.0.attn.q_norm.", "qk_norm=true"),
    ("extra", "norm_pre.", "pre_norm=true"),
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Pickles are refused: opening one can run anything."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a .safetensors file")
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is opened; convert it once where you trust it: "
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
    """Weights under the names that the model itself has, of which ``wanted`` are most.

    Wrappers of torch's are left out of the keys (``module.``, ``_orig_mod.``, also between two parts), and so is the
    one prefix under which at least half of the model is found (``model.``, ``state_dict.backbone.``). Keys outside of
    it stay as they are: a classifier may be there, and `load_weights` names the others.

    Raises CheckpointError, naming the prefixes, when a file holds several models, such as one and its average.
    """
    plain = {_unwrapped(key): value for key, value in weights.items()}
    if len(plain) < len(weights):
        plain = dict(weights)  # with and without a wrapper: two models, told apart by it
    found = [prefix for prefix, count in _prefixes(plain, wanted).items() if 2 * count >= len(wanted)]
    if len(found) > 1:
        shown = ", ".join(repr(prefix) if prefix else "none" for prefix in sorted(found))
        raise CheckpointError(
            f"{name} holds {len(found)} models, whose keys have the prefixes {shown}; save one of them to its own file"
        )
    prefix = found[0] if found else ""
    return {key.removeprefix(prefix): value for key, value in plain.items()}


def load_weights(vit: nn.Module, weights: Mapping[str, Tensor], name: str | Path) -> None:
    """Load ``weights`` into ``vit``; every missing, extra or ill-shaped key is named in the CheckpointError."""
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
    """How many of the wanted keys there are behind each prefix; "" is one, too."""
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        for cut in range(len(parts)):  # the longest ending: attn_pool.norm.weight is not norm.weight
            if ".".join(parts[cut:]) in wanted:
                counts["".join(f"{part}." for part in parts[:cut])] += 1
                break
    return counts


def _hint(missing: list[str], extra: list[str], weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Arguments of the model under which the file may fit, as far as its keys tell; empty if they do not."""
    lists = {"missing": missing, "extra": extra}
    arguments = [
        argument for where, begin, argument in _BUILT_WITH if any(key.startswith(begin) for key in lists[where])
    ]
    if "reg_token" in extra and weights["reg_token"].ndim == 3:
        arguments.append(f"reg_tokens={weights['reg_token'].shape[1]}")
    arguments += _shape_arguments(weights, wanted)
    return f". If it was built with other arguments, give them: --model-args {' '.join(arguments)}" if arguments else ""


def _shape_arguments(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Arguments that the shapes of the patches' embedding and of the positions tell."""
    arguments, same = [], torch.empty(0, 0, 0, 0)
    theirs, ours = (tensors.get("patch_embed.proj.weight", same).shape for tensors in (weights, wanted))
    if len(theirs) == len(ours) == 4 and theirs[0] == ours[0]:
        if theirs[1] != ours[1]:
            arguments.append(f"in_chans={theirs[1]}")
        if theirs[2:] != ours[2:]:
            arguments.append(f"patch_size={theirs[2]},{theirs[3]}")
    theirs, ours = (tensors.get("pos_embed", same).shape for tensors in (weights, wanted))
    if len(theirs) == len(ours) == 3 and theirs != ours and theirs[2] == ours[2]:
        arguments.append("img_size=HEIGHT,WIDTH")
    return arguments


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
