"""How accurate the attention rule is with similarities in few dimensions: KL divergence from the dense model.

    python bench/similarity_width.py PHOTOS --checkpoint vit_tiny.safetensors --pixels 512 --out results/similarity.json

Compares whole tokens with `subspace` in several widths and with every k-th channel, on the same photos, with nothing
trained. Positions are interpolated for ``--pixels``. About 5 minutes for 60 photos of 512 pixels on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.backbones import Backbone
from patchlife.data import Preprocess, list_photos, read_photo
from patchlife.evaluation.agreement import kl_divergence
from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic
from patchlife.slimming.coverage import coverage_gain
from patchlife.slimming.scorers import Scorer, Scores, attention_received
from patchlife.slimming.similarity import subspace

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole tokens": lambda tokens: tokens,
    "subspace, 32": lambda tokens: subspace(normalize(tokens, dim=-1), 32),
    "subspace, 48": lambda tokens: subspace(normalize(tokens, dim=-1), 48),
    "subspace, 64": lambda tokens: subspace(normalize(tokens, dim=-1), 64),
    "every 4th channel": lambda tokens: tokens[..., ::4],
}


class Rule(Scorer):
    """The attention rule, with similarities of ``of`` (tokens)."""

    kind = "similarity-width"

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Backbone, start: int) -> Scores:
        received = attention_received(tokens, rope, backbone, start).sum(dim=1)
        embedding = normalize(self.of(tokens[:, backbone.prefix :]), dim=-1)
        return Scores(coverage_gain(received / received.sum(dim=1, keepdim=True), embedding), embedding)


def model_for(checkpoint: Path, pixels: int) -> SlimModel:
    """The shared ViT-Tiny for images of ``pixels`` x ``pixels``."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=pixels).eval()
    weights = load_file(checkpoint)
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], list(vit.patch_embed.grid_size))
    vit.load_state_dict(weights)
    return wrap(vit, LifeConfig())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--count", type=int, default=60, help="photos, evenly spaced over the folder")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.61, 0.45])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = model_for(options.checkpoint, options.pixels)
    preprocess = Preprocess((options.pixels,) * 2, crop_fraction=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    paths = list_photos([options.photos])
    paths = paths[:: max(1, len(paths) // options.count)][: options.count]
    found: dict[tuple[str, float], list[float]] = {(way, budget): [] for way in WAYS for budget in options.budgets}
    kept = {budget: model.set_budget(budget).schedule().kept for budget in options.budgets}  # whole tokens' schedule
    slimmed = {(way, b): wrap(model.unwrap(), LifeConfig(kept=kept[b]), Rule(WAYS[way])) for way, b in found}
    for path in tqdm(paths, unit="photo"):
        images = preprocess(read_photo(path))[None]
        embedded = model.backbone.embed(images)
        tokens, dense = model.before_start(embedded), model.backbone.output(images)
        for key, divergences in found.items():
            divergences.append(float(kl_divergence(dense, slimmed[key].resume(tokens, embedded))))
    rows = [
        {"way": way, "budget": budget, "kl": float(torch.tensor(each).mean()), "photos": len(each)}
        for (way, budget), each in found.items()
    ]
    for row in rows:
        print(f"{row['way']:20} {row['budget']:.2f} KL {row['kl']:.4f}")
    if options.out:
        result = {"rows": rows, "pixels": options.pixels, "conditions": conditions()}
        write_atomic(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
