"""torch.compile for several budgets: one compiled graph per budget and batch size, compiled once and kept."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..slimming import SlimModel
from .tensor_module import TensorModule

__all__ = ["CompiledBudgets", "compile_separately"]


class CompiledBudgets:
    """A slimmed model whose budget can change from call to call without compiling again.

        fast = CompiledBudgets(model)
        fast.prepare((1.0, 0.6), images)        # compile before the first request
        logits = fast(images, budget=0.6)
        fast.seconds                            # {(1.0, 16): 31.2, (0.6, 16): 33.0}

    Weights are shared with ``model``, which is not changed. With a gated weight delta the graphs share a copy instead,
    in which a call at another budget than the one before merges the delta for its own budget (milliseconds); calls of
    several threads then run one after the other. On a GPU the graphs run as CUDA graphs.

    Args:
        model: in fixed mode.
        backend: torch.compile's.

    Attributes:
        seconds: duration of the first run for each (budget, batch size). It includes compiling, and on a GPU recording
            the CUDA graph.

    Raises:
        ConfigError: the model is in adaptive mode, whose shapes differ by image, or in training mode.
    """

    def __init__(self, model: SlimModel, backend: str | Callable[..., Any] = "inductor") -> None:
        if model.settings.mode != "fixed":
            raise ConfigError(
                "compiled graphs keep the same number of patches for every image, so they need fixed mode, got "
                "adaptive; call model.set_mode('fixed') first"
            )
        if model.training or model.backbone.model.training:
            raise ConfigError(
                "compiled graphs are for inference, but the model is in training mode; call .eval() first"
            )
        self.model, self.backend = model, backend
        self.on_gpu = next(model.parameters()).is_cuda
        self.seconds: dict[tuple[float, int], float] = {}
        self._graphs: dict[tuple[float, int], Callable[[Tensor], tuple[Tensor, ...]]] = {}
        gated = model.backbone.gated is not None
        self._backbone = copy.deepcopy(model.backbone) if gated else model.backbone
        self._models: dict[float, SlimModel] = {}
        self._in_turn = threading.Lock() if gated else nullcontext()

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels height width"], budget: float
    ) -> Float[Tensor, "batch classes"]:
        """Logits at ``budget``. Compiles on the first call with this budget and batch size."""
        with self._in_turn:
            return self._run(images, budget)

    def _run(self, images: Tensor, budget: float) -> Tensor:
        key = (budget, len(images))
        started = time.perf_counter()
        first_run = key not in self._graphs
        if first_run:
            self._graphs[key] = self._compiled(budget)
        self._models[budget].follow_budget()
        if self.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        (logits,) = self._graphs[key](images)
        if self.on_gpu:
            logits = logits.clone()  # the next run of the CUDA graph writes to the same memory
        if first_run:
            if self.on_gpu:
                torch.cuda.synchronize(logits.device)
            self.seconds[key] = time.perf_counter() - started
        return logits

    def prepare(self, budgets: Iterable[float], images: Float[Tensor, "batch channels height width"]) -> None:
        """Compile for these budgets and this batch size; ``seconds`` then holds the durations."""
        for budget in budgets:
            for _ in range(3 if self.on_gpu else 1):  # a CUDA graph warms up, is recorded, then replayed
                self(images, budget)

    def _compiled(self, budget: float) -> Callable[[Tensor], tuple[Tensor, ...]]:
        model = SlimModel(self._backbone, self.model.settings.replace(budget=budget), self.model.scorer)
        self._models[budget] = model
        options: dict[str, Any] = {"mode": "reduce-overhead"} if self.on_gpu else {}
        return compile_separately(TensorModule(model, lives=False), backend=self.backend, dynamic=False, **options)


def compile_separately(module: nn.Module, **options: Any) -> Callable[..., Any]:
    """``module`` through torch.compile, with its own cache of graphs.

    torch stores compiled graphs by code object, at most 8, and tries them one after the other; all modules of a class
    share one code object. So the module's forward gets a new code object.
    """
    forward = type(module).forward
    code = forward.__code__.replace(co_name=f"{forward.__name__}_{id(module)}")
    own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    return torch.compile(own.__get__(module), fullgraph=True, **options)
