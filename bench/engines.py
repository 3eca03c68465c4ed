"""Benchmark of exported models: speed relative to the dense model in the same engine, int8, accuracy, memory.

    python bench/engines.py --checkpoint vit_tiny.safetensors --data in20/val --adapter my-adapter \
        --out results/engines_cpu.json                                   # about 15 minutes on 2 cores, idle
    python bench/engines.py --model vit_tiny_patch16_224 --batches 1 --rounds 5   # a quick run

The result states whether the processor adds int8 products in 32 bits (VNNI) or in 16, which is slower.

Speed is measured with random weights, alternating between the models in one run. Accuracy is measured if a ViT-Tiny
checkpoint and labelled photos (one folder per class) are given.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve shared cores

import numpy as np
import timm
import torch

from patchlife import LifeConfig, SlimModel, __version__, wrap
from patchlife.cli.export import prepared_photos
from patchlife.config import ModelConfig
from patchlife.data import list_photos
from patchlife.evaluation.memory import peak_bytes
from patchlife.evaluation.timing import Timing, alternate, conditions
from patchlife.export.exporter import AGREEMENT, build_file
from patchlife.export.parity import sample_images
from patchlife.io.files import write_atomic
from patchlife.runtime import Engine
from patchlife.runtime.metadata import metadata_of
from patchlife.runtime.opening import open_pipeline
from patchlife.runtime.pipeline import Pipeline
from patchlife.runtime.sessions import OnnxSession, open_session
from patchlife.runtime.tensor_module import tensor_module

KINDS = ("onnx", "openvino")
FROM_BLOCK = " from block "  # followed by a number: the blocks before stay in float
TIME_AT_MOST = {"onnx": 0.53, "openvino": 0.54}  # time of the slimmed over the dense model, float32
INT8_AT_LEAST = 3.0  # speed relative to dense float32
DROP_AT_MOST = 1.0  # points of top-1 that int8 loses beyond the float32 slimmed model
MEMORY_AT_MOST = 1.1  # adaptive over fixed, batch 64


def engine_of(model: SlimModel, kind: Any, form: str, calibration: torch.Tensor, threads: int) -> Engine:
    """An engine for ``model``. It is not compared with the model, because int8 does not agree for random weights.

    ``form`` is a precision, optionally followed by FROM_BLOCK and a block.
    """
    precision, _, block = form.partition(FROM_BLOCK)
    metadata = replace(metadata_of(model, kind, precision=precision), int8_from=int(block or 0))
    content = build_file(tensor_module(model), metadata, calibration)
    return Engine(open_session(kind, content, threads), metadata)


def int8_forms(model: SlimModel, kind: str) -> list[str]:
    """The forms of int8 that `export` tries: all blocks, then with more and more of the first blocks in float."""
    dynamic = ["int8-dynamic", *(f"int8-dynamic{FROM_BLOCK}{block}" for block in range(1, model.start + 1))]
    static = ["int8-static", f"int8-static{FROM_BLOCK}{model.start}"] if kind == "openvino" else []
    return dynamic + static


def speeds(name: str, budget: float, batches: list[int], rounds: int, patience: float, threads: int) -> list[Timing]:
    """Times for each engine and batch size: dense float32 first, then all other forms, alternating."""
    vit = timm.create_model(name).eval()
    models = {
        "dense": wrap(vit, LifeConfig(budget=1.0)),
        "slimmed": wrap(vit, LifeConfig(budget=budget)),
        "slimmed, no merging": wrap(vit, LifeConfig(budget=budget, merge=False)),
    }
    images, timings = sample_images(8, 3, models["dense"].backbone.image_size), []
    common = [(key, "fp32") for key in models] + [("dense", "int8-dynamic")]
    for kind in KINDS:
        entries = [*common, *(("slimmed", form) for form in int8_forms(models["slimmed"], kind))]
        runs = {f"{key}, {form}": engine_of(models[key], kind, form, images, threads) for key, form in entries}
        for batch in batches:
            draw = np.random.default_rng(0).standard_normal((batch, *images.shape[1:]), np.float32)
            conditions_of_run = {"model": name, "engine": kind, "batch": batch, "budget": budget}
            conditions_of_run["schedule"] = str(models["slimmed"].schedule())
            contestants = {label: partial(run, draw) for label, run in runs.items()}
            timings.append(alternate(contestants, rounds=rounds, patience=patience, metadata=conditions_of_run))
    return timings


def accuracy(pipeline: Pipeline, data: Path, calibration: Path | None, limit: int, threads: int) -> list[dict]:
    """Top-1 of the slimmed model in each engine and form, and agreement of int8 with float32 in the same engine.

    Static int8 is calibrated on the photos in ``calibration``, if given.
    """
    photos, images = prepared_photos(pipeline, list_photos([str(data)]), limit)
    truth = np.array(pipeline.labels.classes_of(photos))
    calibration_images = images[::16]
    if calibration is not None:
        _, calibration_images = prepared_photos(pipeline, list_photos([str(calibration)]), 128)
    rows = []
    for kind in KINDS:
        predicted: dict[str, np.ndarray] = {}
        for form in ("fp32", *int8_forms(pipeline.model, kind)):
            engine = engine_of(pipeline.model, kind, form, calibration_images, threads)
            predicted[form] = np.concatenate([engine(batch.numpy()).logits.argmax(1) for batch in images.split(16)])
            top1, agreement = ((predicted[form] == other).mean() for other in (truth, predicted["fp32"]))
            rows.append({"engine": kind, "form": form, "photos": len(photos)})
            rows[-1] |= {"top1": round(100 * float(top1), 2), "agreement": round(100 * float(agreement), 2)}
    return rows


def memory(name: str, budget: float, batch: int = 64) -> dict[str, float]:
    """Peak bytes of activations, adaptive and fixed, at the same mean budget."""
    model = wrap(timm.create_model(name).eval(), LifeConfig(budget=budget))
    images = sample_images(batch, 3, model.backbone.image_size)
    with torch.inference_mode():
        fixed = peak_bytes(lambda: model(images))
        model.calibrate([images]).set_mode("adaptive")
        return {"fixed": fixed, "adaptive": peak_bytes(lambda: model(images))}


def bits_of_sums() -> int:
    """Number of bits in which this processor adds the products of two neighbouring inputs: 32, or 16 without VNNI."""
    from onnx import TensorProto, helper, numpy_helper

    arrays = {"w": np.full((2, 1), 127, np.int8), "one": np.float32(1), "scale": np.ones(1, np.float32)}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    node = helper.make_node("MatMulIntegerToFloat", ["x", *arrays], ["y"], domain="com.microsoft")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 2])
    graph = helper.make_graph([node], "g", [x], [helper.make_empty_tensor_value_info("y")], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    result = OnnxSession(model.SerializeToString()).run(np.full((1, 2), 255, np.uint8))[0]
    return 32 if result.item() == 2 * 255 * 127 else 16


def verdicts(timings: list[Timing], rows: list[dict], peaks: dict[str, float]) -> list[dict]:
    """Each target with the measured value; null for what needs a GPU."""
    results = []

    def add(what: str, target: str, measured: float | None, met: bool | None) -> None:
        results.append({"what": what, "target": target, "measured": measured, "met": met})

    for timing in timings:
        kind, batch = timing.conditions["engine"], timing.conditions["batch"]
        for name in ("slimmed", "slimmed, no merging"):
            ratio, target = round(1 / timing.ratios[f"{name}, fp32"].median, 3), TIME_AT_MOST[kind]
            add(f"{kind} fp32, {name}, time over dense, batch {batch}", f"<= {target}", ratio, ratio <= target)
        for name in [name for name in timing.ratios if name.startswith("slimmed, int8")]:
            speed, form = round(timing.ratios[name].median, 2), name.removeprefix("slimmed, ")
            what = f"{kind} {form} + slimmed, speed over dense fp32, batch {batch}"
            add(what, f">= {INT8_AT_LEAST}", speed, speed >= INT8_AT_LEAST)
    for kind in KINDS:
        of_kind = {row["form"]: row for row in rows if row["engine"] == kind}
        for form in [form for form in of_kind if form != "fp32"]:
            drop, agreement = round(of_kind["fp32"]["top1"] - of_kind[form]["top1"], 2), of_kind[form]["agreement"]
            what, least = f"{kind} {form}: top-1 agreement with fp32, %", 100 * AGREEMENT
            add(what, f">= {least:g}", agreement, agreement >= least)
            add(f"{kind} {form}: points of top-1 lost", f"<= {DROP_AT_MOST}", drop, drop <= DROP_AT_MOST)
    ratio = round(peaks["adaptive"] / peaks["fixed"], 3)
    what = "peak memory of activations, adaptive over fixed, batch 64"
    add(what, f"<= {MEMORY_AT_MOST}", ratio, ratio <= MEMORY_AT_MOST)
    add("adaptive over fixed, GPU bf16 batch 64", ">= 0.95", None, None)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for each engine and batch size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="of vit_tiny_patch16_224, for accuracy")
    parser.add_argument("--adapter", help="of the same model; the attention scorer if not given")
    parser.add_argument("--accuracy-budget", type=float, default=0.61)
    parser.add_argument("--data", type=Path, help="labelled photos, for accuracy")
    parser.add_argument("--calibration", type=Path, help="other photos, for static int8")
    parser.add_argument("--limit", type=int, default=1000, help="largest number of photos")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict] = []
    if args.checkpoint and args.data:
        life = {"budget": args.accuracy_budget}
        config = ModelConfig(args.adapter or "vit_tiny_patch16_224", args.checkpoint, life=life)
        rows = accuracy(open_pipeline(config), args.data, args.calibration, args.limit, args.threads)
    timings = speeds(args.model, args.budget, args.batches, args.rounds, args.patience, args.threads)
    peaks = memory(args.model, args.budget)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    versions = {name: version_of(name) for name in ("onnxruntime", "onnx", "onnxscript", "openvino", "nncf")}
    result = {
        "conditions": {
            **conditions("cpu"),
            "bits_of_int8_sums": bits_of_sums(),
            **versions,
            "patchlife": __version__,
            "settings": settings,
        },
        "targets": verdicts(timings, rows, peaks),
        "accuracy": rows,
        "peak_bytes": peaks,
        "timings": [timing.to_dict() for timing in timings],
    }
    for line in result["targets"]:
        print(f"{line['what']}: {line['measured']} (target {line['target']})")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")


def version_of(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
