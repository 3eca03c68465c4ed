"""Which backbone an adapter belongs to: its architecture, and a fingerprint of every weight.

A fingerprint is a few numbers of a tensor's content. It does not change with the device and, up to rounding, not with
the precision; two trainings do not share it, not even two short ones that began at the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone

__all__ = [
    "CLASSIFIERS",
    "changed",
    "differences",
    "fingerprints",
    "plain_name",
    "pretrained_cfg",
    "signature",
    "weights_of",
]

CLASSIFIERS = ("head.", "head_dist.")
"""How the names of timm's classifiers begin."""

Fingerprint = list[Any]
"""See `fingerprints`."""

_FACTS = ("depth", "dim", "prefix", "patch_size", "family")
_POSITIONS = "pos_embed"  # interpolated for another image size, which is no other backbone
_SAMPLE = 16384  # entries of a tensor that are looked at, evenly spread
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile, activation checkpointing
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # from fine to coarse

# How far rounding moves a fingerprint, by precision. About twice what was measured: root mean squares of 0.0018
# (bfloat16) and 0.0002 (float16), where noise of 1 % of the weights makes 0.009.
_ROUNDING = {"float16": 5e-4, "bfloat16": 3e-3}
_EXACT = 2e-5  # in other precisions: sums in another order, a change that was made and taken back
_HALF_STEP = {"float16": 2.0**-25}  # the smallest difference that a precision knows, where weights may be as small


def signature(backbone: Backbone) -> dict[str, Any]:
    """What tells two backbones apart, as JSON values: architecture, and `fingerprints` of all weights.

    About 20 ms for ViT-Tiny on one thread. ``name`` is for people; it takes no part in `differences`.
    """
    return {
        "name": pretrained_cfg(backbone.vit).get("architecture"),
        "family": backbone.family,
        "depth": backbone.depth,
        "dim": backbone.dim,
        "prefix": backbone.prefix,
        "patch_size": list(backbone.patch_size),
        "weights": fingerprints(weights_of(backbone.vit)),
    }


def pretrained_cfg(vit: nn.Module) -> dict[str, Any]:
    """What timm says about where a model came from; empty for a model that was built from its class."""
    cfg = getattr(vit, "pretrained_cfg", None) or {}
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return dataclasses.asdict(cfg)
    return dict(cfg) if isinstance(cfg, Mapping) else {}


@torch.no_grad()
def weights_of(vit: nn.Module) -> dict[str, Any]:
    """Parameters and saved buffers by name, with the values that the model computes with.

    A parametrised or pruned weight is the result, under the plain name. Wrappers that only change names are left out.
    What a module stores besides tensors (packed weights of quantised layers, say) is there as it is.
    """
    stored = vit.state_dict(keep_vars=True)
    weights: dict[str, Any] = {}
    for key in stored:
        name, value = _computed(vit, key, stored)
        weights[plain_name(name)] = value.detach() if isinstance(value, Tensor) else value
    return weights


def plain_name(name: str) -> str:
    """A weight's name without the wrappers around its module."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _computed(vit: nn.Module, key: str, stored: Mapping[str, Any]) -> tuple[str, Any]:
    """(plain name, value) of the weight that ``key`` is a part of."""
    *path, name = key.split(".")
    if "parametrizations" in path:  # a.b.parametrizations.weight.0.up is a part of a.b.weight
        at = path.index("parametrizations")
        name = [*path, name][at + 1]
        return ".".join([*path[:at], name]), getattr(vit.get_submodule(".".join(path[:at])), name)
    plain, _, part = key.rpartition("_")
    if part in ("orig", "mask") and {f"{plain}_orig", f"{plain}_mask"} <= stored.keys():  # torch.nn.utils.prune
        return plain, stored[f"{plain}_orig"] * stored[f"{plain}_mask"]
    return key, stored[key]


# ---- fingerprints


@torch.no_grad()
def fingerprints(weights: Mapping[str, Any]) -> dict[str, Fingerprint | None]:
    """[shape, precision, root mean square, projection, checksum, checksums of the sample] of each tensor.

    The sample are up to 16384 entries, evenly spread, that root mean square and projection are of, too. The projection
    on a fixed direction, relative to the length, is about N(0, 1) for random entries. The precision is the coarsest
    that holds the values, so that a float32 model from a bfloat16 file is known as such. The sample has a checksum for
    each precision that it can be rounded to.

    None for what has no values of its own here: meta, quantised, sharded and other special tensors.
    """
    plain = {name: tensor for name, tensor in weights.items() if _is_plain(tensor)}
    samples = dict(zip(plain, _fetched([_sample(tensor) for tensor in plain.values()]), strict=True))
    sums = dict(zip(plain, _fetched([_checksum(tensor.flatten()) for tensor in plain.values()]), strict=True))
    precisions = _precisions(plain, samples)
    found: dict[str, Fingerprint | None] = dict.fromkeys(weights)
    for name, tensor in plain.items():
        shape = "x".join(map(str, tensor.shape))
        root, projection = _measures(samples[name].double())
        checksum = f"{_name(tensor.dtype)} {int(sums[name]) % 2**64:016x}"
        found[name] = [shape, precisions[tensor.dtype], root, projection, checksum, _rounded(samples[name])]
    return found


def _is_plain(tensor: Any) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout != torch.strided:
        return False
    listed = tensor.dtype in _FLOATS or not (tensor.is_floating_point() or tensor.is_complex())
    return listed and not (tensor.is_meta or tensor.is_quantized)


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[:: max(1, -(-len(flat) // _SAMPLE))]


def _checksum(flat: Tensor) -> Tensor:
    """The sum of all entries' bits, each times a number of its place: the same on every device. (1,)"""
    if flat.is_floating_point():
        flat = (flat + 0.0).view(_INTEGERS[flat.element_size()])  # -0.0 becomes 0.0, which it equals
    factors, rows = _factors(flat.device), len(flat) // _SAMPLE
    total = (flat[rows * _SAMPLE :] * factors[: len(flat) - rows * _SAMPLE]).sum()
    if rows:
        total = total + (flat[: rows * _SAMPLE].view(rows, _SAMPLE).sum(dim=0, dtype=torch.int64) * factors).sum()
    return total.reshape(1)


@cache
def _factors(device: torch.device) -> Tensor:
    """Fixed odd numbers of 63 bits."""
    generator = torch.Generator("cpu").manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_SAMPLE,), generator=generator, device="cpu") * 2 + 1).to(device)


def _rounded(sample: Tensor) -> str:
    """Checksums of a sample in its own type and in all coarser ones."""
    types = _FLOATS[_FLOATS.index(sample.dtype) :] if sample.dtype in _FLOATS else (sample.dtype,)
    return " ".join(f"{_name(dtype)} {int(_checksum(sample.to(dtype))) % 2**64 >> 32:08x}" for dtype in types)


def _fetched(pieces: list[Tensor]) -> list[Tensor]:
    """The same on the CPU: one transfer for each device and precision."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, piece in enumerate(pieces):
        groups.setdefault((piece.device, piece.dtype), []).append(index)
    result = list(pieces)
    for indices in groups.values():
        joined = torch.cat([pieces[index] for index in indices]).cpu()
        for index, part in zip(indices, joined.split([len(pieces[index]) for index in indices]), strict=True):
            result[index] = part
    return result


def _measures(sample: Tensor) -> tuple[float, float]:
    """(root mean square, projection on a fixed direction relative to the length), to about six digits."""
    length, direction = float(sample.norm()), _direction()[: len(sample)]
    if not 0 < length < math.inf:  # all zero, empty, or no numbers
        return 0.0, 0.0
    along = float(sample @ direction / direction.norm()) / length
    return float(f"{length / len(sample) ** 0.5:.6g}"), round(along * len(sample) ** 0.5, 6)


@cache
def _direction() -> Tensor:
    return torch.arange(1, _SAMPLE + 1, dtype=torch.double, device="cpu").mul(math.e).sin()


def _precisions(weights: Mapping[str, Tensor], samples: Mapping[str, Tensor]) -> dict[torch.dtype, str]:
    """For each type of the weights the coarsest one that holds their values; a few entries of each tensor tell."""
    few: dict[torch.dtype, list[Tensor]] = {}
    for name, tensor in weights.items():
        few.setdefault(tensor.dtype, []).append(samples[name][:64])
    return {dtype: _coarsest(torch.cat(values)) for dtype, values in few.items()}


def _coarsest(values: Tensor) -> str:
    types = reversed(_FLOATS) if values.is_floating_point() else ()
    return _name(next((d for d in types if torch.equal(values.to(d).to(values.dtype), values)), values.dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- comparing


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the weights of one backbone that are not the same, to the bit, in two `signature`s of it.

    Weights that were brought to another precision, and that only, are the same. Names that only one of them has, or
    with another shape, are in the list.
    """
    ours, theirs = _comparable(before["weights"], now["weights"], ())
    one_sided = [name for name in {**ours, **theirs} if name not in ours or name not in theirs]
    both = [name for name in ours if name in theirs]
    recast = [name for name in both if ours[name][0] == theirs[name][0] and _kinds(ours[name]) != _kinds(theirs[name])]
    only_cast = all(_agree(ours[name], theirs[name]) for name in recast)
    same = {name for name in both if ours[name] == theirs[name]} | (set(recast) if only_cast else set())
    return one_sided + [name for name in both if name not in same]


def differences(saved: Mapping[str, Any], found: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """What tells the backbone ``found`` from ``saved`` (two `signature`s), in words; nothing for the same weights.

    Names count only where both sides use the same ones: another library's names are passed over, and each tensor is
    compared with the one that is nearest. Weights named in ``ignored`` do not count at all, nor does a position table
    for another image size, nor what has no fingerprint.
    """
    facts = [f"{key} is {found[key]}, expected {saved[key]}" for key in _FACTS if saved[key] != found[key]]
    if facts:
        return facts
    ours, theirs = _comparable(saved["weights"], found["weights"], ignored)
    if _POSITIONS in ours and _POSITIONS in theirs and ours[_POSITIONS][0] != theirs[_POSITIONS][0]:
        del ours[_POSITIONS], theirs[_POSITIONS]
    if ours.keys() != theirs.keys() and _shapes(ours) != _shapes(theirs):
        lacking = [f"{name} is missing" for name in ours if name not in theirs]
        return lacking + [f"{name} is not expected" for name in theirs if name not in ours]
    pairs = _pairs(ours, theirs)
    shapes = [f"{name} is {b[0]}, expected {a[0]}" for name, a, b in pairs if a[0] != b[0]]
    agreeing = [_agree(a, b) for _, a, b in pairs if "x" in a[0]]  # not those that may be zeros or ones in any model
    rounding = _EXACT if 2 * sum(agreeing) > len(agreeing) else 0.0  # where most do, it does not excuse the others
    return shapes or _other_values({name: _distance(a, b, rounding) for name, a, b in pairs})


def _comparable(
    saved: Mapping[str, Fingerprint | None], found: Mapping[str, Fingerprint | None], ignored: Collection[str]
) -> tuple[dict[str, Fingerprint], dict[str, Fingerprint]]:
    """Both sides without what cannot or need not be compared."""
    unknown = {name for side in (saved, found) for name, print_ in side.items() if print_ is None}
    skipped = unknown | set(ignored)
    if unknown:  # what replaced a weight may be stored under names of its own
        skipped |= saved.keys() ^ found.keys()
    ours, theirs = (
        {name: print_ for name, print_ in side.items() if print_ is not None and name not in skipped}
        for side in (saved, found)
    )
    return ours, theirs


def _shapes(weights: Mapping[str, Fingerprint]) -> list[str]:
    return sorted(print_[0] for print_ in weights.values())


def _pairs(
    ours: Mapping[str, Fingerprint], theirs: Mapping[str, Fingerprint]
) -> list[tuple[str, Fingerprint, Fingerprint]]:
    """What to compare with what: (our name, our fingerprint, theirs)."""
    if ours.keys() == theirs.keys():
        return [(name, print_, theirs[name]) for name, print_ in ours.items()]
    left, pairs = list(theirs.values()), []
    for name, print_ in ours.items():
        nearest = min((other for other in left if other[0] == print_[0]), key=partial(_moved, print_))
        left.remove(nearest)
        pairs.append((name, print_, nearest))
    return pairs


def _moved(ours: Fingerprint, theirs: Fingerprint) -> float:
    """By how much a tensor's length or direction is another one, relative to the length."""
    small, large = sorted((ours[2], theirs[2]))
    return max(abs(ours[3] - theirs[3]), (large - small) / large if large else 0.0)


def _kinds(print_: Fingerprint) -> tuple[str, str]:
    """(type of the values, precision)."""
    return print_[4].partition(" ")[0], print_[1]


def _agree(ours: Fingerprint, theirs: Fingerprint) -> bool:
    """Whether one is the other, rounded to the coarser of their precisions."""
    mine, other = (dict(zip(*2 * [iter(side[5].split())], strict=True)) for side in (ours, theirs))
    coarser = next((name for name in (theirs[1], ours[1]) if name in mine and name in other), None)
    return coarser is not None and mine[coarser] == other[coarser]


def _distance(ours: Fingerprint, theirs: Fingerprint, rounding: float) -> float:
    """How far two fingerprints are apart, in what ``rounding`` (if 0, that of their precisions) accounts for."""
    if ours[4:] == theirs[4:]:
        return 0.0
    if ours[2:4] == theirs[2:4] and ours[5] == theirs[5]:
        return math.inf  # only what is not in the sample differs, and no rounding does that
    if _agree(ours, theirs):
        return 0.0
    large = max(ours[2], theirs[2])
    rounding = rounding or max(_ROUNDING.get(side[1], _EXACT) for side in (ours, theirs))
    steps = sum(_HALF_STEP.get(side[1], 0.0) for side in (ours, theirs))
    return _moved(ours, theirs) / (rounding + (steps / large if large else 0.0))


def _other_values(distances: Mapping[str, float]) -> list[str]:
    """The tensors that rounding does not account for, the farthest first, each by itself and all together."""
    moved = {name: far for name, far in distances.items() if far > 0}
    mean = math.sqrt(sum(far**2 for far in moved.values()) / max(1, len(moved)))
    if max(moved.values(), default=0.0) <= 4 and mean <= 1 + 3 / math.sqrt(max(1, len(moved))):
        return []
    return [f"{name} has other values" for name in sorted(moved, key=lambda name: -moved[name])]
