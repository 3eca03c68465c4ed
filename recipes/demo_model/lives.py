"""Train the scorer of the demo model on the photos of its training, without labels; the backbone is not changed.

python recipes/demo_model/lives.py --data CALTECH101 --assets src/patchlife/assets/demo

CALTECH101 is a local folder with train/CLASS/*.jpg and test/CLASS/*.jpg. Writes ASSETS/adapter and
recipes/demo_model/lives.json (top-1 on the test photos of the ten classes, training-free and learned scorer). It takes
a few minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import patchlife
from patchlife.config import TrainingConfig
from patchlife.data import Preprocess, list_photos, load_batches, read_photo
from patchlife.evaluation.accuracy import evaluate
from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic
from patchlife.runtime.demo_model import demo_backbone
from patchlife.training.fit import accelerator_for, fit
from patchlife.training.target_cache import Photo

BUDGETS = (0.8, 0.6, 0.45, 0.35)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-lives"))
    args = parser.parse_args()
    vit = demo_backbone()
    preprocess, names = Preprocess.from_timm_cfg(vit.pretrained_cfg), vit.pretrained_cfg["label_names"]
    rule = patchlife.wrap(vit)
    train, test = ([args.data / part / name for name in names] for part in ("train", "test"))
    photos = [Photo(path) for path in list_photos(train)]
    learn = TrainingConfig(epochs=40, cache=args.out.with_name(args.out.name + ".cache"))
    fitted = fit(rule, photos, preprocess, args.out, learn, accelerator_for("cpu"))
    shutil.copytree(args.out, args.assets / "adapter", dirs_exist_ok=True)

    calibration_images = [preprocess(read_photo(path)) for path in list_photos(train)[::8]]
    rule.calibrate([torch.stack(calibration_images)])
    settings = [(budget, mode) for mode in ("fixed", "adaptive") for budget in BUDGETS]
    result = {"photos": len(list_photos(test)), "fitted_on": len(fitted.cache)}
    for name, model in (("training-free", rule), ("learned", fitted.model)):
        scores = evaluate(model, vit, _batches(preprocess, names, test), settings)
        result[name] = [score.to_dict() for score in scores]
        for s in scores:
            print(f"{name}, {s.mode}, {s.fraction:.3f} of the FLOPs: {100 * s.top1:.1f} %, drop {100 * s.drop:.1f}")
    result["conditions"] = conditions(torch.device("cpu"))
    write_atomic(Path(__file__).with_name("lives.json"), json.dumps(result, indent=1) + "\n")


def _batches(preprocess: Preprocess, names: list[str], folders: list[Path]) -> Iterator[tuple[Tensor, Tensor]]:
    photos = list_photos(folders)
    for batch in load_batches(photos, preprocess, 32):
        yield batch.images, torch.tensor([names.index(photos[i].parent.name) for i in batch.indices])


if __name__ == "__main__":
    main()
