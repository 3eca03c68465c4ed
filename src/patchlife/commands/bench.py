"""``patchlife bench``: this and other methods side by side on this machine, or a report from earlier results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config import ModelConfig
from ..errors import ConfigError
from ..files import is_exported
from ..measure.config import BenchConfig
from .common import progress, say

if TYPE_CHECKING:
    from torch import Tensor

    from ..life import SlimModel
    from ..measure.peers import Method
    from ..measure.result import Result
    from ..models import ReadyModel

__all__ = ["run"]

_PHOTOS = 32  # in a batch, when schedules are judged


def run(config: BenchConfig) -> int:
    """Measure and report, or only report; returns the exit code."""
    from ..deploy.extras import need_for_export
    from ..measure.engines import EXPORTED
    from ..measure.report import check_plotting, text_report, write_report
    from ..measure.result import Result

    check_plotting()  # before an hour of measuring, not after
    if config.engine in EXPORTED and not config.report:
        need_for_export(config.engine)
    config.out.mkdir(parents=True, exist_ok=True)
    if config.report:
        results = {path.stem: Result.load(path) for path in config.report}
        page = write_report(results, config.out / "report")
    else:
        path = _fresh(config)
        results = {path.stem: measure(config, path)}
        page = write_report(results, path.with_suffix(""))
        say(f"numbers: {path}")
    for result in results.values():
        print(text_report(result))
    print(f"open {page.absolute()}")
    return 0


def measure(config: BenchConfig, path: Path) -> Result:
    """Everything that was asked for. The file is written after each step, so an interrupted run leaves what it has."""
    from ..measure.advice import advise
    from ..measure.compare import race
    from ..measure.result import About, Result

    ready, adapter = _open(config)
    methods = _methods(config, adapter)
    photos, truth = _photos(config, ready)
    about = {m.name: About(m.title, m.source, m.training, m.trained, m.ours) for m in methods}
    result = Result(ready.name, _weights(config, ready), _conditions(config, ready, photos), about)
    backbone = ready.model.backbone
    slimmed = _own(ready, adapter)
    for batch in config.batch_sizes if config.speed else ():
        images = _images(config, ready, photos, batch)
        for target in config.flops:
            say(f"timing {len(methods)} methods, batch {batch}, {target:g} of the dense FLOPs")
            with _fresh_compiler():
                result.speed += race(backbone, methods, images, target, config.engine, config.rounds, config.patience)
            result.save(path)
        if config.advice:
            say(f"timing blocks at batch {batch}, for advice")
            few = 3 if photos else 1
            for target in config.flops:
                with _fresh_compiler():
                    result.advice.append(advise(slimmed, images, target, config.engine, few))
    if photos and config.advice:
        _afford(result, config, ready, slimmed, photos, truth)
    if photos:
        _judge(result, config, ready, methods, photos, truth)
    result.complete = True
    result.save(path)
    return result


def _afford(
    result: Result,
    config: BenchConfig,
    ready: ReadyModel,
    slimmed: SlimModel,
    photos: Sequence[Path],
    truth: Sequence[int],
) -> None:
    """The fastest schedule at each batch size whose top-1 is still good enough."""
    import torch

    from ..images import load_batches
    from ..measure.affordable import affordable, losses

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        say(f"judging the schedules that pay on {len(photos)} photos, for advice")
        steps = -(-len(photos) // _PHOTOS)
        for loaded in progress(load_batches(photos, ready.preprocess, _PHOTOS), steps, None, unit="batch"):
            if loaded.indices:
                yield loaded.images, torch.tensor([truth[i] for i in loaded.indices])

    lost = losses(slimmed, result.advice, ready.model.backbone.vit, batches())
    result.affordable = affordable(result.advice, lost, config.max_drop)


def _judge(
    result: Result,
    config: BenchConfig,
    ready: ReadyModel,
    methods: Sequence[Method],
    photos: Sequence[Path],
    truth: Sequence[int],
) -> None:
    from tqdm import tqdm

    from ..measure.compare import judge

    say(f"judging on {len(photos)} photos")
    result.accuracy, unread = judge(
        ready.model.backbone,
        methods,
        config.flops,
        photos,
        truth,
        ready.preprocess,
        watch=lambda batches, total: iter(tqdm(batches, total=total, unit="batch", disable=not sys.stderr.isatty())),
    )
    result.data = {"folder": str(config.data), "photos": len(photos), "unreadable": unread}


# ---- what to measure


def _open(config: BenchConfig) -> tuple[ReadyModel, Path | None]:
    """The model with an untouched backbone in the wanted precision, and the adapter if MODEL is one."""
    import torch

    from ..measure.engines import EXPORTED
    from ..models import DEMO, open_model

    model, checkpoint, adapter = config.model, config.checkpoint, None
    if is_exported(model):
        raise ConfigError(
            f"{model} is an exported model, and bench builds its methods on a backbone; give the MODEL that it was "
            "made from, with --engine onnx or openvino"
        )
    if Path(model).is_dir():
        from ..backbones import Origin
        from ..life.adapter import read_adapter

        adapter = Path(model)
        about, _ = read_adapter(adapter)
        if not about["origin"]:
            raise ConfigError(f"{adapter} does not say where its backbone came from; bench cannot build it again")
        origin = Origin(**about["origin"])
        model = origin.model
        checkpoint = checkpoint or (Path(origin.checkpoint) if origin.checkpoint else None)
        config = replace(config, pretrained=config.pretrained or origin.pretrained)
    weighty = config.pretrained or checkpoint or model == DEMO
    if config.data and not weighty:
        raise ConfigError(
            "accuracy of random weights means nothing: give --checkpoint FILE or --pretrained with --data"
        )
    settings = ModelConfig(model, checkpoint, config.pretrained, config.labels, config.image_size)
    device = "cpu" if config.engine in EXPORTED else config.device
    ready = open_model(settings, device, random_weights=True)
    ready.model.backbone.vit.to(getattr(torch, config.dtype))
    return ready, adapter


def _own(ready: ReadyModel, adapter: Path | None) -> SlimModel:
    """What advice is about: the backbone with the head, the schedule and the change that the adapter brings, if any."""
    if adapter is None:
        return ready.model
    from ..life.adapter import load

    return load(adapter, ready.model.backbone.vit).eval()


def _methods(config: BenchConfig, adapter: Path | None) -> list[Method]:
    from ..measure.peers import METHODS, learned, trained_dynamicvit

    known = dict(METHODS)
    if config.predictors:
        known["dynamicvit"] = trained_dynamicvit(config.predictors)
    if adapter:
        known |= {m.name: m for m in (learned(adapter, "fixed"), learned(adapter, "adaptive"))}
    unknown = [name for name in config.methods or () if name not in known]
    if unknown:
        raise ConfigError(f"no method is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(["dense", *(config.methods or known)])]


def _photos(config: BenchConfig, ready: ReadyModel) -> tuple[list[Path], list[int]]:
    """Photos and their classes; none without --data."""
    from ..images import list_photos

    if config.data is None:
        return [], []
    photos = list_photos(config.data)
    return photos, ready.labels.classes_of(photos)


def _images(config: BenchConfig, ready: ReadyModel, photos: Sequence[Path], batch: int) -> Tensor:
    """A batch to time on: photos where there are some, noise otherwise."""
    import torch

    from ..images import load_batches
    from ..measure.compare import spread_out

    if photos:
        images = next(load_batches(spread_out(photos, batch), ready.preprocess, batch)).images
        images = images.repeat(-(-batch // max(1, len(images))), 1, 1, 1)[:batch]
    else:
        size = (batch, ready.model.backbone.channels, *ready.model.backbone.image_size)
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return images.to(ready.device, getattr(torch, config.dtype))


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    """What was compiled for one batch size and fraction is of no use for the next, but would fill torch's limit."""
    yield
    import torch

    torch.compiler.reset()


# ---- what to remember about it


def _weights(config: BenchConfig, ready: ReadyModel) -> str:
    from ..models import DEMO

    origin = ready.model.origin
    if ready.name == DEMO:
        return "the package's own"
    if origin and origin.checkpoint:
        return f"{Path(origin.checkpoint).name}, sha256 {(origin.sha256 or '')[:16]}"
    return "timm's own" if origin and origin.pretrained else "random"


def _conditions(config: BenchConfig, ready: ReadyModel, photos: Sequence[Path]) -> dict[str, Any]:
    from ..measure.engines import engine_version
    from ..measure.timing import conditions

    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "patchlife": __version__,
        "command": " ".join(["patchlife", *sys.argv[1:]]),
        **conditions(ready.device),
        "engine": config.engine,
        **engine_version(config.engine),
        "dtype": config.dtype,
        "image_size": list(ready.model.backbone.image_size),
        "images": "photos" if photos else "noise",
        "rounds": config.rounds,
        "patience_seconds": config.patience,
    }


def _fresh(config: BenchConfig) -> Path:
    """A file name that no earlier run has."""
    name = Path(config.model).name
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return config.out / f"bench-{name}-{config.engine}-{stamp}.json"
