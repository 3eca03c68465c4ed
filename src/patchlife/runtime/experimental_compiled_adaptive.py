"""Experimental, has run on one GPU only: torch.compile for adaptive mode.

The number of tokens differs from batch to batch, so it is rounded up; then few different lengths occur.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Backbone, Embedded
from ..config import Restore
from ..errors import ConfigError
from ..slimming import SlimModel
from ..slimming.plan import Plan
from ..slimming.run.adaptive import Stage, run_adaptive
from ..slimming.run.fixed import Taps
from ..slimming.run.packed import BiasChannels, Kernel, varlen_attention, varlen_kernel
from .compiled import compile_separately

__all__ = ["ExperimentalCompiledAdaptive", "rounded_up"]


def rounded_up(tokens: int) -> int:
    """The length to which a packed sequence is padded: at most 1/32 more tokens, or 31 more if that is larger."""
    step = _step(tokens)
    return -(-tokens // step) * step


def _step(tokens: int) -> int:
    return max(32, 1 << max(0, tokens.bit_length() - 6))


Key = tuple[str, int, int, int]


class ExperimentalCompiledAdaptive:
    """Experimental, has run on one GPU only: a slimmed model in adaptive mode with compiled blocks.

        fast = ExperimentalCompiledAdaptive(model.cuda().bfloat16().set_mode("adaptive"))
        logits = fast(images, budget=0.6)
        fast.seconds                            # {("blocks 6 to 11", 64, 4096, 197): 21.3, ...}

    The blocks before the decision are compiled once per batch size, the others once per batch size and length of the
    packed sequence, which is rounded up. On a GPU they run as CUDA graphs. The decision between them runs eagerly, with
    one synchronisation to read how many tokens each image keeps.

    Args:
        model: in adaptive mode, calibrated, in float16 or bfloat16 on a GPU that has torch's variable-length attention
            kernel.
        backend: torch.compile's. kernel: replaces torch's kernel, for tests.

    Attributes:
        seconds: duration of the first run of each graph, by (blocks, batch size, length of the packed sequence, length
            of the longest image in it); for the first blocks by (blocks, batch size, image height, image width).

    Raises:
        ConfigError: the model is in fixed or training mode or not calibrated, or there is no such kernel.
    """

    def __init__(
        self, model: SlimModel, backend: str | Callable[..., Any] = "inductor", kernel: Kernel | None = None
    ) -> None:
        if model.settings.mode != "adaptive" or model.calibration is None:
            raise ConfigError(
                "expected a calibrated model in adaptive mode, got one in fixed mode or without calibration; call "
                "model.calibrate(batches).set_mode('adaptive'), or use CompiledBudgets for fixed mode"
            )
        if model.training or model.backbone.model.training:
            raise ConfigError(
                "compiled graphs are for inference, but the model is in training mode; call .eval() first"
            )
        weight = next(model.backbone.parameters())
        kernel = kernel or (varlen_kernel(weight) if weight.is_cuda else None)
        if kernel is None:
            raise ConfigError(
                "compiled adaptive mode needs torch's variable-length attention kernel, which needs torch 2.10, an "
                f"Ampere GPU or newer, and float16 or bfloat16, got {weight.dtype} on {weight.device}; without "
                "compiling, the model runs in adaptive mode on every device"
            )
        self.model, self.kernel, self.backend, self.on_gpu = model, kernel, backend, weight.is_cuda
        self.device = weight.device
        self.seconds: dict[Key, float] = {}
        self._graphs: dict[Key, Callable[..., Any]] = {}
        self._models: dict[float, SlimModel] = {}

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels height width"], budget: float
    ) -> Float[Tensor, "batch classes"]:
        """Logits at ``budget``, which the model meets on average over images."""
        model = self._models.get(budget)
        if model is None or model.calibrations is not self.model.calibrations:
            model = self._models[budget] = _CompiledStages(self.model, budget, self._run_stage)
        model.follow_budget()  # blocks share their weights, which a gated weight delta changes with the budget
        if self.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        size = (images.shape[-2], images.shape[-1])
        key = (f"blocks 0 to {model.start - 1}", len(images), *size)
        tokens, rope = self._graph(key, lambda: _BlocksBeforeStart(model))(images)
        return model.resume(tokens, Embedded(tokens, rope, self.model.backbone.grid_of(images), size))

    def _run_stage(
        self, longest: int, backbone: Backbone, stage: Stage, x: Tensor, bias: Tensor | None, tables: list[Tensor]
    ) -> Tensor:
        """Run a stage through its compiled graph. No image has more tokens than ``longest``."""
        longest = max(longest, _step(len(x)))  # the padding may be longer than any image
        offsets = stage.begins.int()
        key = (f"blocks {stage.blocks[0]} to {stage.blocks[-1]}", len(offsets) - 2, len(x), longest)
        graph = self._graph(key, lambda: _BlocksOfStage(backbone, stage.blocks, self.kernel, longest))
        return graph(x, offsets, bias, *tables)

    def _graph(self, key: Key, make: Callable[[], nn.Module]) -> Callable[..., Any]:
        if key in self._graphs:
            return self._graphs[key]
        options: dict[str, Any] = {"mode": "reduce-overhead"} if self.on_gpu else {}
        self._graphs[key] = compile_separately(make(), backend=self.backend, dynamic=False, **options)
        return partial(self._first_run, key)

    def _first_run(self, key: Key, *inputs: Any) -> Any:
        """Run a graph for the first time, which compiles it, and record the duration."""
        started = time.perf_counter()
        result = self._graphs[key](*inputs)
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        self.seconds[key] = time.perf_counter() - started
        return result


class _CompiledStages(SlimModel):
    """The model with its stages run by ``run``."""

    def __init__(self, model: SlimModel, budget: float, run: Callable[..., Tensor]) -> None:
        assert model.calibration is not None
        super().__init__(model.backbone, model.settings.replace(budget=budget), model.scorer)
        self.calibrations = model.calibrations  # a change makes a new dict, so the two can be compared by identity
        self.set_mode("adaptive")
        self.run = run

    def _adaptive_run(self, x: Tensor, embedded: Embedded, plan: Plan, taps: Taps | None, restore: Restore) -> Tensor:
        run = partial(self.run, self.backbone.prefix + plan.order.shape[1])
        return run_adaptive(self.backbone, x, embedded.rope, plan, run, rounded_up, taps, restore)


class _BlocksBeforeStart(nn.Module):
    """The embedding and the blocks before the decision."""

    def __init__(self, model: SlimModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        embedded = self.model.backbone.embed(images)
        return self.model.before_start(embedded), embedded.rope


class _BlocksOfStage(nn.Module):
    """The blocks of one stage, with static shapes."""

    def __init__(self, backbone: Backbone, blocks: range, kernel: Kernel, longest: int) -> None:
        super().__init__()
        self.backbone, self.blocks, self.kernel, self.longest = backbone, blocks, kernel, longest

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None, *tables: Tensor) -> Tensor:
        channels = None if bias is None else BiasChannels(bias)
        attend = partial(varlen_attention, self.kernel, offsets, self.longest, channels)
        for place, index in enumerate(self.blocks):
            x = self.backbone.block_with(index, x, attend, tables[place % len(tables)] if tables else None)
        return x
