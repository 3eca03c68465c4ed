"""torch.compile for adaptive mode: lengths differ from batch to batch, so they are rounded up, and few ever occur."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Backbone, Embedded
from ..errors import ConfigError
from ..slimming import SlimModel
from ..slimming.plan import Plan
from ..slimming.run.adaptive import Stage, run_adaptive
from ..slimming.run.fixed import Taps
from ..slimming.run.packed import Kernel, varlen_attention, varlen_kernel
from .compiled import compiled_alone

__all__ = ["CompiledAdaptive", "rounded_up"]


def rounded_up(tokens: int) -> int:
    """The length that a packed row of so many tokens is filled up to: at most a thirty-second more, or 31."""
    step = _step(tokens)
    return -(-tokens // step) * step


def _step(tokens: int) -> int:
    return max(32, 1 << max(0, tokens.bit_length() - 6))


Key = tuple[str, int, int, int]


class CompiledAdaptive:
    """A slimmed model in adaptive mode with compiled blocks; on a GPU they run as CUDA graphs.

        fast = CompiledAdaptive(model.cuda().bfloat16().set_mode("adaptive"))
        logits = fast(images, budget=0.6)
        fast.seconds                            # {("blocks 6 to 11", 64, 4096, 197): 21.3, ...}

    The first blocks compile for each batch size, the others for each batch size and length of the packed row, which is
    rounded up. The plan between them is made as ever: the host learns once how long each image's piece is.

    Args:
        model: in adaptive mode, calibrated, in float16 or bfloat16 on a GPU that has torch's kernel for rows of
            unequal length.
        backend: torch.compile's. kernel: stands in for torch's.

    Attributes:
        seconds: what the first run of each graph took, by its blocks, batch size, length of the packed row and of the
            longest piece in it (for the first blocks: height and width of the images).

    Raises:
        ConfigError: another mode, no calibration, or no such kernel here.
    """

    def __init__(
        self, model: SlimModel, backend: str | Callable[..., Any] = "inductor", kernel: Kernel | None = None
    ) -> None:
        if model.config.mode != "adaptive" or model.calibration is None:
            raise ConfigError(
                "this compiles adaptive mode, got a model in fixed mode or without calibration; call "
                "model.calibrate(batches).set_mode('adaptive'), or take CompiledBudgets for fixed mode"
            )
        if model.training or model.backbone.vit.training:
            raise ConfigError(
                "compiled graphs are for inference, but the model is in training mode; call .eval() first"
            )
        weight = next(model.backbone.parameters())
        kernel = kernel or (varlen_kernel(weight) if weight.is_cuda else None)
        if kernel is None:
            raise ConfigError(
                "compiled adaptive mode needs torch's attention over rows of unequal length, which takes torch 2.10, "
                f"an Ampere GPU or newer, and float16 or bfloat16, got {weight.dtype} on {weight.device}; the model "
                "itself runs in adaptive mode everywhere"
            )
        self.model, self.kernel, self.backend, self.on_gpu = model, kernel, backend, weight.is_cuda
        self.device = weight.device
        self.seconds: dict[Key, float] = {}
        self._graphs: dict[Key, Callable[..., Any]] = {}
        self._twins: dict[float, SlimModel] = {}

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels height width"], budget: float
    ) -> Float[Tensor, "batch classes"]:
        """Logits at ``budget``, which the model meets on average."""
        twin = self._twins.get(budget)
        if twin is None or twin.calibration is not self.model.calibration:
            twin = self._twins[budget] = _Twin(self.model, budget, self._run_stage)
        if self.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        size = (images.shape[-2], images.shape[-1])
        key = (f"blocks 0 to {twin.start - 1}", len(images), *size)
        tokens, rope = self._graph(key, lambda: _Opening(twin))(images)
        return twin.resume(tokens, Embedded(tokens, rope, self.model.backbone.grid_of(images), size))

    def _run_stage(
        self, longest: int, backbone: Backbone, stage: Stage, x: Tensor, bias: Tensor | None, tables: list[Tensor]
    ) -> Tensor:
        """`run_stage` through the graph of its blocks, batch size and length; no image has more than ``longest``."""
        longest = max(longest, _step(len(x)))  # nor has what fills the row up
        offsets = torch.tensor(stage.offsets, dtype=torch.int32, device=x.device)
        key = (f"blocks {stage.blocks[0]} to {stage.blocks[-1]}", len(offsets) - 2, len(x), longest)
        graph = self._graph(key, lambda: _Blocks(backbone, stage.blocks, self.kernel, longest))
        return graph(x, offsets, bias, *tables)

    def _graph(self, key: Key, make: Callable[[], nn.Module]) -> Callable[..., Any]:
        if key in self._graphs:
            return self._graphs[key]
        options: dict[str, Any] = {"mode": "reduce-overhead"} if self.on_gpu else {}
        self._graphs[key] = compiled_alone(make(), backend=self.backend, dynamic=False, **options)
        return partial(self._first, key)

    def _first(self, key: Key, *inputs: Any) -> Any:
        """The first run of a graph, which compiles it, timed."""
        started = time.perf_counter()
        result = self._graphs[key](*inputs)
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        self.seconds[key] = time.perf_counter() - started
        return result


class _Twin(SlimModel):
    """The model with somebody else running its stages."""

    def __init__(self, model: SlimModel, budget: float, run: Callable[..., Tensor]) -> None:
        assert model.calibration is not None
        super().__init__(model.backbone, model.config.replace(budget=budget), model.scorer)
        self.calibrations = dict(model.calibrations)
        self.set_mode("adaptive")
        self.run = run

    def _adaptive_run(self, x: Tensor, embedded: Embedded, plan: Plan, taps: Taps | None) -> Tensor:
        run = partial(self.run, self.backbone.prefix + plan.order.shape[1])
        return run_adaptive(self.backbone, x, embedded.rope, plan, run, rounded_up, taps)


class _Opening(nn.Module):
    """Everything before the decision."""

    def __init__(self, model: SlimModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        embedded = self.model.backbone.embed(images)
        return self.model.before_start(embedded), embedded.rope


class _Blocks(nn.Module):
    """The blocks of a stage, whose every shape is known."""

    def __init__(self, backbone: Backbone, blocks: range, kernel: Kernel, longest: int) -> None:
        super().__init__()
        self.backbone, self.blocks, self.kernel, self.longest = backbone, blocks, kernel, longest

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None, *tables: Tensor) -> Tensor:
        attend = partial(varlen_attention, self.kernel, offsets, self.longest, bias)
        for place, index in enumerate(self.blocks):
            x = self.backbone.block_with(index, x, attend, tables[place % len(tables)] if tables else None)
        return x
