"""``patchlife bench``: compare PatchLife and other methods on this machine, or draw a report of earlier results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import BackboneConfig, BenchConfig, ModelConfig
from ..errors import ConfigError
from ..extras import require, require_export
from ..io.exported_files import is_exported
from ..version import __version__
from .common import classes_of, find_photos, progress, say

if TYPE_CHECKING:
    from torch import Tensor

    from ..benchmarks.baselines import Method
    from ..benchmarks.result import Result
    from ..runtime.pipeline import Pipeline
    from ..slimming import SlimModel

__all__ = ["run"]

_BATCH_SIZE = 32  # of the photos on which schedules are evaluated


def run(config: BenchConfig) -> int:
    """Measure and report, or only report; returns the exit code."""
    require("matplotlib", "bench", "patchlife bench")  # before measuring, which may take an hour
    if config.engine in ("onnx", "openvino") and not config.report:
        require_export(config.engine, what=f"--engine {config.engine}")
    from ..benchmarks.report import text_report, write_report
    from ..benchmarks.result import Result

    config.out.mkdir(parents=True, exist_ok=True)
    if config.report:
        results = {path.stem: Result.load(path) for path in config.report}
        page = write_report(results, config.out / "report")
    else:
        path = _new_path(config)
        results = {path.stem: measure(config, path)}
        page = write_report(results, path.with_suffix(""))
        say(f"results: {path}")
    for result in results.values():
        print(text_report(result))
    print(f"open {page.absolute()}")
    return 0


def measure(config: BenchConfig, path: Path) -> Result:
    """Run all measurements of ``config``. The file is written after each step, so an interrupted run keeps results."""
    from ..benchmarks.comparison import time_methods
    from ..benchmarks.result import MethodInfo, Result
    from ..benchmarks.schedule_search import advise

    pipeline, adapter = _open(config)
    methods = _methods(config, adapter)
    photos, truth = _photos(config, pipeline)
    infos = {m.name: MethodInfo(m.title, m.source, m.training, m.trained, m.ours) for m in methods}
    result = Result(pipeline.name, _weights(config, pipeline), _conditions(config, pipeline, photos), infos)
    backbone = pipeline.model.backbone
    slimmed = _slimmed(pipeline, adapter)
    for batch in config.batch_sizes if config.speed else ():
        images = _images(config, pipeline, photos, batch)
        for target in config.flops:
            say(f"timing {len(methods)} methods, batch {batch}, {target:g} of the dense FLOPs")
            with _compiler_reset():
                result.speed += time_methods(
                    backbone, methods, images, target, config.engine, config.rounds, config.patience
                )
            result.save(path)
        if config.advice:
            say(f"timing blocks at batch {batch}, for --advice")
            schedules = 3 if photos else 1
            for target in config.flops:
                with _compiler_reset():
                    result.advice.append(advise(slimmed, images, target, config.engine, schedules))
    if photos and config.advice:
        _choose_within_max_drop(result, config, pipeline, slimmed, photos, truth)
    if photos:
        _evaluate(result, config, pipeline, methods, photos, truth)
    result.complete = True
    result.save(path)
    return result


def _choose_within_max_drop(
    result: Result,
    config: BenchConfig,
    pipeline: Pipeline,
    slimmed: SlimModel,
    photos: Sequence[Path],
    truth: Sequence[int],
) -> None:
    """Add the fastest schedule at each batch size whose top-1 drops by at most ``config.max_drop`` points."""
    import torch

    from ..benchmarks.baselines.dense import Dense
    from ..benchmarks.fastest_within_drop import fastest_within_drop, measure_drops
    from ..data import load_batches

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        say(f"evaluating the schedules that pay on {len(photos)} photos, for --advice")
        steps = -(-len(photos) // _BATCH_SIZE)
        for loaded in progress(load_batches(photos, pipeline.preprocess, _BATCH_SIZE), steps, None, unit="batch"):
            if loaded.indices:
                yield loaded.images, torch.tensor([truth[i] for i in loaded.indices])

    drops = measure_drops(slimmed, result.advice, Dense(pipeline.model.backbone), batches())
    result.within_max_drop = fastest_within_drop(result.advice, drops, config.max_drop)


def _evaluate(
    result: Result,
    config: BenchConfig,
    pipeline: Pipeline,
    methods: Sequence[Method],
    photos: Sequence[Path],
    truth: Sequence[int],
) -> None:
    """Add the accuracy of all methods."""
    from tqdm import tqdm

    from ..benchmarks.comparison import evaluate_methods

    say(f"evaluating {len(methods)} methods on {len(photos)} photos")
    result.accuracy, unread = evaluate_methods(
        pipeline.model.backbone,
        methods,
        config.flops,
        photos,
        truth,
        pipeline.preprocess,
        progress=lambda batches, total: iter(tqdm(batches, total=total, unit="batch", disable=not sys.stderr.isatty())),
    )
    result.data = {"folder": str(config.data), "photos": len(photos), "every": config.every, "unreadable": unread}


# ---- what to measure


def _open(config: BenchConfig) -> tuple[Pipeline, Path | None]:
    """The dense model in the dtype of ``config``, and the adapter if MODEL is one."""
    from ..backbones import brings_weights
    from ..benchmarks.engines import EXPORTED
    from ..runtime.demo_model import DEMO
    from ..runtime.opening import adapter_folder, backbone_config, open_pipeline

    if is_exported(config.model):
        raise ConfigError(
            f"{config.model} is an exported model, and bench builds its methods on a backbone; give the MODEL that was "
            "exported, with --engine onnx or openvino"
        )
    given = ModelConfig(*(getattr(config, field.name) for field in fields(BackboneConfig)))
    settings = backbone_config(given)
    has_weights = settings.pretrained or settings.checkpoint or settings.model == DEMO or brings_weights(settings.model)
    if config.data and not has_weights:
        raise ConfigError(
            "--data needs a model with weights, got random weights; add --checkpoint FILE or --pretrained"
        )
    device = "cpu" if config.engine in EXPORTED else config.device
    pipeline = open_pipeline(settings, device, random_weights=True, dtype=config.dtype)
    return pipeline, None if settings.model == DEMO else adapter_folder(config.model)


def _slimmed(pipeline: Pipeline, adapter: Path | None) -> SlimModel:
    """The model whose schedule is searched: with the adapter's scorer, schedule and weight delta, if there is one."""
    if adapter is None:
        return pipeline.model
    from ..adapters import load

    return load(adapter, pipeline.model.backbone.model).eval()


def _methods(config: BenchConfig, adapter: Path | None) -> list[Method]:
    from ..benchmarks.baselines import METHODS, learned, trained_dynamicvit

    known = dict(METHODS)
    if config.predictors:
        known["dynamicvit"] = trained_dynamicvit(config.predictors)
    if adapter:
        known |= {m.name: m for m in (learned(adapter, "fixed"), learned(adapter, "adaptive"))}
    unknown = [name for name in config.methods or () if name not in known]
    if unknown:
        raise ConfigError(f"--methods must be of {', '.join(known)}, got {', '.join(unknown)}")
    return [known[name] for name in dict.fromkeys(["dense", *(config.methods or known)])]


def _photos(config: BenchConfig, pipeline: Pipeline) -> tuple[list[Path], list[int]]:
    """Photos and their classes; two empty lists without --data."""
    if config.data is None:
        return [], []
    photos = find_photos(config.data)
    classes = classes_of(pipeline.labels, photos, config.class_order)
    return photos[:: config.every], classes[:: config.every]


def _images(config: BenchConfig, pipeline: Pipeline, photos: Sequence[Path], batch: int) -> Tensor:
    """A batch for timing: photos if there are any, otherwise noise."""
    import torch

    from ..data import evenly_spaced, load_batches

    if photos:
        images = next(load_batches(evenly_spaced(photos, batch), pipeline.preprocess, batch)).images
        images = images.repeat(-(-batch // max(1, len(images))), 1, 1, 1)[:batch]
    else:
        size = (batch, pipeline.model.backbone.channels, *pipeline.model.backbone.image_size)
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return images.to(pipeline.device, getattr(torch, config.dtype))


@contextmanager
def _compiler_reset() -> Iterator[None]:
    """Discard compiled code afterwards: the next batch size and fraction need other code, and torch keeps few."""
    yield
    import torch

    torch.compiler.reset()


# ---- conditions


def _weights(config: BenchConfig, pipeline: Pipeline) -> str:
    from ..backbones import brings_weights
    from ..runtime.demo_model import DEMO

    origin = pipeline.model.origin
    if pipeline.name == DEMO:
        return "part of patchlife"
    if origin and origin.checkpoint:
        return f"{Path(origin.checkpoint).name}, sha256 {(origin.sha256 or '')[:16]}"
    if origin and brings_weights(origin.model):
        return origin.model
    return "timm (pretrained)" if origin and origin.pretrained else "random"


def _conditions(config: BenchConfig, pipeline: Pipeline, photos: Sequence[Path]) -> dict[str, Any]:
    from ..evaluation.timing import conditions
    from ..runtime.sessions import engine_version

    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "patchlife": __version__,
        "command": " ".join(["patchlife", *sys.argv[1:]]),
        **conditions(pipeline.device),
        "engine": config.engine,
        **engine_version(config.engine),
        "dtype": config.dtype,
        "image_size": list(pipeline.model.backbone.image_size),
        "images": "photos" if photos else "noise",
        "rounds": config.rounds,
        "patience_seconds": config.patience,
    }


def _new_path(config: BenchConfig) -> Path:
    """A path that no earlier run has used."""
    name = Path(config.model).name
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return config.out / f"bench-{name}-{config.engine}-{stamp}.json"
