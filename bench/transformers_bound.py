"""Measures the time of the decision for a ViT-S of transformers, with timm's ViT-S beside it.

    python bench/transformers_bound.py --out results/transformers_bound_cpu.json     # about 6 minutes on 2 idle cores
    python bench/transformers_bound.py --batches 1 --rounds 10

The no-decision bound calls transformers' own layers on the slices of the schedule: nothing is scored, sorted or
gathered. All runs are timed in turns; weights are random, because time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow shared cores down

import timm
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from patchlife import LifeConfig, SlimModel, __version__, wrap
from patchlife.benchmarks.baselines.no_decision_bound import NoDecisionBound
from patchlife.evaluation.timing import Timing, alternate
from patchlife.io.files import write_atomic

TARGETS = {1: 0.95, 16: 0.97}  # by batch size: least throughput over the no-decision bound
SMALL = {"hidden": 384, "layers": 12, "heads": 6, "image": 224, "patch": 16}
TINY = {"hidden": 48, "layers": 4, "heads": 3, "image": 64, "patch": 16}


def transformers_model(shape: dict[str, int]) -> ViTForImageClassification:
    """A model of transformers with random weights, a class token and 1000 classes."""
    config = ViTConfig(
        hidden_size=shape["hidden"],
        intermediate_size=4 * shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        image_size=shape["image"],
        patch_size=shape["patch"],
        num_labels=1000,
    )
    return ViTForImageClassification(config).eval()


def timm_model(shape: dict[str, int]) -> Any:
    """The model of timm with weights of the same shapes."""
    arguments = {"embed_dim": shape["hidden"], "depth": shape["layers"], "num_heads": shape["heads"]}
    sizes = {"img_size": shape["image"], "patch_size": shape["patch"]}
    return timm.create_model("vit_small_patch16_224", **arguments, **sizes).eval()


def no_decision_bound(model: Any, kept: tuple[int, ...], images: Tensor) -> Tensor:
    """Logits from transformers' own modules, on the first ``kept[l]`` patches in layer ``l``."""
    vit = model.vit
    x = vit.embeddings(images)
    for layer, n in zip(vit.layers, kept, strict=True):
        if 1 + n < x.shape[1]:
            x = x[:, : 1 + n].contiguous()  # once where they shrink
        x = layer(x)
    return model.classifier(vit.layernorm(x)[:, 0])


def logits(model: Any, images: Tensor) -> Tensor:
    """Logits of a model of transformers."""
    return model(images).logits


def slimmed(model: Any, budget: float, merge: bool) -> SlimModel:
    """The model in fixed mode."""
    return wrap(model, LifeConfig(budget=budget, merge=merge))


def measure(shape: dict[str, int], batch: int, budget: float, rounds: int, patience: float) -> Timing:
    """Time all runs on one batch."""
    images = torch.randn(batch, 3, shape["image"], shape["image"], generator=torch.Generator().manual_seed(1))
    hf, vit = transformers_model(shape), timm_model(shape)
    slices, merging = slimmed(hf, budget, False), slimmed(hf, budget, True)
    timm_slices, timm_merging = slimmed(vit, budget, False), slimmed(vit, budget, True)
    timm_bound = NoDecisionBound(timm_slices.backbone, timm_slices.schedule())
    runs = {
        "no-decision bound": partial(no_decision_bound, hf, slices.schedule().kept, images),
        "dense": partial(logits, hf, images),
        "slices": partial(logits, slices, images),
        "merging": partial(logits, merging, images),
        "timm, no-decision bound": partial(timm_bound, images),
        "timm, dense": partial(vit, images),
        "timm, slices": partial(timm_slices, images),
        "timm, merging": partial(timm_merging, images),
    }
    metadata = {"model": "ViTForImageClassification", "shape": shape, "batch": batch, "budget": budget}
    metadata |= {
        "dtype": "float32",
        "attention": hf.config._attn_implementation,
        "transformers": version("transformers"),
    }
    metadata["schedule"] = {"slices": str(slices.schedule()), "merging": str(merging.schedule())}
    return alternate(runs, rounds=rounds, patience=patience, metadata=metadata)


def verdicts(timing: Timing) -> list[dict]:
    """Throughput of each slimmed run over the bound of its library; the target is for transformers."""
    batch, rows = timing.conditions["batch"], []
    for library in ("", "timm, "):
        bound = timing.ratios[f"{library}no-decision bound"].median
        for run in ("slices", "merging"):
            ratio = timing.ratios[f"{library}{run}"].median / bound
            target = f">= {TARGETS[batch]}" if batch in TARGETS and not library else None
            rows.append({"what": f"{library}{run} / bound, throughput", "target": target, "measured": round(ratio, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--patience", type=float, default=180, help="seconds for each batch size")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for batch in tqdm(args.batches):
        timing = measure(TINY if args.tiny else SMALL, batch, args.budget, args.rounds, args.patience)
        results.append({**timing.to_dict(), "targets": verdicts(timing)})
        print(f"\nbatch {batch}, patches {timing.conditions['schedule']['slices']}")
        for run, seconds in timing.seconds.items():
            print(f"  {run:26} {1e3 * seconds.median:8.1f} ms   speed over the bound {timing.verdict(run)}")
        for row in results[-1]["targets"]:
            print(f"  {row['what']:36} {row['measured']:<7} {'target ' + row['target'] if row['target'] else ''}")
    if args.out:
        page = {"patchlife": __version__, "bench": "transformers_bound", "runs": results}
        write_atomic(args.out, json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main()
