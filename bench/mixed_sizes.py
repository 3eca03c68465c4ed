"""Measures the throughput of images of different sizes: one packed run against other ways to run the same images.

    python bench/mixed_sizes.py --out results/mixed_sizes_cpu.json     # a few minutes on 2 idle cores
    python bench/mixed_sizes.py --rounds 5 --models deit_tiny_patch16_224 --batches 8

Sizes are those of photos of common shapes with at most as many pixels as the model's input (`Preprocess.keep_aspect`).
Runs, timed in turns: the dense model one by one (the reference) and in groups of equal size; the slimmed model packed,
one by one, in groups, and on images that were padded to a common size or resized to the model's own size. Padding and
resizing change the results; they are here for their time. Weights are random, because time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow shared cores down

import timm
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from patchlife import LifeConfig, __version__, wrap
from patchlife.data import Preprocess
from patchlife.evaluation.timing import Timing, alternate
from patchlife.io.files import write_atomic
from patchlife.slimming.run.mixed import by_size

SHAPES = [(640, 480), (480, 640), (600, 400), (500, 500), (1280, 720), (400, 600), (640, 427), (500, 375)]


def pictures(batch: int, size: tuple[int, int], patch: tuple[int, int]) -> list[Tensor]:
    """Random images in the sizes of photos of `SHAPES`, in turns."""
    preprocess, draw = Preprocess(size=size, keep_aspect=patch), torch.Generator().manual_seed(0)
    sizes = [preprocess.for_photo(SHAPES[place % len(SHAPES)]).size for place in range(batch)]
    return [torch.randn(3, *found, generator=draw) for found in sizes]


def one_by_one(run: Callable[[Tensor], Tensor], images: list[Tensor]) -> Tensor:
    return torch.cat([run(image[None]) for image in images])


def in_groups(run: Callable[[Tensor], Tensor], images: list[Tensor]) -> Tensor:
    return torch.cat([run(batch) for _, batch in by_size(images)])


def padded(images: list[Tensor]) -> Tensor:
    """One batch, filled up with zeros at the right and at the bottom."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    return torch.stack([pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])


def resized(images: list[Tensor], size: tuple[int, int]) -> Tensor:
    return torch.cat([interpolate(image[None], size, mode="bilinear") for image in images])


def measure(name: str, batch: int, mode: str, budget: float, rounds: int, patience: float) -> Timing:
    """Time all runs on one backbone and one list of images."""
    vit = timm.create_model(name, dynamic_img_size=True).eval()
    model = wrap(vit, LifeConfig(budget=budget))
    images = pictures(batch, model.backbone.image_size, model.backbone.patch_size)
    as_batch = {"padded": padded(images), "resized": resized(images, model.backbone.image_size)}
    if mode == "adaptive":
        model.calibrate([images, *as_batch.values()]).set_mode("adaptive")
    runs = {
        "dense, one by one": partial(one_by_one, vit, images),
        "dense, groups of one size": partial(in_groups, vit, images),
        "packed": partial(model, images),
        "one by one": partial(one_by_one, model, images),
        "groups of one size": partial(in_groups, model, images),
        "padded": partial(model, as_batch["padded"]),
        "resized": partial(model, as_batch["resized"]),
    }
    sizes = sorted({(image.shape[1], image.shape[2]) for image in images})
    metadata = {"model": name, "batch": batch, "mode": mode, "budget": budget, "dtype": "float32", "sizes": sizes}
    metadata["threads"] = torch.get_num_threads()
    return alternate(runs, rounds=rounds, patience=patience, metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--modes", nargs="+", default=["fixed", "adaptive"])
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--patience", type=float, default=120, help="seconds for each model, batch and mode")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for name, batch, mode in [(n, b, m) for n in args.models for b in args.batches for m in args.modes]:
        timing = measure(name, batch, mode, args.budget, args.rounds, args.patience)
        results.append(timing.to_dict())
        print(f"\n{name}, batch {batch}, {mode}")
        for run, seconds in timing.seconds.items():
            print(f"  {run:26} {batch / seconds.median:8.1f} images/s   {timing.verdict(run)}")
    if args.out:
        write_atomic(
            args.out, json.dumps({"patchlife": __version__, "bench": "mixed_sizes", "runs": results}, indent=1)
        )


if __name__ == "__main__":
    main()
