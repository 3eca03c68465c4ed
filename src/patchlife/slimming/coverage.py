"""Coverage gain: the score of a patch is the importance that it covers and that no more important patch covers.

The facility-location function ``f(S) = sum_i importance_i * max_{j in S} max(0, cos(i, j))`` is how much of an
image's importance a set S of patches covers. Patches are added in order of falling importance; the score of a patch
is its gain, ``f(S + patch) - f(S)``. Importance alone would keep many patches of the same sky; the gain of the second
of two equal patches is 0. (Facility location as a submodular function: Nemhauser, Wolsey and Fisher, 1978.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .plan import longest_first
from .similarity import Similarity, cosines

__all__ = ["coverage_gain", "running_max"]


def coverage_gain(
    importance: Float[Tensor, "batch patches"], embedding: Float[Tensor, "batch patches embedding_dim"]
) -> tuple[Float[Tensor, "batch patches"], Similarity]:
    """(gain of each patch over the more important ones, similarities of all patches).

    ``embedding`` has vectors of unit length. Where ``importance`` sums to 1 over an image, the gains of an image sum
    to at most 1 and compare across images.
    """
    _, order = longest_first(importance)
    image = torch.arange(order.shape[0], device=order.device)[:, None]
    cosine = cosines(embedding[image, order])
    weight = importance[image, order].to(cosine.dtype)
    covered = running_max(cosine.clamp(min=0))  # [.., i, r]: how well ranks 0..r cover rank i
    # differences first, then the sum: a difference of two sums near 1 would keep only rounding noise of a small gain
    later = weight[:, None] @ (covered[..., 1:] - covered[..., :-1])
    gain = torch.cat((weight[:, None] @ covered[..., :1], later), dim=2).squeeze(1)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    place = torch.zeros_like(order).scatter(1, order, rank)
    return gain.gather(1, place), Similarity(cosine, place)


def running_max(x: Float[Tensor, "*batch ranks"]) -> Float[Tensor, "*batch ranks"]:
    """The maximum over ranks 0..r, for every r. ONNX has no such operator: there in log2(ranks) doubling steps."""
    if not torch.onnx.is_in_onnx_export():
        return x.cummax(dim=-1).values
    reach = 1
    while reach < x.shape[-1]:
        x = torch.cat((x[..., :reach], torch.maximum(x[..., reach:], x[..., :-reach])), dim=-1)
        reach *= 2
    return x
