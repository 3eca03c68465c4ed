"""Train the small ViT of the demo from scratch; a ViT-Tiny is the teacher of every token.

The teacher (224 px, patch 16) and the student (112 px, patch 8) divide the same crop into the same 14 x 14 grid, so
tokens are compared position by position. See README.md beside this file.
"""

import argparse
import hashlib
import io
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

CLASSES = (
    "Leopards", "Motorbikes", "airplanes", "bonsai", "car_side",
    "chandelier", "grand_piano", "ketch", "sunflower", "watch",
)  # fmt: skip
FACES = ("Faces", "Faces_easy")  # photos of recognisable people: used nowhere, not even without their label
PEOPLE = {"bonsai/image_0094.jpg", "chandelier/image_0039.jpg"}  # test photos that the package must not show
UNLABELLED = -1  # label of a photo of another category: only the teacher's tokens are learned from it
ARCHITECTURE = {
    "img_size": 112, "patch_size": 8, "embed_dim": 112, "depth": 12, "num_heads": 4,
    "mlp_ratio": 4.0, "qkv_bias": True, "class_token": True, "num_classes": len(CLASSES),
}  # fmt: skip
INPUT = {
    "size": [3, 112, 112],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}
SIZE, TEACHER_SIZE = 112, 224
TEACHER_DIM, TEACHER_CLASSES = 192, 1000
TEMPERATURE = 2.0  # of the teacher's probabilities
Photo = tuple[Path, int]  # path and label
Labelled = tuple[torch.Tensor, torch.Tensor]  # images (B, 3, 112, 112), labels (B,)
MIDDLE = 7  # besides the last block, the output of this one is distilled; the same index in both models
PHOTOS_PER_CLASS, PHOTO_SIDE, PHOTO_BYTES = 10, 160, 1_400_000


def parse_args() -> argparse.Namespace:
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_defaults)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Caltech-101 as train/CLASS/*.jpg and test/CLASS/*.jpg")
    add("--teacher", type=Path, required=True, help="weights of vit_tiny_patch16_224 (safetensors)")
    add("--out", type=Path, default=Path("runs/demo"), help="cache and checkpoint; a rerun resumes there")
    add("--assets", type=Path, default=Path("runs/demo/assets"), help="folder for the finished model")
    add("--views-per-class", type=int, default=600, help="fixed random crops, divided among its photos")
    add("--other-views", type=int, default=14000, help="fixed random crops of photos of all other categories but faces")
    add("--grids", type=int, nargs="+", default=[7] * 8 + [10] * 3 + [14] * 2, help="patches a side, by epoch")
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=4e-3)
    add("--seed", type=int, default=0)
    return parser.parse_args()


# ---- photos ----


def list_photos(folder: Path) -> list[Photo]:
    """Every photo of the ten classes with its label, in a fixed order."""
    names = enumerate(CLASSES)
    photos = [(path, label) for label, name in names for path in sorted((folder / name).glob("*.jpg"))]
    if not photos:
        raise SystemExit(f"no photos in {folder}: expected {folder}/{CLASSES[0]}/*.jpg and nine more classes")
    return photos


def list_others(folder: Path) -> list[Photo]:
    """Every photo of the other categories, faces excepted, in a fixed order."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in CLASSES + FACES)
    return [(path, UNLABELLED) for name in names for path in sorted((folder / name).glob("*.jpg"))]


def by_class(photos: list[Photo]) -> list[list[Photo]]:
    return [[photo for photo in photos if photo[1] == label] for label in range(len(CLASSES))]


def repeated(photos: list[Photo], count: int) -> list[Photo]:
    """``count`` photos: each as often as any other, or once more."""
    return [photos[i % len(photos)] for i in range(count)]


def read(path: Path) -> Image.Image:
    with Image.open(path) as photo:
        return photo.convert("RGB")


def centre(photo: Image.Image) -> Image.Image:
    """The evaluation crop: short side to SIZE, then the middle square (crop_pct is 1)."""
    scale = SIZE / min(photo.size)
    width, height = (max(SIZE, int(side * scale)) for side in photo.size)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    return photo.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A crop of 35-100 % of the area with an aspect near 1, as far as the photo allows."""
    area = width * height * rng.uniform(0.35, 1.0)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(width, np.sqrt(area * aspect)), min(height, np.sqrt(area / aspect))
    w, h = min(w, h * 4 / 3), min(h, w * 4 / 3)  # a long photo must not be squashed
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) with mean = std = 0.5."""
    return (torch.from_numpy(pixels).movedim(-1, -3).float() / 255 - 0.5) / 0.5


# ---- the teacher, run once ----


def load_teacher(path: Path) -> VisionTransformer:
    teacher = timm.create_model("vit_tiny_patch16_224")
    teacher.load_state_dict(load_file(path), strict=True)
    return teacher.eval()


def tokens(model: VisionTransformer, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle and last (normalised) tokens, the class token first: two (B, 197, dim)."""
    last, ((patches, prefix),) = model.forward_intermediates(
        images, indices=[MIDDLE], output_fmt="NLC", return_prefix_tokens=True
    )
    return torch.cat([prefix, patches], dim=1), last


def build_cache(args: argparse.Namespace, folder: Path) -> None:
    """Write fixed random views of the training photos, and the tokens of the teacher for them."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = repeated(list_others(args.data / "train"), args.other_views)
    for photos in by_class(list_photos(args.data / "train")):
        jobs += repeated(photos, args.views_per_class)
    count, teacher, rng = len(jobs), load_teacher(args.teacher), np.random.default_rng(args.seed)
    views = np.lib.format.open_memmap(folder / "views.npy", "w+", np.uint8, (count, SIZE, SIZE, 3))
    shape = (2, count, 197, TEACHER_DIM)  # middle, last
    targets = np.lib.format.open_memmap(folder / "targets.npy", "w+", np.float16, shape)
    logits = np.lib.format.open_memmap(folder / "logits.npy", "w+", np.float16, (count, TEACHER_CLASSES))
    for first in range(0, count, 50):
        rows, large = range(first, min(first + 50, count)), []
        for row in rows:
            photo = read(jobs[row][0])
            box = random_box(*photo.size, rng)
            large.append(photo.resize((TEACHER_SIZE, TEACHER_SIZE), Image.Resampling.BICUBIC, box))
            views[row] = photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
        with torch.inference_mode():
            middle, last = tokens(teacher, to_tensor(np.stack(large)))
            logits[first : first + 50] = teacher.forward_head(last).half()
        targets[0, first : first + 50], targets[1, first : first + 50] = middle.half(), last.half()
        if first % 500 == 0:
            print(f"teacher {first}/{count}", flush=True)
    views.flush(), targets.flush(), logits.flush()
    # written last: it marks the cache as complete
    np.save(folder / "labels.npy", np.array([label for _, label in jobs]))


# ---- the student ----


def build_student() -> VisionTransformer:
    """A plain timm ViT with Xavier weights and sine-cosine positions, which help where there are few photos."""
    student = VisionTransformer(**ARCHITECTURE, weight_init="jax", dynamic_img_size=True)
    positions = build_sincos2d_pos_embed([14, 14], dim=ARCHITECTURE["embed_dim"])  # (196, dim)
    with torch.no_grad():
        student.pos_embed[0, 1:] = 0.3 * positions  # about the scale of the embedded patches
    return student


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random saturation, contrast and brightness; patches do not move, so the teacher's tokens stay valid."""
    saturation, contrast, brightness = torch.rand(3, len(images), 1, 1, 1, generator=generator).unbind()
    grey = images.mean(1, keepdim=True)
    return torch.lerp(grey, images, 0.5 + saturation) * (0.7 + 0.6 * contrast) + 0.4 * (brightness - 0.5)


def mirror(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and targets, mirrored left-right; the teacher's tokens of a mirrored photo are nearly mirrored."""
    patches = targets[:, :, 1:].unflatten(2, (14, 14)).flip(3).flatten(2, 3)
    return images.flip(-1), torch.cat([targets[:, :, :1], patches], dim=2)


def shrink(images: torch.Tensor, grid: int) -> torch.Tensor:
    """The images at ``grid`` x ``grid`` patches of 8 px; small grids make the early epochs cheap."""
    side = grid * ARCHITECTURE["patch_size"]
    return images if side == SIZE else F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def shrink_targets(targets: torch.Tensor, grid: int) -> torch.Tensor:
    """The teacher's tokens (2, B, 197, dim) averaged onto a smaller grid; the class token stays."""
    if grid == 14:
        return targets
    patches = targets[:, :, 1:].flatten(0, 1).mT.unflatten(2, (14, 14))  # (2 B, dim, 14, 14)
    patches = F.interpolate(patches, (grid, grid), mode="bilinear", antialias=True).flatten(2).mT
    return torch.cat([targets[:, :, :1], patches.unflatten(0, targets.shape[:2])], dim=2)


def mean_and_std(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each channel, over all views: (2, 1, 197, dim) each. The class token has its own, the patches share theirs."""
    token, patches = targets[:, :, :1], targets[:, :, 1:]

    def over_views(statistic) -> torch.Tensor:
        of_token, of_patches = (statistic(part, (1, 2), keepdim=True) for part in (token, patches))
        return torch.cat([of_token, of_patches.expand(-1, -1, patches.shape[2], -1)], dim=2)

    return over_views(torch.mean), over_views(torch.std)


class Batches:
    """Shuffled batches of the cached views with standardised targets; epoch e is the same in every run."""

    def __init__(self, folder: Path, batch_size: int, seed: int):
        self.views, self.targets = np.load(folder / "views.npy"), np.load(folder / "targets.npy")
        self.labels, self.logits = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("labels", "logits"))
        self.batch_size, self.seed = batch_size, seed
        self.mean, self.std = mean_and_std(torch.from_numpy(self.targets[:, ::10]).float())

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def epoch(self, epoch: int, grid: int):
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        for rows in order[: len(self) * self.batch_size].split(self.batch_size):
            images = augment(to_tensor(self.views[rows.numpy()]), generator)
            targets = (torch.from_numpy(self.targets[:, rows.numpy()]).float() - self.mean) / self.std
            half = len(rows) // 2  # a random half, since the order is random
            images[:half], targets[:, :half] = mirror(images[:half], targets[:, :half])
            yield shrink(images, grid), shrink_targets(targets, grid), self.logits[rows].float(), self.labels[rows]


def build_projections() -> nn.ModuleDict:
    """From the student's tokens to what the teacher has there; not kept after training."""
    sizes = {"middle": TEACHER_DIM, "last": TEACHER_DIM, "class token": TEACHER_DIM, "classes": TEACHER_CLASSES}
    return nn.ModuleDict({name: nn.Linear(ARCHITECTURE["embed_dim"], size) for name, size in sizes.items()})


def losses(student, projections, images, targets, teacher_logits, labels) -> dict[str, torch.Tensor]:
    """What the student has to match: the teacher's tokens, its 1000 classes, and the label where there is one.

    The class token decides the answer and is one of 197, so its error is a term of its own.
    """
    middle, last = tokens(student, images)
    projected = {name: projections[name](last[:, 0]) for name in ("class token", "classes")}
    soft = (teacher_logits / TEMPERATURE).softmax(1)
    known = labels != UNLABELLED
    logits = student.forward_head(last)[known]
    return {
        "middle": F.mse_loss(projections["middle"](middle[:, 1:]), targets[0, :, 1:]),
        "last": F.mse_loss(projections["last"](last[:, 1:]), targets[1, :, 1:]),
        "class token": F.mse_loss(projected["class token"], targets[1, :, 0]),
        "classes": F.cross_entropy(projected["classes"] / TEMPERATURE, soft),
        "labels": F.cross_entropy(logits, labels[known], label_smoothing=0.05, reduction="sum") / max(1, len(logits)),
    }


class Training:
    """The student, its projections, and Muon for the matrices of its blocks with AdamW for everything else.

    The loss falls in fewer views than with AdamW alone (README.md).
    """

    def __init__(self, lr: float, steps: int):
        self.student, self.projections = build_student(), build_projections()
        matrices = [weight for weight in self.student.blocks.parameters() if weight.ndim == 2]
        chosen = set(map(id, matrices))
        others = [weight for weight in self.weights() if id(weight) not in chosen]
        self.optimizers = [
            torch.optim.Muon(matrices, lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, weight_decay=0.05),
        ]
        self.schedules = [OneCycleLR(o, lr, steps, pct_start=0.08, cycle_momentum=False) for o in self.optimizers]

    def weights(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), *self.projections.parameters()]

    def parts(self) -> list:
        return [self.student, self.projections, *self.optimizers, *self.schedules]

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def save(self, path: Path, epoch: int) -> None:
        """Write to a temporary file and rename it, so that an interrupted run never leaves an incomplete checkpoint."""
        state = {"epoch": epoch, "parts": [part.state_dict() for part in self.parts()]}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> int:
        """Restore what ``save`` wrote; returns its epoch."""
        state = torch.load(path, weights_only=True)
        for part, values in zip(self.parts(), state["parts"], strict=True):
            part.load_state_dict(values)
        return state["epoch"]


def train(args: argparse.Namespace, batches: Batches, test: Labelled) -> VisionTransformer:
    torch.manual_seed(args.seed)
    training = Training(args.lr, len(args.grids) * len(batches))
    checkpoint = args.out / "checkpoint.pt"
    first = training.load(checkpoint) + 1 if checkpoint.exists() else 0
    for epoch, grid in list(enumerate(args.grids))[first:]:
        started = time.perf_counter()
        training.student.train()
        for step, batch in enumerate(batches.epoch(epoch, grid)):
            parts = losses(training.student, training.projections, *batch)
            training.step(sum(parts.values()))
            if step % 20 == 0:
                shown = " ".join(f"{name} {value.item():.3f}" for name, value in parts.items())
                print(f"{epoch}:{step} {shown} {time.perf_counter() - started:.0f} s", flush=True)
        training.save(checkpoint, epoch)
        # reported only: the weights of the last epoch are kept, whatever the accuracy
        share = hits(training.student, shrink(test[0], grid), test[1]).double().mean()
        print(f"epoch {epoch}, grid {grid}: test accuracy {share:.4f}", flush=True)
    return training.student


# ---- export ----


def load_views(photos: list[Photo]) -> Labelled:
    images = to_tensor(np.stack([centre(read(path)) for path, _ in photos]))
    return images, torch.tensor([label for _, label in photos])


@torch.inference_mode()
def hits(model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(64)]) == labels


def encode(path: Path, quality: int) -> bytes:
    photo = read(path)
    scale = PHOTO_SIDE / min(photo.size)
    small = photo.resize([round(side * scale) for side in photo.size], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def write_photos(args: argparse.Namespace) -> list[Photo]:
    """Ten random test photos a class, at the highest JPEG quality that fits in PHOTO_BYTES."""
    rng, chosen = np.random.default_rng(args.seed), []
    shown = [photo for photo in list_photos(args.data / "test") if "/".join(photo[0].parts[-2:]) not in PEOPLE]
    for photos in by_class(shown):
        chosen += [photos[i] for i in sorted(rng.choice(len(photos), PHOTOS_PER_CLASS, replace=False))]
    for quality in range(86, 40, -2):
        encoded = [encode(path, quality) for path, _ in chosen]
        if sum(map(len, encoded)) <= PHOTO_BYTES:
            break
    written = []
    for (path, label), data in zip(chosen, encoded, strict=True):
        target = args.assets / "photos" / CLASSES[label] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        written.append((target, label))
    print(f"{len(written)} photos, JPEG quality {quality}, {sum(map(len, encoded))} bytes")
    return written


def export(args: argparse.Namespace, student: VisionTransformer, test: Labelled) -> None:
    """Write the fp16 weights, read them back, and measure what was written."""
    args.assets.mkdir(parents=True, exist_ok=True)
    weights = args.assets / "model.safetensors"
    save_file({name: value.half().contiguous() for name, value in student.state_dict().items()}, weights)
    weights.chmod(0o644)  # safetensors makes it readable for its owner only
    rounded = VisionTransformer(**ARCHITECTURE)
    rounded.load_state_dict({name: value.float() for name, value in load_file(weights).items()}, strict=True)
    right = hits(rounded, *test)
    per_class = {name: right[test[1] == label].double().mean().item() for label, name in enumerate(CLASSES)}
    photos = write_photos(args)
    right_photos = hits(rounded, *load_views(photos))
    facts = {
        "recipe": "recipes/demo_model",
        "seed": args.seed,
        "architecture": ARCHITECTURE,
        "classes": CLASSES,
        "input": INPUT,
        "weights": {
            "file": weights.name,
            "dtype": "float16",
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "accuracy": {
            "test": {
                "right": int(right.sum()),
                "photos": len(right),
                "per_class": {name: round(share, 4) for name, share in per_class.items()},
            },
            "demo_photos": {"right": int(right_photos.sum()), "photos": len(photos)},
        },
    }
    (args.assets / "model.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts["accuracy"]), facts["weights"]["bytes"], "bytes")


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    cache = args.out / "cache"
    if not (cache / "labels.npy").exists():
        build_cache(args, cache)
        print(f"cache: {time.perf_counter() - started:.0f} s", flush=True)
    test = load_views(list_photos(args.data / "test"))
    student = train(args, Batches(cache, args.batch_size, args.seed), test)
    export(args, student, test)
    seconds, threads = time.perf_counter() - started, torch.get_num_threads()
    print(f"all: {seconds:.0f} s, {threads} threads, torch {torch.__version__}, timm {timm.__version__}")


if __name__ == "__main__":
    main()
