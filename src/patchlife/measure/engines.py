"""Ways to run a model on one batch over and over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["prepared"]


def prepared(model: nn.Module, engine: str, images: Tensor) -> Callable[[], Tensor]:
    """A function that runs ``model`` on ``images``: eager, compile, or graph (compiled, then a CUDA graph)."""
    if engine == "eager":
        return lambda: model(images)
    if engine == "eager-graph":
        return _graphed(model, images)
    compiled = torch.compile(model, dynamic=False)
    if engine == "graph":
        return _graphed(compiled, images)
    return lambda: compiled(images)


@torch.inference_mode()
def _graphed(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """Record the model's kernels once, replay them at a single launch."""
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
