"""Gated weight deltas with random values, for any model."""

from __future__ import annotations

import copy

import torch
from torch import nn

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.backbones import Backbone, adapt, signature
from patchlife.backbones.gated_training import add_gated_delta
from patchlife.backbones.gates import Ramps, ramps_down_to
from patchlife.backbones.weight_delta import WeightDelta, delta_between
from patchlife.slimming.regressor import LifeRegressor

GATES = ramps_down_to(0.6)
"""Of the deltas here."""

WALK = (0.9, 0.62, 1.0, 0.7, 0.85, 0.62, 0.97)
"""Budgets to pass through; all gates open at some of them."""


@torch.no_grad()
def student_of(model: nn.Module, start: int, rank: int = 3, ramps: Ramps = GATES) -> Backbone:
    """A copy of ``model`` with parametrizations of random values that half precision holds exactly."""
    student = adapt(copy.deepcopy(model))
    late = [*list(student.blocks)[start:], student.final_norm]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        student.gated = add_gated_delta(late, rank, ramps)
        for name, parameter in student.model.named_parameters():
            if name.endswith((".0.up", ".0.down", ".0.shift")):
                parameter.copy_((0.1 * torch.randn_like(parameter)).half())
    return student


def delta_of(model: nn.Module, start: int, rank: int = 3, ramps: Ramps = GATES) -> WeightDelta:
    """The weight delta of `student_of`."""
    tensors = delta_between(student_of(model, start, rank, ramps), adapt(model))
    return WeightDelta(tensors, signature(adapt(model)), gates=ramps)


def gated_model(model: nn.Module, start: int = 2, budget: float = 0.7) -> SlimModel:
    """A copy of ``model``, slimmed, with a learned scorer of random weights and the delta of `delta_of`."""
    backbone = adapt(model)
    scorer = LifeRegressor(backbone.dim, backbone.prefix)
    config = LifeConfig(budget=budget, start=start, drops=(start, start + 1))
    return patchlife.wrap(copy.deepcopy(model), config, scorer).eval().use_delta(delta_of(model, start))
