"""torch.compile for several budgets: a graph for each budget and batch size, kept, so that going back costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..slimming import SlimModel
from .tensor_module import TensorModule

__all__ = ["CompiledBudgets", "compiled_alone"]


class CompiledBudgets:
    """A slimmed model whose budget changes from call to call without compiling again.

        fast = CompiledBudgets(model)
        fast.prepare((1.0, 0.6), images)        # now rather than in front of a user
        logits = fast(images, budget=0.6)
        fast.seconds                            # {(1.0, 16): 31.2, (0.6, 16): 33.0}

    Weights are shared with ``model``, which is not changed. On a GPU graphs run as CUDA graphs.

    Args:
        model: in fixed mode.
        backend: torch.compile's.

    Attributes:
        seconds: what the first run of each (budget, batch size) took: compiling, and for CUDA graphs recording.

    Raises:
        ConfigError: adaptive mode, whose shapes differ by image; a model in training mode.
    """

    def __init__(self, model: SlimModel, backend: str | Callable[..., Any] = "inductor") -> None:
        if model.config.mode != "fixed":
            raise ConfigError(
                "compiled graphs keep the same number of patches of every image, so they need fixed mode, got "
                "adaptive; call model.set_mode('fixed') first"
            )
        if model.training or model.backbone.vit.training:
            raise ConfigError(
                "compiled graphs are for inference, but the model is in training mode; call .eval() first"
            )
        self.model, self.backend = model, backend
        self.on_gpu = next(model.parameters()).is_cuda
        self.seconds: dict[tuple[float, int], float] = {}
        self._graphs: dict[tuple[float, int], Callable[[Tensor], tuple[Tensor, ...]]] = {}

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels height width"], budget: float
    ) -> Float[Tensor, "batch classes"]:
        """Logits at ``budget``. Compiles on the first call with this budget and batch size, not when they return."""
        key = (budget, len(images))
        started = time.perf_counter()
        fresh = key not in self._graphs
        if fresh:
            self._graphs[key] = self._compiled(budget)
        if self.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        (logits,) = self._graphs[key](images)
        if self.on_gpu:
            logits = logits.clone()  # the next run of the CUDA graph writes to the same place
        if fresh:
            if self.on_gpu:
                torch.cuda.synchronize(logits.device)
            self.seconds[key] = time.perf_counter() - started
        return logits

    def prepare(self, budgets: Iterable[float], images: Float[Tensor, "batch channels height width"]) -> None:
        """Compile for these budgets and this batch size; ``seconds`` says how long each took."""
        for budget in budgets:
            for _ in range(3 if self.on_gpu else 1):  # a CUDA graph warms up, is recorded, then replayed
                self(images, budget)

    def _compiled(self, budget: float) -> Callable[[Tensor], tuple[Tensor, ...]]:
        twin = SlimModel(self.model.backbone, self.model.config.replace(budget=budget), self.model.scorer)
        options: dict[str, Any] = {"mode": "reduce-overhead"} if self.on_gpu else {}
        return compiled_alone(TensorModule(twin, lives=False), backend=self.backend, dynamic=False, **options)


def compiled_alone(module: nn.Module, **options: Any) -> Callable[..., Any]:
    """``module`` through torch.compile, with a store of graphs of its own.

    torch keeps compiled graphs by code object, at most 8, and tries them one after the other; modules of one class
    share theirs. So the module's forward is given a new code object.
    """
    forward = type(module).forward
    code = forward.__code__.replace(co_name=f"{forward.__name__}_{id(module)}")
    own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    return torch.compile(own.__get__(module), fullgraph=True, **options)
