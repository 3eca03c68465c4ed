"""Cost models of full-size backbones, by arithmetic alone: no model is built."""

from __future__ import annotations

from patchlife.slimming import Cost


def vit_cost(dim: int, depth: int, grid: int, patch: int, classes: int) -> Cost:
    """A plain ViT with one class token, the attention scorer and merging.

    ``grid`` is the number of patches in a row, ``patch`` their size in pixels.
    """
    patches, tokens = grid**2, grid**2 + 1
    embedding = 2 * 3 * patch**2 * dim * patches
    block = (2 * 12 * dim**2, 4 * dim)  # qkv, projection and MLP: 12 dim^2 weights; two attention products
    row = 2 * dim * dim + 2 * dim * dim + 2 * dim * tokens * (dim // 64)  # the folded class query and its row
    width = dim if patches <= 512 else 48  # of the similarity embeddings; three products find the few dimensions
    subspace = 0 if width == dim else 3 * 2 * patches * dim * width
    coverage = (
        2 * width * patches * (patches + 1) + 2 * patches**2
    )  # cosines, also with nothing; sum of what is covered
    outer = embedding + 2 * dim * classes
    return Cost(patches, 1, outer, row + subspace + coverage, (block,) * depth, 2 * width)


SIZES = {
    "vit_tiny_patch16_224": {"dim": 192, "depth": 12, "grid": 14, "patch": 16, "classes": 1000},
    "deit_small_patch16_224": {"dim": 384, "depth": 12, "grid": 14, "patch": 16, "classes": 1000},
    "vit_small_patch14_dinov2": {"dim": 384, "depth": 12, "grid": 37, "patch": 14, "classes": 0},
    "vit_large_patch16_384": {"dim": 1024, "depth": 24, "grid": 24, "patch": 16, "classes": 1000},
}
"""Arguments of `vit_cost` for some of timm's models."""
