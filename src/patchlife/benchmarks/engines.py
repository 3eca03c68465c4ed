"""Prepares a model to run repeatedly on one batch: in torch, compiled, as a CUDA graph or exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ..slimming import SlimModel

__all__ = ["EXPORTED", "prepared"]

EXPORTED = ("onnx", "openvino")
"""Engines that run an exported graph, in float32 on the CPU."""


def prepared(model: nn.Module, engine: str, images: Tensor) -> Callable[[], object]:
    """A function that runs ``model`` on ``images``.

    Args:
        model: on the device of ``images``.
        engine: eager, compile, graph (compiled, then a CUDA graph), eager-graph, onnx or openvino. The last two
            export on the first run and keep the file (see `export.cache`); the export of a `SlimModel` is compared with
            the model.
        images: one batch.
    """
    if engine in EXPORTED:
        return _exported(model, engine, images)
    run = model.output if isinstance(model, SlimModel) else model
    if engine == "eager":
        return lambda: run(images)
    if engine == "eager-graph":
        return _graphed(run, images)
    compiled = torch.compile(run, dynamic=False)
    if engine == "graph":
        return _graphed(compiled, images)
    return lambda: compiled(images)


@torch.inference_mode(False)  # export refuses inference tensors
@torch.no_grad()
def _exported(model: nn.Module, engine: str, images: Tensor) -> Callable[[], object]:
    from ..export.cache import cached_engine, cached_session
    from ..runtime.metadata import Format

    kind, array = cast(Format, engine), images.clone().numpy()
    if isinstance(model, SlimModel):
        run = cached_engine(model, kind, lives=False)
        return lambda: run(array)
    session = cached_session(model, kind, torch.from_numpy(array))
    return lambda: session.run(array)


@torch.inference_mode()
def _graphed(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """Record the model's kernels in a CUDA graph, and return a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(images)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
