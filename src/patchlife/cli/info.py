"""``patchlife info``: describe a model, its schedule and its FLOPs, dense and slimmed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..config import InfoConfig, ModelConfig
from .common import size_note

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline
    from ..slimming import SlimModel

__all__ = ["describe", "run"]


def run(config: InfoConfig) -> int:
    """Print the description of a model; returns the exit code."""
    from ..runtime.opening import open_pipeline

    description = describe(open_pipeline(config.model, random_weights=True), config.model)
    print(json.dumps(description, indent=2) if config.json else _text(description))
    return 0


def describe(pipeline: Pipeline, config: ModelConfig) -> dict[str, Any]:
    """The description of a slimmed model as plain values. FLOPs are per image; a multiply-add counts as two."""
    from ..slimming import flops

    model, backbone = pipeline.model, pipeline.model.backbone
    cost, schedule = flops(model), model.schedule()
    # the cost of the scorer, and of the merge targets if patches are merged
    decision = cost.slimmed - cost.outer - sum(cost.slimmed_blocks)
    return {
        "model": pipeline.name,
        "family": backbone.family,
        "weights": _weights(pipeline),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "classes": len(pipeline.labels.names),
        "multi_label": pipeline.multi_label,
        "image_size": list(backbone.image_size),
        "patch_size": list(backbone.patch_size),
        "grid": list(backbone.grid),
        "patches": schedule.kept[0],
        "prefix_tokens": backbone.prefix,
        "depth": backbone.depth,
        "settings": model.settings.to_dict(),
        "scorer": model.scorer.kind,
        "weight_delta": _delta(model),
        "start": schedule.start,
        "drops": list(schedule.drops),
        "kept": list(schedule.kept),
        "shapes": [shape.to_dict() for shape in model.shapes],
        "calibration_images": model.calibration.images if model.calibration else 0,
        "flops": {
            "dense": cost.dense,
            "slimmed": cost.slimmed,
            "fraction_of_dense": round(cost.budget, 4),
            "decision": decision,
            "decision_fraction_of_dense": round(decision / cost.dense, 5),
            "outside_blocks": cost.outer,
            "dense_blocks": list(cost.dense_blocks),
            "slimmed_blocks": list(cost.slimmed_blocks),
        },
        "limits": _limits(pipeline, config),
    }


def _weights(pipeline: Pipeline) -> str:
    from ..backbones import brings_weights

    origin = pipeline.model.origin
    if origin is None:
        return "embedded in patchlife"
    if origin.checkpoint or not origin.pretrained:
        return origin.checkpoint or "random (enough for this description, not for photos)"
    return origin.model if brings_weights(origin.model) else "timm (pretrained)"


def _delta(model: SlimModel) -> dict[str, Any] | None:
    """Size in bytes of the weight delta, and its gates; None without one."""
    if model.delta is None:
        return None
    gates = [list(ramp) for ramp in model.delta.gates or ()]
    return {"bytes": model.delta.size, "gates": gates or None}


def _limits(pipeline: Pipeline, config: ModelConfig) -> list[str]:
    """What this model cannot do, and why."""
    model, limits = pipeline.model, []
    if not pipeline.labels.names:
        limits.append("the model has no classifier, so predict and draw do not work")
    if note := size_note(pipeline, config):
        limits.append(note)
    if not model.backbone.any_size:
        rows, cols = model.backbone.image_size
        limits.append(f"photos are resized to {rows} x {cols} pixels; --image-size builds the model for another size")
    if model.settings.mode == "adaptive" and model.calibration is None:
        limits.append(
            "adaptive mode is not calibrated, so FLOPs are those of the fixed schedule; predict and draw calibrate the "
            "model on their photos"
        )
    return limits


def _text(description: dict[str, Any]) -> str:
    """The description as text for a terminal."""
    cost, (rows, cols) = description["flops"], description["grid"]
    facts = [
        ("model", f"{description['model']}: {description['family']}"),
        ("weights", f"{description['weights']}, {description['parameters'] / 1e6:.1f} M parameters"),
        ("patches", f"{description['patches']} ({rows} x {cols}) of {_size_text(description['patch_size'])} pixels"),
        ("image size", f"{_size_text(description['image_size'])} pixels, {description['classes']} classes"),
        ("slimmed by", ", ".join(_settings(description))),
        ("drops", f"before blocks {_joined(description['drops'])}" if description["drops"] else "none"),
        ("FLOPs", f"{_giga(cost['slimmed'])} of {_giga(cost['dense'])}, {cost['fraction_of_dense']:.3f} of the dense"),
        ("decision", f"{_giga(cost['decision'])}, {cost['decision_fraction_of_dense']:.4f} of the dense"),
    ]
    if len(description["shapes"]) > 1:
        each = [f"up to {s['budget']:g} before blocks {_joined(s['drops'])}" for s in description["shapes"]]
        facts.append(("all drops", "; ".join(each)))
    if delta := description["weight_delta"]:
        facts.append(("delta", _delta_text(delta)))
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {text}" for name, text in facts]
    return "\n".join([*lines, "", *_table(description), *(f"\nlimit: {limit}" for limit in description["limits"])])


def _table(description: dict[str, Any]) -> list[str]:
    """The lines of a table with one row per block."""
    cost, total = description["flops"], description["patches"]
    lines = ["block  patches  dense GFLOPs  slimmed GFLOPs"]
    blocks = zip(description["kept"], cost["dense_blocks"], cost["slimmed_blocks"], strict=True)
    for index, (n, dense, slimmed) in enumerate(blocks):
        bar = "#" * max(1, round(20 * n / total))
        lines.append(f"{index:>5}  {n:>7}  {dense / 1e9:>12.4f}  {slimmed / 1e9:>14.4f}  {bar}")
    lines.append(f"other  {'':>7}  {cost['outside_blocks'] / 1e9:>12.4f}  {cost['outside_blocks'] / 1e9:>14.4f}")
    return lines


def _settings(description: dict[str, Any]) -> list[str]:
    settings, images = description["settings"], description["calibration_images"]
    texts = [description["scorer"], f"budget {settings['budget']:g}", f"{settings['mode']} mode"]
    texts += [f"merging, restore {settings['restore']}" if settings["merge"] else "no merging"]
    return [*texts, f"calibrated on {images} images" if images else "not calibrated"]


def _delta_text(delta: dict[str, Any]) -> str:
    size = f"{delta['bytes'] / 1e6:.1f} MB of changed weights"
    if not delta["gates"]:
        return size
    ramps = ", ".join(f"{low:g} to {high:g}" for low, high, _ in delta["gates"])
    return f"{size}, none at budget 1, gates at {ramps} of removed FLOPs"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3f} GFLOPs"


def _joined(numbers: list[int] | list[float]) -> str:
    return ", ".join(map(str, numbers))


def _size_text(size: list[int]) -> str:
    return f"{size[0]} x {size[1]}"
