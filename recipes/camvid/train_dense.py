"""Train the dense model on CamVid's train split: the whole ViT-Tiny with the head, half an hour on two cores.

    python recipes/camvid/train_dense.py --data ../shared/data/camvid --weights ../shared/weights/... --out runs/camvid

An interrupted run goes on behind its last finished epoch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import camvid
import dense_model
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL, MIDDLE, FULL = (256, 352), (304, 416), camvid.INPUT
# Small photos first: the same scenes at half the cost. The model also learns smaller inputs, so that the baseline
# that shrinks the photo stands on what it was trained for.
SIZES = (SMALL, MIDDLE) * 3 + (SMALL, FULL, FULL)
"""Height, width of the photos of each epoch."""
RATES = {"backbone": 1.5e-4, "head": 1e-3}
"""Peak learning rates."""
BATCH = 4


def augmented(
    scenes: camvid.Scenes, chosen: Tensor, size: tuple[int, int], random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Photos and labels of a batch: one window of 70 to 100 % of each side, mirrored or not, brightness +-25 %."""
    images, labels = [], []
    for scene in chosen.tolist():
        u = torch.rand(6, generator=random)
        share = 0.7 + 0.3 * float(u[0])
        height, width = (int(share * side) for side in camvid.PHOTO)
        top, left = int(u[1] * (camvid.PHOTO[0] - height + 1)), int(u[2] * (camvid.PHOTO[1] - width + 1))
        photo = scenes.photos[scene : scene + 1, :, top : top + height, left : left + width]
        label = scenes.labels[scene : scene + 1, None, top : top + height, left : left + width].float()
        label = F.interpolate(label, [side // 2 for side in size], mode="nearest-exact")
        image = camvid.as_input(photo, size) * (0.75 + 0.5 * u[3]) + 0.3 * (u[4] - 0.5)
        images.append(image.flip(3) if u[5] < 0.5 else image)
        labels.append(label.flip(3) if u[5] < 0.5 else label)
    return torch.cat(images), torch.cat(labels)[:, 0].long()


def train(scenes: camvid.Scenes, backbone: nn.Module, head: nn.Module, out: Path) -> None:
    """Train both in place; `out/dense.pt` holds the state after each epoch, `out/dense.safetensors` the result."""
    groups = [
        {"params": list(module.parameters()), "lr": 0.0, "name": name}
        for name, module in (("backbone", backbone), ("head", head))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    weights, steps, first, seconds = camvid.class_weights(scenes.labels), len(scenes) // BATCH, 0, 0.0
    if (out / "dense.pt").exists():
        state = torch.load(out / "dense.pt", weights_only=True)
        backbone.load_state_dict(state["backbone"]), head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["epochs"], state["seconds"]
    for epoch in range(first, len(SIZES)):
        started, losses = time.perf_counter(), []
        random = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(scenes), generator=random)
        for step in range(steps):
            _set_learning_rate(optimizer, (epoch * steps + step) / (len(SIZES) * steps))
            chosen = order[step * BATCH : (step + 1) * BATCH]
            images, labels = augmented(scenes, chosen, SIZES[epoch], random)
            logits = head(dense_model.maps_of(backbone, images))
            logits = camvid.as_pixels(logits, tuple(labels.shape[1:]))
            loss = F.cross_entropy(logits, labels, weights, ignore_index=camvid.IGNORE)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*backbone.parameters(), *head.parameters()], 1.0)
            optimizer.step()
            losses.append(float(loss))
            if step % 10 == 0:
                print(f"epoch {epoch} step {step}/{steps} loss {sum(losses[-10:]) / len(losses[-10:]):.3f}", flush=True)
        seconds += time.perf_counter() - started
        state = {"backbone": backbone.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"epochs": epoch + 1, "seconds": seconds}, out / "dense.partial")
        (out / "dense.partial").replace(out / "dense.pt")
        print(f"epoch {epoch} loss {sum(losses) / len(losses):.3f} seconds {seconds:.0f}", flush=True)
    (out / "dense.fit.json").write_text(json.dumps({"seconds": round(seconds), "photos": len(scenes)}) + "\n")
    dense_model.save(out / "dense.safetensors", backbone, head)


def _set_learning_rate(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Linear warm-up over the first twentieth, then half a cosine down to 2 %."""
    share = min(progress / 0.05, 1.0) * (0.02 + 0.98 * 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi)))))
    for group in optimizer.param_groups:
        group["lr"] = RATES[group["name"]] * share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/camvid"))
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights/vit_tiny_patch16_224.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--limit", type=int, help="train on this many scenes only (for a trial)")
    options = parser.parse_args()
    if (options.out / "dense.safetensors").exists():
        return print("already trained")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    head = dense_model.Head()
    train(camvid.load(options.data, "train", options.limit), dense_model.pretrained(options.weights), head, options.out)


if __name__ == "__main__":
    main()
