"""Signatures of backbones: architecture and a fingerprint of every weight. An adapter stores its backbone's signature.

A fingerprint is a few numbers computed from a tensor. It does not depend on the device and, apart from rounding, not
on the precision. Weights of two trainings have different fingerprints, even after short trainings from the same
weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backbone import Backbone

__all__ = [
    "CLASSIFIERS",
    "Fingerprint",
    "fingerprints",
    "plain_name",
    "signature",
    "weights_of",
]

CLASSIFIERS = ("head.", "head_dist.")
"""Prefixes of the names of timm's classifier weights."""


class Fingerprint(NamedTuple):
    """A few numbers computed from a tensor. Signatures hold them as lists, for JSON.

    Attributes:
        shape: such as "10x48".
        precision: the coarsest type that holds the values exactly. For a float32 model that was loaded from a bfloat16
            file it is bfloat16.
        rms: root mean square of the sample. The sample of a tensor is up to 16384 entries, evenly spaced.
        projection: cosine of the sample and a fixed direction, times the square root of the number of entries. It is
            distributed as about N(0, 1) for random entries.
        checksum: type of the tensor, and checksum of all its entries.
        sample_checksums: checksum of the sample in its own type and rounded to each coarser type.
    """

    shape: str
    precision: str
    rms: float
    projection: float
    checksum: str
    sample_checksums: str


_SAMPLE_SIZE = 16384  # entries
_INTEGER_TYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per entry
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile, activation checkpointing
_FLOAT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # from fine to coarse


def signature(backbone: Backbone) -> dict[str, Any]:
    """Architecture and `fingerprints` of all weights, as JSON values.

    Takes about 20 ms for ViT-Tiny on one thread. ``name`` is informative only; `comparison.differences` ignores it.
    """
    return {
        "name": backbone.name or None,
        "family": backbone.family,
        "depth": backbone.depth,
        "dim": backbone.dim,
        "prefix": backbone.prefix,
        "patch_size": list(backbone.patch_size),
        "weights": fingerprints(weights_of(backbone)),
    }


@torch.no_grad()
def weights_of(backbone: Backbone) -> dict[str, Any]:
    """Parameters and saved buffers by the names that all libraries share, with the values that the model computes with.

    The value of a parametrised or pruned weight is the result of the parametrisation or pruning; that of a weight with
    a gated weight delta is the value without the delta. Names of wrappers are removed. Values that are not tensors,
    such as packed weights of quantised layers, are included unchanged.
    """
    model = backbone.model
    bases = backbone.gated.bases() if backbone.gated is not None else {}
    stored = {name: bases.get(id(value), value) for name, value in model.state_dict(keep_vars=True).items()}
    weights: dict[str, Any] = {}
    for key in stored:
        name, value = _name_and_value(model, key, stored)
        weights[plain_name(name)] = value.detach() if isinstance(value, Tensor) else value
    return {name: _joined(parts) for name, parts in backbone.shared_names(weights).items()}


def _joined(parts: list[Any]) -> Any:
    """A weight from its parts; if its values cannot be read, one of the parts.

    Parts that do not fit together, such as scales of single layers or LoRA factors of several ranks, are flattened.
    """
    if len(parts) == 1:
        return parts[0]
    if unreadable := [part for part in parts if not _is_plain(part)]:
        return unreadable[0]
    fit = all(part.ndim and part.shape[1:] == parts[0].shape[1:] for part in parts)
    return torch.cat(parts if fit else [part.flatten() for part in parts])


def plain_name(name: str) -> str:
    """Name of a weight without the wrappers around its module."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _name_and_value(vit: nn.Module, key: str, stored: Mapping[str, Any]) -> tuple[str, Any]:
    """(name, value) of the weight that entry ``key`` of the state dict belongs to."""
    *path, name = key.split(".")
    if "parametrizations" in path:  # a.b.parametrizations.weight.0.up belongs to a.b.weight
        at = path.index("parametrizations")
        name = [*path, name][at + 1]
        return ".".join([*path[:at], name]), getattr(vit.get_submodule(".".join(path[:at])), name)
    plain, _, part = key.rpartition("_")
    if part in ("orig", "mask") and {f"{plain}_orig", f"{plain}_mask"} <= stored.keys():  # torch.nn.utils.prune
        return plain, stored[f"{plain}_orig"] * stored[f"{plain}_mask"]
    return key, stored[key]


# ---- fingerprints


@torch.no_grad()
def fingerprints(weights: Mapping[str, Any]) -> dict[str, list[Any] | None]:
    """The `Fingerprint` of each tensor, as a list.

    None for tensors whose values cannot be read: meta, quantised, sharded and other special tensors.
    """
    plain = {name: tensor for name, tensor in weights.items() if _is_plain(tensor)}
    samples = dict(zip(plain, _on_cpu([_sample(tensor) for tensor in plain.values()]), strict=True))
    sums = dict(zip(plain, _on_cpu([_checksum(tensor.flatten()) for tensor in plain.values()]), strict=True))
    precisions = _precisions(plain, samples)
    result: dict[str, list[Any] | None] = dict.fromkeys(weights)
    for name, tensor in plain.items():
        shape = "x".join(map(str, tensor.shape))
        rms, projection = _rms_and_projection(samples[name].double())
        checksum = f"{_type_name(tensor.dtype)} {int(sums[name]) % 2**64:016x}"
        result[name] = [
            *Fingerprint(shape, precisions[tensor.dtype], rms, projection, checksum, _sample_checksums(samples[name]))
        ]
    return result


def _is_plain(tensor: Any) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout != torch.strided:
        return False
    known_type = tensor.dtype in _FLOAT_TYPES or not (tensor.is_floating_point() or tensor.is_complex())
    return known_type and not (tensor.is_meta or tensor.is_quantized)


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[:: max(1, -(-len(flat) // _SAMPLE_SIZE))]


def _checksum(flat: Tensor) -> Tensor:
    """Sum over the entries of their bits, read as integers, times fixed factors. Shape (1,); equal on all devices."""
    if flat.is_floating_point():
        flat = (flat + 0.0).view(_INTEGER_TYPES[flat.element_size()])  # + 0.0 turns -0.0 into 0.0
    factors, rows = _checksum_factors(flat.device), len(flat) // _SAMPLE_SIZE
    total = (flat[rows * _SAMPLE_SIZE :] * factors[: len(flat) - rows * _SAMPLE_SIZE]).sum()
    if rows:
        columns = flat[: rows * _SAMPLE_SIZE].view(rows, _SAMPLE_SIZE).sum(dim=0, dtype=torch.int64)
        total = total + (columns * factors).sum()
    return total.reshape(1)


@cache
def _checksum_factors(device: torch.device) -> Tensor:
    """Fixed odd integers of 63 bits."""
    generator = torch.Generator("cpu").manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_SAMPLE_SIZE,), generator=generator, device="cpu") * 2 + 1).to(device)


def _sample_checksums(sample: Tensor) -> str:
    """Checksums of a sample in its own type and in all coarser types, as text."""
    types = _FLOAT_TYPES[_FLOAT_TYPES.index(sample.dtype) :] if sample.dtype in _FLOAT_TYPES else (sample.dtype,)
    return " ".join(f"{_type_name(dtype)} {int(_checksum(sample.to(dtype))) % 2**64 >> 32:08x}" for dtype in types)


def _on_cpu(pieces: list[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, with one transfer per device and type."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, piece in enumerate(pieces):
        groups.setdefault((piece.device, piece.dtype), []).append(index)
    result = list(pieces)
    for indices in groups.values():
        joined = torch.cat([pieces[index] for index in indices]).cpu()
        for index, part in zip(indices, joined.split([len(pieces[index]) for index in indices]), strict=True):
            result[index] = part
    return result


def _rms_and_projection(sample: Tensor) -> tuple[float, float]:
    """`Fingerprint.rms` and `Fingerprint.projection` of a sample, rounded to about six digits."""
    length, direction = float(sample.norm()), _projection_direction()[: len(sample)]
    if not 0 < length < math.inf:  # all zeros, empty, or with NaN or infinity
        return 0.0, 0.0
    cosine = float(sample @ direction / direction.norm()) / length
    return float(f"{length / len(sample) ** 0.5:.6g}"), round(cosine * len(sample) ** 0.5, 6)


@cache
def _projection_direction() -> Tensor:
    return torch.arange(1, _SAMPLE_SIZE + 1, dtype=torch.double, device="cpu").mul(math.e).sin()


def _precisions(weights: Mapping[str, Tensor], samples: Mapping[str, Tensor]) -> dict[torch.dtype, str]:
    """For each type of the weights, the coarsest type that holds them exactly, by 64 entries of each tensor."""
    few: dict[torch.dtype, list[Tensor]] = {}
    for name, tensor in weights.items():
        few.setdefault(tensor.dtype, []).append(samples[name][:64])
    return {dtype: _coarsest_exact_type(torch.cat(values)) for dtype, values in few.items()}


def _coarsest_exact_type(values: Tensor) -> str:
    types = reversed(_FLOAT_TYPES) if values.is_floating_point() else ()
    return _type_name(next((d for d in types if torch.equal(values.to(d).to(values.dtype), values)), values.dtype))


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
