"""Evaluate segmentations of CamVid's scenes: mIoU, IoU of each class, and how far the answers are from the dense ones.

    python recipes/camvid/evaluate.py --dense runs/camvid/dense.safetensors --methods untrained,tome --budgets 0.6,0.5

Writes one JSON file. A finished (method, budget) is not measured again, so an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import camvid
import dense_model
import methods
import segmentation
import torch
from torch import Tensor

from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic

BATCH = 4
BUDGETS = (0.75, 0.6, 0.5, 0.4)
METHODS: dict[str, Callable[..., methods.Method]] = {
    "untrained": methods.untrained,
    "equal-importance": methods.equal_importance,
    "tome": methods.tome,
    "random": methods.random,
    "uniform-grid": methods.uniform_grid,
    "smaller-input": methods.smaller_input,
}


class Evaluation:
    """Compares methods with the dense model on the same scenes; the dense answers are computed once.

    Attributes:
        matrices: the dense model's confusion matrix of each scene.
        logits: the dense head's answers, in half precision; they are enlarged to pixels when they are needed.
    """

    def __init__(self, scenes: camvid.Scenes, head: dense_model.Head, dense: methods.Method) -> None:
        self.scenes, self.head, self.dense = scenes, head, dense
        self.logits = torch.cat([self._head_answers(dense, batch).half() for batch in self._batches()])
        answers = [camvid.as_pixels(self.logits[batch].float()).argmax(dim=1) for batch in self._batches()]
        self.answers = torch.cat([each.byte() for each in answers])
        self.matrices = self._confusion(self.answers)

    def score(self, method: methods.Method) -> dict[str, Any]:
        """Everything that is reported of a method, as values for JSON."""
        answers, divergences = [], []
        for batch in self._batches():
            logits = camvid.as_pixels(self._head_answers(method, batch))
            answers.append(logits.argmax(dim=1).byte())
            divergences.append(segmentation.divergence(camvid.as_pixels(self.logits[batch].float()), logits))
        agreement = (torch.cat(answers) == self.answers).double().mean()
        matrices = self._confusion(torch.cat(answers))
        low, high = segmentation.interval_of_drop(self.matrices, matrices)
        return self.summary(method, matrices) | {
            "drop": self.dense_miou - _miou(matrices),
            "drop_interval": [low, high],
            "agreement": float(agreement),
            "kl": float(torch.cat(divergences).mean()),
        }

    def summary(self, method: methods.Method, matrices: Tensor) -> dict[str, Any]:
        """Cost, mIoU and IoU of each class."""
        each = segmentation.iou(matrices.sum(dim=0).double()).tolist()
        return {
            "setting": method.setting,
            "flops": method.flops,
            "fraction": method.flops / self.dense.flops,
            "backbone_fraction": method.backbone_flops / self.dense.backbone_flops,
            "miou": _miou(matrices),
            "iou": dict(zip(camvid.CLASSES, each, strict=True)),
        }

    @property
    def dense_miou(self) -> float:
        """mIoU of the dense model."""
        return _miou(self.matrices)

    def _batches(self) -> list[slice]:
        return [slice(first, first + BATCH) for first in range(0, len(self.scenes), BATCH)]

    @torch.inference_mode()
    def _head_answers(self, method: methods.Method, batch: slice) -> Tensor:
        return self.head(method.maps(self.scenes.photos[batch]))

    def _confusion(self, answers: Tensor) -> Tensor:
        parts = self._batches()
        return torch.cat(
            [segmentation.confusion(answers[part].long(), self.scenes.labels[part].long()) for part in parts]
        )


def _miou(matrices: Tensor) -> float:
    return float(segmentation.mean_iou(matrices.sum(dim=0).double()))


def main() -> None:
    options = arguments().parse_args()
    backbone, head = dense_model.load(options.dense)
    scenes = camvid.load(options.data, options.split, options.limit).evaluated()
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"scores": []}
    evaluation = Evaluation(scenes, head, methods.dense(backbone, head))
    result["dense"] = evaluation.summary(evaluation.dense, evaluation.matrices)
    result |= {"scenes": len(scenes), "split": options.split, "input": camvid.INPUT, "conditions": conditions()}
    settings = json.loads(options.settings)
    builders = METHODS | {folder.name: methods.fitted(folder) for folder in options.adapters}
    for name in [*filter(None, options.methods.split(",")), *(folder.name for folder in options.adapters)]:
        for budget in map(float, options.budgets.split(",")):
            key = {"method": name, "budget": budget, "settings": settings}
            if any({part: score[part] for part in key} == key for score in result["scores"]):
                continue
            started = time.perf_counter()
            score = key | evaluation.score(builders[name](backbone, head, budget, **settings))
            result["scores"].append(score)
            write_atomic(options.out, json.dumps(result, indent=1) + "\n")
            print(line(score), f"{time.perf_counter() - started:.0f} s", flush=True)


def line(score: dict[str, Any]) -> str:
    """A score in one line; IoU and drops in points."""
    thin = " ".join(f"{name} {100 * score['iou'][name]:.1f}" for name in camvid.THIN)
    low, high = score["drop_interval"]
    return (
        f"{score['method']:14} {score['budget']:.2f} {json.dumps(score['settings'])} mIoU {100 * score['miou']:.2f} "
        f"drop {100 * score['drop']:.2f} ({100 * low:.2f} to {100 * high:.2f}) agree {100 * score['agreement']:.2f} "
        f"KL {score['kl']:.4f} | {thin} | {score['setting']}"
    )


def arguments() -> argparse.ArgumentParser:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/camvid"))
    parser.add_argument("--split", default="val", help="folder of --data that is evaluated")
    parser.add_argument("--dense", type=Path, default=Path("runs/camvid/dense.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/camvid/scores.json"))
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated: " + ", ".join(METHODS))
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="folders; each is evaluated by its name")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--settings", default="{}", help='JSON arguments of the methods, such as {"restore": "target"}')
    parser.add_argument("--limit", type=int, help="evaluate on this many scenes only")
    return parser


if __name__ == "__main__":
    main()
