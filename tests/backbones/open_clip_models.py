"""Small models of open_clip with random weights and all special parts, and a slow reference for the method on them.

The reference runs open_clip's own embedding, blocks and pooling on all tokens in grid order. Before a block it masks
dropped patches out of attention as keys; after the block it restores their tokens. With merging it also averages the
token of a dropped patch into the most similar kept patch. From patchlife come the lives and the factor of the bias.
"""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from families import liven
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from patchlife import LifeConfig, Lives, SlimModel, wrap
from patchlife.slimming.merging import BIAS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # open_clip imports timm by an old path
    open_clip = pytest.importorskip("open_clip")
    from open_clip.transformer import Transformer, VisionTransformer

SMALL = {"image_size": 48, "patch_size": 8, "width": 48, "layers": 5, "heads": 4, "mlp_ratio": 2.0, "output_dim": 24}
START = 2
BUDGET = 0.65
VARIANTS = {
    f"{mode}{', merge' if merge else ''}": {"mode": mode, "merge": merge}
    for mode in ("fixed", "adaptive")
    for merge in (False, True)
}

_POOL = {"attn_pooler_queries": 4, "attn_pooler_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd heads": {"heads": 3},  # nn.MultiheadAttention has no fused path for them
    "layer scale": {"ls_init_value": 0.5},
    "no norm before": {"no_ln_pre": True},
    "sin-cos positions": {"pos_embed_type": "sin_cos_2d"},
    "quick gelu": {"act_layer": open_clip.transformer.QuickGELU},
    "average": {"pool_type": "avg"},
    "norm after pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "class token, norm last": {"final_ln_after_pool": True},
    "unpooled": {"pool_type": "none"},
    "tokens too": {"output_tokens": True},
    "patch dropout": {"patch_dropout": 0.5},
    "no projection": {"proj": False},
    "attentional pool": {"attentional_pool": True, "output_tokens": True, **_POOL},
    "attentional pool, average": {"attentional_pool": True, "pool_type": "avg", **_POOL},
    "parallel pools": {"attentional_pool": "parallel", "output_dim": 48, "output_tokens": True, **_POOL},
    "cascade of pools": {"attentional_pool": "cascade", "output_dim": 48, **_POOL},
    "not square": {"image_size": (32, 56), "patch_size": (8, 7)},
    "sequence first": {"batch_first": False},
    "custom, qk norm": {"qk_norm": True},
    "custom, scales": {"scale_heads": True, "scale_attn": True, "scale_attn_inner": True, "scale_fc": True},
}


@cache
def built(name: str) -> Any:
    """The small model, in eval mode. Shared by all tests: do not change it."""
    arguments = {**SMALL, **MODELS[name]}
    batch_first, proj = arguments.pop("batch_first", True), arguments.pop("proj", True)
    vit = liven(VisionTransformer(**arguments)).eval()
    if not batch_first:
        other = Transformer(SMALL["width"], SMALL["layers"], SMALL["heads"], SMALL["mlp_ratio"], batch_first=False)
        other.load_state_dict(vit.transformer.state_dict())
        vit.transformer = other.eval()
    vit.proj = vit.proj if proj else None
    return vit


def fresh(name: str) -> Any:
    """A copy of `built` that tests may change."""
    return copy.deepcopy(built(name))


def photos(name: str, count: int = 3, seed: int = 0) -> Tensor:
    """Random images of different contrasts, so that the lives of their patches differ."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, *built(name).image_size, generator=generator)
    return images * torch.linspace(0.3, 1.5, count)[:, None, None, None]


def slim(name: str, variant: str = "fixed", vit: nn.Module | None = None, **settings: Any) -> SlimModel:
    """The small model, slimmed from block `START`; adaptive mode is calibrated on eight images.

    Dropped patches have their last state, as in `slow`.
    """
    config = LifeConfig(**{"budget": BUDGET, "start": START, "restore": "last", **VARIANTS[variant], **settings})
    model = wrap(built(name) if vit is None else vit, config)
    if config.mode == "adaptive":
        model.calibrate([photos(name, 8, seed=1).to(next(model.parameters()))])
    return model


def small_clip(vision: dict[str, Any] | None = None, kind: Any = None, **more: Any) -> Any:
    """A small CLIP model with lively weights, in eval mode."""
    vision_cfg = {"layers": 5, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 48, **(vision or {})}
    text_cfg = {"width": 32, "heads": 2, "layers": 1}
    return liven((kind or open_clip.CLIP)(24, vision_cfg, text_cfg, **more)).eval()


# ---- the reference


def slow(vit: Any, images: Tensor, lives: Lives, merge: bool, start: int = START) -> list[Tensor]:
    """Tokens (batch, tokens, dim) after each block, in grid order, when patches are dropped as in ``lives``."""
    x, size, states = vit._embeds(images), torch.ones_like(lives.life, dtype=torch.float64), []
    cosine = torch.empty(0)
    for index, block in enumerate(vit.transformer.resblocks):
        kept = lives.life > index
        if index == start:
            unit = normalize(x[:, 1:], dim=-1)
            cosine = unit @ unit.transpose(1, 2)
        if merge and index >= start:
            x = x.clone()
            dropped = ~kept & ((lives.life > index - 1) | (index == start))
            for image in range(len(x)):
                _merge(x[image, 1:], size[image], dropped[image], kept[image], cosine[image])
        bias = pad(torch.where(kept, BIAS * size.log(), -torch.inf), (1, 0)).to(x.dtype)
        batch, tokens = bias.shape
        mask = bias[:, None, None].expand(batch, block.attn.num_heads, tokens, tokens).flatten(0, 1)
        out = block(x, attn_mask=mask) if vit.transformer.batch_first else _sequence_first(block, x, mask)
        x = torch.where(pad(kept, (1, 0), value=True)[..., None], out, x)
        states.append(x)
    return states


def _sequence_first(block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return block(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)


def _merge(patches: Tensor, size: Tensor, dropped: Tensor, kept: Tensor, cosine: Tensor) -> None:
    """Average the dropped patches of one image into the most similar kept ones, in place."""
    mass, new_size = patches * size[:, None].to(patches.dtype), size.clone()
    for patch in dropped.nonzero().flatten():
        target = cosine[patch].masked_fill(~kept, -torch.inf).argmax()
        weight = cosine[patch, target].clamp(0, 1)
        mass[target] += patches[patch] * (size[patch] * weight).to(mass.dtype)
        new_size[target] += size[patch] * weight
    changed = new_size > size
    patches[changed] = (mass / new_size[:, None].to(mass.dtype))[changed]
    size.copy_(new_size)


def outputs_of(vit: Any, tokens: Tensor) -> Any:
    """What open_clip's ``forward`` gives for the tokens after the last block."""
    pooled, rest = vit._pool(tokens)
    pooled = pooled if vit.proj is None else pooled @ vit.proj
    return (pooled, rest) if vit.output_tokens else pooled


# ---- comparisons


def leaves(outputs: Any) -> list[Tensor]:
    """All tensors of an output."""
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return [leaf for part in parts if part is not None for leaf in leaves(part)]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Assert equal structures and a largest difference of ``tolerance``, relative to the larger of 1 and the values."""
    assert type(actual) is type(expected)
    assert not isinstance(expected, dict) or actual.keys() == expected.keys()
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def far_apart(actual: Any, expected: Any) -> bool:
    """Whether two outputs differ by far more than rounding."""
    pairs = zip(leaves(actual), leaves(expected), strict=True)
    return any(bool((a - b).abs().max() > 1e-3 * b.abs().max()) for a, b in pairs)
