"""What a slimmed vision encoder saves in a vision-language model: FLOPs, and time in turns with the dense encoder.

    python bench/vision_language.py --out results/vision_language_cpu.json           # about 7 minutes on 2 idle cores
    python bench/vision_language.py --parts whole --out results/vision_language_whole_cpu.json     # the same again

Encoders: SigLIP-so400m/14 at 384 px (729 patches) and CLIP-L/14 at 336 px (576 patches). Whole: LLaVA with the SigLIP
encoder and a language model of the shape of Qwen2-0.5B, for one photo, a prompt and new tokens. Models are built from
their configurations with random weights: nothing is downloaded, and time does not depend on weights.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow shared cores down

import torch
import transformers
from torch import Tensor

from patchlife import LifeConfig, SlimModel, __version__, flops, wrap
from patchlife.benchmarks.baselines.no_decision_bound import NoDecisionBound
from patchlife.evaluation.timing import Timing, alternate
from patchlife.io.files import write_atomic

Shape = dict[str, Any]

ENCODERS: dict[str, Shape] = {
    "siglip-so400m/14 at 384 px": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "clip-l/14 at 336 px": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
}
LANGUAGE: Shape = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
TINY: Shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
TINY_IMAGE: Shape = {"image_size": 96, "patch_size": 14}
TINY_LANGUAGE: Shape = {"num_key_value_heads": 2, "vocab_size": 128}

Runs = dict[str, Callable[[], object]]


def photo(shape: Shape, batch: int) -> Tensor:
    """Random pixel values."""
    return torch.randn(batch, 3, shape["image_size"], shape["image_size"], generator=torch.Generator().manual_seed(1))


def encoder(shape: Shape) -> Any:
    """A vision encoder with random weights."""
    settings = dict(shape)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    return transformers.AutoModel.from_config(config).eval()


def llava(vision: Shape, language: Shape) -> Any:
    """LLaVA that reads all patches of the last layer but one of its encoder."""
    image_token = language["vocab_size"] - 1
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=image_token,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def gflops(model: SlimModel) -> dict[str, float]:
    """GFLOPs per image, dense and slimmed."""
    counted = flops(model)
    return {"dense": counted.dense / 1e9, "slimmed": counted.slimmed / 1e9, "fraction": counted.budget}


def measure_encoder(name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Time of one encoder: dense, and at each budget slimmed and the no-decision bound."""
    tower, images = encoder(shape), photo(shape, args.batch)
    runs: Runs = {"dense": partial(tower, images)}
    counted, schedules = {}, {}
    for budget in args.budgets:
        slim = wrap(tower, LifeConfig(budget=budget))
        runs[f"budget {budget:g}"] = partial(slim, images)
        runs[f"budget {budget:g}, no-decision bound"] = partial(NoDecisionBound(slim.backbone, slim.schedule()), images)
        counted[f"budget {budget:g}"], schedules[f"budget {budget:g}"] = gflops(slim), str(slim.schedule())
    rows, cols = slim.backbone.grid
    metadata = {"encoder": name, "shape": shape, "patches": rows * cols, "gflops": counted, "schedules": schedules}
    timing = _timed(runs, args, metadata, tower)
    over_bound = {
        f"budget {budget:g}": round(_ratio(timing, f"budget {budget:g}", f"budget {budget:g}, no-decision bound"), 3)
        for budget in args.budgets
    }
    return {**timing.to_dict(), "throughput_over_bound": over_bound}


def measure_whole(encoder_name: str, vision: Shape, language: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Time of a whole generation and of its encoder, dense and at each budget; the encoder's share of the time."""
    model, images = llava(vision, language), photo(vision, args.batch)
    tower = model.model.vision_tower
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    words = torch.ones(args.batch, args.prompt, dtype=torch.long)
    image = torch.full((args.batch, patches), model.config.image_token_id)
    given = {"input_ids": torch.cat((image, words), dim=1), "pixel_values": images}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    encoders = {"dense": tower} | {f"budget {b:g}": wrap(tower, LifeConfig(budget=b)) for b in args.budgets}
    runs: Runs = {}
    for name, chosen in encoders.items():
        runs[f"{name}, whole"] = partial(_generate, model, chosen, given, args.new_tokens)
        runs[f"{name}, encoder"] = partial(chosen, images, output_hidden_states=-2)  # as LLaVA calls it
    metadata = {"encoder": encoder_name, "shape": vision, "language_model": language, "patches": patches}
    metadata |= {"prompt_tokens": patches + args.prompt, "new_tokens": args.new_tokens}
    timing = _timed(runs, args, metadata, model)
    seconds = {name: spread.median for name, spread in timing.seconds.items()}
    shares = {name: round(seconds[f"{name}, encoder"] / seconds[f"{name}, whole"], 3) for name in encoders}
    return {**timing.to_dict(), "encoder_share_of_time": shares}


def _generate(model: Any, tower: Any, given: dict[str, Tensor], new_tokens: int) -> Tensor:
    model.model.vision_tower = tower
    return model.generate(
        **given, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )


def _timed(runs: Runs, args: argparse.Namespace, metadata: dict[str, Any], model: Any) -> Timing:
    common = {"batch": args.batch, "dtype": "float32", "mode": "fixed", "merge": True}
    common |= {"attention": model.config._attn_implementation, "transformers": version("transformers")}
    return alternate(runs, rounds=args.rounds, warmup=1, patience=args.patience, metadata={**metadata, **common})


def _ratio(timing: Timing, run: str, reference: str) -> float:
    """Throughput of ``run`` over that of ``reference``."""
    return timing.ratios[run].median / timing.ratios[reference].median


def report(result: dict[str, Any]) -> None:
    """Print one measurement."""
    conditions = result["conditions"]
    print(f"\n{conditions['encoder']}, {conditions['patches']} patches, batch {conditions['batch']}")
    for run, seconds in result["seconds"].items():
        speed = "too noisy" if run in result["noisy"] else f"{result['ratios'][run]['median']:.2f}x"
        counted = conditions.get("gflops", {}).get(run)
        cost = f"{counted['slimmed']:7.1f} of {counted['dense']:.1f} GFLOPs" if counted else ""
        print(f"  {run:32} {1e3 * seconds['median']:9.1f} ms  {speed:10} {cost}")
    for title in ("throughput_over_bound", "encoder_share_of_time"):
        for run, value in result.get(title, {}).items():
            print(f"  {title.replace('_', ' ')}, {run}: {value}")


def shapes(tiny: bool) -> tuple[dict[str, Shape], Shape]:
    """(encoders, language model), at their real size or tiny."""
    if not tiny:
        return ENCODERS, LANGUAGE
    return {name: shape | TINY | TINY_IMAGE for name, shape in ENCODERS.items()}, LANGUAGE | TINY | TINY_LANGUAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["encoders", "whole"], default=["encoders"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.75, 0.6, 0.45])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="text tokens of the prompt, beside the photo's")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--patience", type=float, default=150, help="seconds for each model; 5 rounds always run")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    encoders, language = shapes(args.tiny)
    results = {}
    torch.manual_seed(0)
    if "encoders" in args.parts:
        results["encoders"] = [measure_encoder(name, shape, args) for name, shape in encoders.items()]
    if "whole" in args.parts:
        name, shape = next(iter(encoders.items()))
        results["whole"] = [measure_whole(name, shape, language, args)]
    for result in (one for part in results.values() for one in part):
        report(result)
    if args.out:
        page = {"patchlife": __version__, "bench": "vision_language", **results}
        write_atomic(args.out, json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main()
