"""From a pretrained ViT to a slimmed model of your classes: fine-tune it on a data folder, fit an adapter, compare.

python examples/fine_tune_then_slim.py DATA --checkpoint vit_tiny.safetensors [--out FOLDER]

DATA is a data folder with train/CLASS/*.jpg and test/CLASS/*.jpg. The fine-tuning is ordinary (AdamW, crops and flips).
Then PatchLife fits an adapter on the same photos, without their labels. The same command continues an interrupted run
of PatchLife and skips what is finished.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import patchlife
from patchlife.config import TrainingConfig
from patchlife.data import Preprocess, list_photos, load_batches
from patchlife.evaluation.accuracy import evaluate
from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic
from patchlife.training.fit import fit
from patchlife.training.target_cache import Photo

BUDGETS = (1.0, 0.8, 0.61, 0.5, 0.45, 0.35)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="pretrained ViT-Tiny/16-224, safetensors")
    parser.add_argument("--out", type=Path, default=Path("fine-tuned"))
    parser.add_argument("--epochs", type=int, default=2, help="epochs of the dense fine-tuning")
    parser.add_argument("--slim-epochs", type=int, default=3, help="epochs of stage 2")
    parser.add_argument(
        "--finetune",
        choices=("adapter", "full"),
        default="adapter",
        help="what stage 2 trains: a low-rank delta that is zero at budget 1.0, or all weights",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    classes = sorted(folder.name for folder in (args.data / "train").iterdir() if folder.is_dir())
    vit = timm.create_model("vit_tiny_patch16_224")
    vit.load_state_dict(load_file(args.checkpoint))
    vit.reset_classifier(len(classes))
    dense = args.out / "dense.safetensors"
    if not dense.is_file():
        fine_tune(vit, args.data / "train", args.epochs)
        save_file(vit.state_dict(), dense)
    vit.load_state_dict(load_file(dense))
    vit.eval()

    preprocess = Preprocess.from_timm_cfg(vit.pretrained_cfg)
    training = TrainingConfig(finetune=args.finetune, finetune_epochs=args.slim_epochs)
    fitted = fit(
        patchlife.wrap(vit), labelled(args.data / "train", classes), preprocess, args.out / "adapter", training
    )

    test = labelled(args.data / "test", classes)
    scores = evaluate(fitted.model, vit, batches(test, preprocess), [(b, "fixed") for b in BUDGETS])
    for s in scores:
        low, high = (100 * bound for bound in s.drop_interval)
        print(f"{s.fraction:.3f} of the FLOPs: {100 * s.top1:.2f} %, drop {100 * s.drop:.2f} ({low:.2f} to {high:.2f})")
    result = {
        "classes": len(classes),
        "test_photos": len(test),
        "dense_epochs": args.epochs,
        "fit": fitted.summary,
        "scores": [s.to_dict() for s in scores],
        "conditions": conditions(torch.device("cpu")),
    }
    write_atomic(args.out / "result.json", json.dumps(result, indent=1, default=str) + "\n")


def fine_tune(vit: nn.Module, folder: Path, epochs: int, batch_size: int = 32, rate: float = 1e-4) -> None:
    """An ordinary fine-tuning: replace it by your own."""
    torch.manual_seed(0)
    config = timm.data.resolve_model_data_config(vit)
    augment = timm.data.create_transform(
        **config, is_training=True, scale=(0.5, 1.0), auto_augment=None, color_jitter=None, re_prob=0
    )
    loader = DataLoader(ImageFolder(folder, augment), batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader), pct_start=0.1)
    vit.train()
    for epoch in range(epochs):
        for images, labels in (bar := tqdm(loader, desc=f"fine-tune {epoch + 1}/{epochs}")):
            loss = nn.functional.cross_entropy(vit(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")


def labelled(folder: Path, classes: list[str]) -> list[Photo]:
    """Every photo with the class index of its folder."""
    return [Photo(path, classes.index(path.parent.name)) for path in list_photos([folder])]


def batches(photos: list[Photo], preprocess: Preprocess):
    """(images, labels) for `evaluate`."""
    for batch in tqdm(load_batches([p.path for p in photos], preprocess, 32), desc="test", total=-(-len(photos) // 32)):
        yield batch.images, torch.tensor([photos[i].label for i in batch.indices])


if __name__ == "__main__":
    main()
