"""Saving an adapter: settings, scorer, calibrations, and what was trained of the backbone."""

from __future__ import annotations

from pathlib import Path

from ..backbones.weight_delta import delta_since
from ..slimming import Scorer, SlimModel
from ..version import __version__
from .format import FORMAT, WITHOUT_GATES, check_free, write_adapter
from .scorers import scorer_entry

__all__ = ["save"]


def save(model: SlimModel, folder: str | Path) -> Path:
    """Write the adapter of ``model``; an existing adapter is replaced in one step, or not at all.

    The backbone is never saved. What a fit changed of it is a small weight delta; weights that were trained in another
    way after the model was wrapped are saved whole, in their own precision.

    Raises AdapterError, before anything is written, when ``folder`` exists and is not an adapter, when the structure of
    the backbone changed since it was wrapped, and when the scorer could not be loaded again.
    """
    folder = Path(folder)
    check_free(folder)
    scorer: Scorer = getattr(model.scorer, "_orig_mod", model.scorer)  # unwrap torch.compile's module
    entry = scorer_entry(scorer)
    delta = delta_since(model.backbone, model.base, model.delta)
    manifest = {
        "format": FORMAT if delta and delta.gates else WITHOUT_GATES,
        "patchlife": __version__,
        "config": model.settings.to_dict() | {"start": model.start, "drops": list(model.drops)},
        "scorer": entry,
        "calibrations": {patches: calibration.images for patches, calibration in model.calibrations.items()},
        "backbone": delta.base if delta else model.base,
        "classes": delta.classes if delta else None,
        "gates": delta.gates if delta else None,
        "origin": model.origin.to_dict() if model.origin else None,
    }
    tensors = {f"scorer.{k}": v for k, v in scorer.state_dict().items()}
    for patches, calibration in model.calibrations.items():
        tensors |= {f"calibration.{patches}.{k}": v for k, v in calibration.tensors().items()}
    tensors |= {f"weight_delta.{k}": v for k, v in (delta.tensors if delta else {}).items()}
    write_adapter(folder, manifest, tensors)
    return folder
