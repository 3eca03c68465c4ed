"""Coverage gain: the score of a patch is the importance that it covers and that no more important patch covers.

The facility-location function ``f(S) = sum_i importance_i * max_{j in S} max(0, cos(i, j))`` is how much of an
image's importance a set S of patches covers. Patches are added in order of falling importance; the score of a patch
is its gain, ``f(S + patch) - f(S)``. Importance alone would keep many patches of the same sky; the gain of the second
of two equal patches is 0. (Facility location as a submodular function: Nemhauser, Wolsey and Fisher, 1978.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .similarity import comparable, falling, row_blocks, take, windows

__all__ = ["coverage_gain", "running_max"]


def coverage_gain(
    importance: Float[Tensor, "batch patches"], embedding: Float[Tensor, "batch patches k"]
) -> Float[Tensor, "batch patches"]:
    """The gain of each patch over the more important ones of its window (`similarity.windows`).

    ``embedding`` has vectors of unit length. Where ``importance`` sums to 1 over an image, the gains of an image sum
    to at most 1 and compare across images.
    """
    each = [_gain(importance[:, window], embedding[:, window]) for window in windows(importance.shape[1])]
    return each[0] if len(each) == 1 else torch.cat(each, dim=1)


def _gain(
    importance: Float[Tensor, "batch patches"], embedding: Float[Tensor, "batch patches k"]
) -> Float[Tensor, "batch patches"]:
    order = falling(importance)
    ranked = take(comparable(embedding), order)
    weight = importance.gather(1, order).to(ranked.dtype)[:, None]
    # the zero vector before the first patch covers nothing; it also makes each running maximum at least 0
    columns = F.pad(ranked, (0, 0, 1, 0)).transpose(1, 2)
    gains = []
    for rows in row_blocks(order.shape[1], order.shape[1]):
        covered = running_max(ranked[:, rows] @ columns)  # [.., i, r]: how well the first r patches cover patch i
        # differences first, then the sum: a difference of two sums near 1 would lose a small gain in rounding noise
        gains.append((weight[..., rows] @ (covered[..., 1:] - covered[..., :-1])).squeeze(1))
    gain = gains[0] if len(gains) == 1 else torch.stack(gains).sum(dim=0)
    return torch.empty_like(gain).scatter_(1, order, gain)  # an order has every place once


def running_max(x: Float[Tensor, "*batch ranks"]) -> Float[Tensor, "*batch ranks"]:
    """The maximum over ranks 0..r, for every r. ONNX has no such operator: there in log2(ranks) doubling steps."""
    if not torch.onnx.is_in_onnx_export():
        return x.cummax(dim=-1).values
    reach = 1
    while reach < x.shape[-1]:
        x = torch.cat((x[..., :reach], torch.maximum(x[..., reach:], x[..., :-reach])), dim=-1)
        reach *= 2
    return x
