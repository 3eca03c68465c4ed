"""Draw scenes of CamVid: photo, truth, dense answer, slimmed answer and life map, side by side.

    python recipes/camvid/pictures.py --dense runs/camvid/dense.safetensors --budget 0.5 --out runs/camvid/scenes.png

CamVid's photos may not be passed on with this project (CC BY-NC 4.0): keep the pictures in the git-ignored runs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import camvid
import dense_model
import methods
import torch
from evaluate import METHODS
from fit import PREPROCESS
from PIL import Image

from patchlife.visual.answers import class_colours, draw_answers
from patchlife.visual.layout import stacked


@torch.inference_mode()
def row(scenes: camvid.Scenes, index: int, head: dense_model.Head, dense: methods.Method, slimmed: methods.Method):
    """One scene as a row of pictures."""
    photos = scenes.photos[index : index + 1]
    answers = {"truth": scenes.labels[index]}
    for name, method in (("dense", dense), ("slimmed", slimmed)):
        answers[name] = camvid.as_pixels(head(method.maps(photos))).argmax(dim=1)[0]
    lives = slimmed.model.lives(camvid.as_input(photos))
    numbered = [(name, answer.numpy()) for name, answer in answers.items()]
    colours = class_colours(len(camvid.CLASSES))
    return draw_answers(scenes.paths[index], numbered, lives, colours, PREPROCESS, width=320)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/camvid"))
    parser.add_argument("--dense", type=Path, default=Path("runs/camvid/dense.safetensors"))
    parser.add_argument("--adapter", type=Path, help="folder of an adapter; default: nothing trained")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/camvid/scenes.png"))
    options = parser.parse_args()
    backbone, head = dense_model.load(options.dense)
    scenes = camvid.load(options.data, "val", options.scenes).evaluated()
    dense = methods.dense(backbone, head)
    if options.adapter:
        slimmed = methods.fitted(options.adapter)(backbone, head, options.budget)
    else:
        slimmed = METHODS["untrained"](backbone, head, options.budget)
    rows: list[Image.Image] = [row(scenes, index, head, dense, slimmed) for index in range(len(scenes))]
    stacked(rows, gap=6).save(options.out)


if __name__ == "__main__":
    main()
