"""A patch lives for what only it can tell.

Importance alone keeps twenty patches of the same sky. Coverage asks how much of the image's importance a set of
patches speaks for, a patch speaking for another as well as it resembles it. Taken in order of importance, each
patch is worth what it adds to the patches before it: one matrix of cosines, one running maximum.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .plan import longest_first
from .similarity import Likeness, cosines

__all__ = ["added_coverage", "running_max"]


def added_coverage(
    importance: Float[Tensor, "batch patches"], kin: Float[Tensor, "batch patches kin_dim"]
) -> tuple[Float[Tensor, "batch patches"], Likeness]:
    """(what each patch adds to the coverage of the more important ones, how alike they are).

    With ``importance`` summing to 1, the gains of an image sum to at most 1 and compare across images: a plain
    sky is covered by few patches. ``kin`` has unit rows; unlike patches (cosine below 0) do not speak for each
    other.
    """
    _, order = longest_first(importance)
    image = torch.arange(order.shape[0], device=order.device)[:, None]
    cosine = cosines(kin[image, order])
    weight = importance[image, order].to(cosine.dtype)
    covered = running_max(cosine.clamp(min=0))  # [.., i, r]: rank i, by the best of ranks 0..r
    # what rank r adds, for each i, before the sum: a difference of sums near 1 would keep only rounding noise of it
    later = weight[:, None] @ (covered[..., 1:] - covered[..., :-1])
    gain = torch.cat((weight[:, None] @ covered[..., :1], later), dim=2).squeeze(1)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    place = torch.zeros_like(order).scatter(1, order, rank)
    return gain.gather(1, place), Likeness(cosine, place)


def running_max(x: Float[Tensor, "*batch ranks"]) -> Float[Tensor, "*batch ranks"]:
    """The maximum of ranks 0..r, for every r. ONNX has no such operator: there by doubling, in log2(ranks) steps."""
    if not torch.onnx.is_in_onnx_export():
        return x.cummax(dim=-1).values
    reach = 1
    while reach < x.shape[-1]:
        x = torch.cat((x[..., :reach], torch.maximum(x[..., reach:], x[..., :-reach])), dim=-1)
        reach *= 2
    return x
