"""Comparing signatures: what changed since a backbone was wrapped, and whether an adapter belongs to a backbone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from .identity import Fingerprint

__all__ = ["changed_weights", "differences"]

_POSITION_TABLE = "pos_embed"  # another image size changes it, but is the same backbone
_HEAD_BIAS = "head.bias"  # zeros for timm's CLIP models; other libraries have no bias there
_ARCHITECTURE_KEYS = ("depth", "dim", "prefix", "patch_size", "family")
# Relative change of a fingerprint by rounding, by precision. About twice the measured root mean squares of 0.0018
# (bfloat16) and 0.0002 (float16). Noise of 1 % of the weights gives 0.009.
_ROUNDING = {"float16": 5e-4, "bfloat16": 3e-3}
_DEFAULT_ROUNDING = 2e-5  # other precisions: another order of summation, a delta added and subtracted again
_ABSOLUTE_ROUNDING = {"float16": 2.0**-25}  # half the smallest step; matters for tiny weights


def changed_weights(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the weights that changed between two `signature`s of one backbone.

    The comparison is exact to the bit, except that a pure change of precision does not count. Names that are in only
    one of the signatures are included, and so are weights of another shape.
    """
    old, new = _comparable(before["weights"], now["weights"], ())
    in_one = [name for name in {**old, **new} if name not in old or name not in new]
    in_both = [name for name in old if name in new]
    recast = [
        name
        for name in in_both
        if old[name].shape == new[name].shape and _type_and_precision(old[name]) != _type_and_precision(new[name])
    ]
    only_recast = all(_equal_after_rounding(old[name], new[name]) for name in recast)
    same = {name for name in in_both if old[name] == new[name]} | (set(recast) if only_recast else set())
    return in_one + [name for name in in_both if name not in same]


def differences(saved: Mapping[str, Any], found: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Descriptions of the differences between two `signature`s; empty for the same backbone, apart from rounding.

    If the sides use different names, as different libraries do, each tensor is compared with the most similar tensor
    of its shape. Not compared are: weights named in ``ignored``, the position table if the image sizes differ, a bias
    of zeros that the other side does not have, and weights without a fingerprint.
    """
    architecture = [
        f"{key} is {found[key]}, expected {saved[key]}" for key in _ARCHITECTURE_KEYS if saved[key] != found[key]
    ]
    if architecture:
        return architecture
    expected, got = _comparable(saved["weights"], found["weights"], ignored)
    tables = [side.get(_POSITION_TABLE) for side in (expected, got)]
    if tables[0] and tables[1] and tables[0].shape != tables[1].shape:
        del expected[_POSITION_TABLE], got[_POSITION_TABLE]
    for side, other in ((expected, got), (got, expected)):
        if _HEAD_BIAS not in other and _HEAD_BIAS in side and _is_zero(side[_HEAD_BIAS]):
            del side[_HEAD_BIAS]
    if expected.keys() != got.keys() and _shapes(expected) != _shapes(got):
        missing = [f"{name} is missing" for name in expected if name not in got]
        return missing + [f"{name} is not expected" for name in got if name not in expected]
    pairs = _matched(expected, got)
    shapes = [f"{name} is {b.shape}, expected {a.shape}" for name, a, b in pairs if a.shape != b.shape]
    # only tensors of two or more dimensions: vectors can be all zeros or all ones in any model
    equal = [_equal_after_rounding(a, b) for _, a, b in pairs if "x" in a.shape]
    # if most tensors are equal after rounding, rounding does not explain differences of the others
    rounding = _DEFAULT_ROUNDING if 2 * sum(equal) > len(equal) else 0.0
    return shapes or _other_values({name: _distance(a, b, rounding) for name, a, b in pairs})


def _comparable(
    saved: Mapping[str, list[Any] | None], found: Mapping[str, list[Any] | None], ignored: Collection[str]
) -> tuple[dict[str, Fingerprint], dict[str, Fingerprint]]:
    """The fingerprints of both sides, without those that are not compared."""
    unknown = {name for side in (saved, found) for name, values in side.items() if values is None}
    skipped = unknown | set(ignored)
    if unknown:  # a quantised layer may store its weight under other names
        skipped |= saved.keys() ^ found.keys()
    expected, got = (
        {name: Fingerprint(*values) for name, values in side.items() if values is not None and name not in skipped}
        for side in (saved, found)
    )
    return expected, got


def _is_zero(fingerprint: Fingerprint) -> bool:
    return int(fingerprint.checksum.rpartition(" ")[2], 16) == 0


def _shapes(weights: Mapping[str, Fingerprint]) -> list[str]:
    return sorted(fingerprint.shape for fingerprint in weights.values())


def _matched(
    expected: Mapping[str, Fingerprint], got: Mapping[str, Fingerprint]
) -> list[tuple[str, Fingerprint, Fingerprint]]:
    """(name, expected fingerprint, fingerprint to compare with it) for each expected weight."""
    if expected.keys() == got.keys():
        return [(name, fingerprint, got[name]) for name, fingerprint in expected.items()]
    unmatched, pairs = list(got.values()), []
    for name, fingerprint in expected.items():
        same_shape = (other for other in unmatched if other.shape == fingerprint.shape)
        nearest = min(same_shape, key=partial(_relative_change, fingerprint))
        unmatched.remove(nearest)
        pairs.append((name, fingerprint, nearest))
    return pairs


def _relative_change(a: Fingerprint, b: Fingerprint) -> float:
    """Change of the root mean square or of the projection, whichever is larger, relative to the length."""
    small, large = sorted((a.rms, b.rms))
    return max(abs(a.projection - b.projection), (large - small) / large if large else 0.0)


def _type_and_precision(fingerprint: Fingerprint) -> tuple[str, str]:
    return fingerprint.checksum.partition(" ")[0], fingerprint.precision


def _equal_after_rounding(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether both samples are equal when they are rounded to the coarser of the two precisions."""
    sums_a, sums_b = (dict(zip(*2 * [iter(side.sample_checksums.split())], strict=True)) for side in (a, b))
    coarser = next((name for name in (b.precision, a.precision) if name in sums_a and name in sums_b), None)
    return coarser is not None and sums_a[coarser] == sums_b[coarser]


def _distance(a: Fingerprint, b: Fingerprint, rounding: float) -> float:
    """Distance of two fingerprints in units of ``rounding``; if that is 0, of the rounding of their precisions."""
    if a.checksum == b.checksum and a.sample_checksums == b.sample_checksums:
        return 0.0
    if (a.rms, a.projection, a.sample_checksums) == (b.rms, b.projection, b.sample_checksums):
        return math.inf  # only entries outside the sample differ: rounding would change the sample too
    if _equal_after_rounding(a, b):
        return 0.0
    large = max(a.rms, b.rms)
    relative = rounding or max(_ROUNDING.get(side.precision, _DEFAULT_ROUNDING) for side in (a, b))
    absolute = sum(_ABSOLUTE_ROUNDING.get(side.precision, 0.0) for side in (a, b))
    return _relative_change(a, b) / (relative + (absolute / large if large else 0.0))


def _other_values(distances: Mapping[str, float]) -> list[str]:
    """Descriptions of the tensors whose distances rounding does not explain, largest distance first.

    Rounding explains them if every single distance is at most 4 and their root mean square is close to 1.
    """
    nonzero = {name: distance for name, distance in distances.items() if distance > 0}
    rms = math.sqrt(sum(distance**2 for distance in nonzero.values()) / max(1, len(nonzero)))
    if max(nonzero.values(), default=0.0) <= 4 and rms <= 1 + 3 / math.sqrt(max(1, len(nonzero))):
        return []
    return [f"{name} has other values" for name in sorted(nonzero, key=lambda name: -nonzero[name])]
