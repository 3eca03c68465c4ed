"""Train adapters for CamVid without labels: the scorer only, then a low-rank weight delta from that scorer.

    python recipes/camvid/fit.py --dense runs/camvid/dense.safetensors --out runs/camvid
    python recipes/camvid/fit.py --dense runs/camvid/dense.safetensors --out runs/camvid --long

The photos of the train split and their mirror images are distilled: patch features of the dense model and its answers
for every pixel. Writes OUT/scorer and OUT/adapter; a finished one is not trained again, an interrupted one goes on.
With --long a wider scorer learns for more epochs, and the delta takes twice as many steps; the names are long-scorer
and long-adapter.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import camvid
import dense_model
import methods
import torch
from PIL import Image, ImageOps

import patchlife
from patchlife.config import LifeConfig, TrainingConfig
from patchlife.data import Preprocess
from patchlife.io.files import write_atomic
from patchlife.slimming.regressor import LifeRegressor
from patchlife.training.dense import DenseHead
from patchlife.training.fit import fit
from patchlife.training.target_cache import Photo

# cuts 4 rows at the top and the bottom of a 480 x 360 photo, without resizing
PREPROCESS = Preprocess(camvid.INPUT, crop_fraction=1.0, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/camvid"))
    parser.add_argument("--dense", type=Path, default=Path("runs/camvid/dense.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--epochs", type=int, default=5, help="of the weight delta")
    parser.add_argument("--scorer-epochs", type=int, help=f"default {TrainingConfig().epochs}, with --long 40")
    parser.add_argument("--long", action="store_true", help="a wider scorer, and more steps")
    parser.add_argument("--limit", type=int, help="train on this many photos only (for a trial)")
    options = parser.parse_args()
    backbone, head = dense_model.load(options.dense)
    files = sorted((options.data / "train" / "images").iterdir())[: options.limit]
    photos = [Photo(file) for file in (*files, *mirrored(files, options.out / "mirrored"))]
    dense_head = DenseHead(head, dense_model.BLOCKS)
    common = {"target": "pixels", "cache": options.out / "cache", "views": "cached"}  # the results here are of these
    long, prefix = options.long, "long-" if options.long else ""
    epochs = options.scorer_epochs or (40 if long else TrainingConfig().epochs)
    runs = {
        f"{prefix}scorer": TrainingConfig(**common, batch_size=8, epochs=epochs),
        f"{prefix}adapter": TrainingConfig(
            **common, batch_size=4 if long else 8, epochs=0, finetune="adapter", finetune_epochs=options.epochs
        ),
    }
    model = patchlife.wrap(backbone, LifeConfig(start=methods.START, drops=methods.DROPS))
    if long:
        torch.manual_seed(0)
        model.scorer = LifeRegressor(model.backbone.dim, model.backbone.prefix, width=192, embedding_dim=64)
    for name, config in runs.items():
        folder = options.out / name
        if not folder.is_dir():
            started = time.perf_counter()
            fit(model, photos, PREPROCESS, folder, config, head=dense_head)
            seconds = {"seconds": round(time.perf_counter() - started), "photos": len(photos)}
            write_atomic(options.out / f"{name}.fit.json", json.dumps(seconds) + "\n")
        model = patchlife.load(folder, backbone)


def mirrored(photos: list[Path], folder: Path) -> list[Path]:
    """The photos mirrored left to right, as files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{photo.stem}.png" for photo in photos]
    for photo, file in zip(photos, files, strict=True):
        if not file.exists():
            with Image.open(photo) as image:
                ImageOps.mirror(image.convert("RGB")).save(file, compress_level=1)
    return files


if __name__ == "__main__":
    main()
