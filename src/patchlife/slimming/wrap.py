"""`wrap`: from a Vision Transformer to a slimmed model."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..backbones import Backbone, adapt
from ..backbones.merged_delta import has_merged_delta
from ..config import LifeConfig
from ..errors import ConfigError
from .library_class import library_class
from .model import SlimModel
from .scorers import Scorer

__all__ = ["slim_model", "variant", "wrap"]


def wrap(model: nn.Module, config: LifeConfig | None = None, scorer: Scorer | None = None) -> SlimModel:
    """Slim a Vision Transformer of timm, transformers or open_clip; it works at once, without training.

    Args:
        model: the backbone; shared, not changed. ``unwrap()`` of the result gives it back.
        config: budget and mode; the default is 0.6 of the FLOPs in fixed mode.
        scorer: what scores the patches; the training-free `AttentionScorer` if not given.

    Returns:
        A model that is called as ``model`` and gives what it gives. For a model of transformers or open_clip it is an
        instance of the same class.

    Raises:
        UnsupportedModelError: patches of this model cannot be dropped exactly, or something attached to it would be
            ignored.
        ConfigError: settings that do not fit the model, or a budget that it cannot reach; or the model is the backbone
            of a slimmed model whose weights follow a budget that is now below 1.
    """
    if has_merged_delta(model):
        raise ConfigError(
            "the weights of this model follow the budget of the slimmed model that it was taken from, and a second one "
            "would not know; use that slimmed model, or set its budget to 1.0 before unwrap()"
        )
    return slim_model(adapt(model), config or LifeConfig(), scorer)


def slim_model(backbone: Backbone, config: LifeConfig, scorer: Scorer | None = None) -> SlimModel:
    """The slimmed model of a backbone, in the class that the model's surroundings expect."""
    kind: Any = type(backbone.model)
    made = library_class(kind, backbone.own_methods) if backbone.own_methods else SlimModel
    return made(backbone, config, scorer)


def variant(model: SlimModel, settings: LifeConfig) -> SlimModel:
    """A model of the same backbone and scorer with other settings, to run beside ``model``.

    A backbone whose weights follow the budget is copied.
    """
    backbone = model.backbone if model.backbone.gated is None else copy.deepcopy(model.backbone)
    made = SlimModel(backbone, settings, model.scorer)
    made.delta = model.delta  # already merged; the state dict, which names cached exports, holds it
    return made
