"""What a change of the budget costs with a gated weight delta: merging it into ViT-Tiny and ViT-B, in milliseconds.

    python bench/merging_cost.py --threads 1 --out results/merging_cost.json

Weights and deltas are random. For each model: the median and the spread of a change between two budgets below 1, of a
change from 1.0 and of one back to 1.0, and beside them one image of the dense model. About a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.backbones import adapt, signature
from patchlife.backbones.gated_training import add_gated_delta
from patchlife.backbones.gates import ramps_down_to
from patchlife.backbones.weight_delta import WeightDelta, delta_between
from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic

GATES = ramps_down_to(0.3)

MODELS = ("vit_tiny_patch16_224", "vit_base_patch16_224")


@torch.no_grad()
def gated(name: str, rank: int) -> SlimModel:
    """A model with a random gated delta of this rank, at budget 1.0."""
    vit, student = (timm.create_model(name).eval() for _ in range(2))
    student.load_state_dict(vit.state_dict())
    model, trained = wrap(vit, LifeConfig(budget=1.0)), adapt(student)
    add_gated_delta([*trained.blocks[model.start :], trained.final_norm], rank, GATES)
    for parameter_name, parameter in student.named_parameters():
        if parameter_name.endswith((".up", ".shift")):
            parameter.normal_(std=0.01)
    return model.use_delta(WeightDelta(delta_between(trained, model.backbone), signature(model.backbone), gates=GATES))


def milliseconds(rounds: int, prepare: Callable[[], object], run: Callable[[], object]) -> dict[str, float]:
    """Median, least and largest time of ``run``, each time after ``prepare``."""
    times = []
    for _ in range(rounds + 1):
        prepare()
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    times = times[1:]  # without the warm-up
    return {
        "median": round(statistics.median(times), 2),
        "least": round(min(times), 2),
        "largest": round(max(times), 2),
    }


@torch.inference_mode()
def measured(name: str, rank: int, rounds: int) -> dict[str, object]:
    """The times of a model."""
    model = gated(name, rank)
    assert model.delta is not None
    image = torch.randn(1, 3, 224, 224)

    def at(budget: float) -> Callable[[], object]:
        return lambda: model.set_budget(budget)

    return {
        "model": name,
        "rank": rank,
        "delta_megabytes": round(model.delta.size / 1e6, 2),
        "from_0.7_to_0.5": milliseconds(rounds, at(0.7), at(0.5)),
        "from_1_to_0.5": milliseconds(rounds, at(1.0), at(0.5)),
        "from_0.5_to_1": milliseconds(rounds, at(0.5), at(1.0)),
        "same_budget": milliseconds(rounds, at(0.5), at(0.5)),
        "one_dense_image": milliseconds(rounds, at(1.0), lambda: model(image)),
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = [measured(name, options.rank, options.rounds) for name in MODELS]
    result = {"kind": "merging-cost", "models": models, "conditions": conditions(torch.device("cpu"))}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        write_atomic(options.out, text + "\n")


if __name__ == "__main__":
    main()
