"""The model card of an adapter on the Hugging Face hub: what it is, what each budget costs, how it is loaded."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from ..config.checks import check_budget
from ..errors import ConfigError
from ..slimming import Flops, SlimModel, flops
from ..version import __version__

__all__ = ["Results", "Row", "base_model_of", "cost_table", "is_path", "model_card"]

Results = Mapping[str, Mapping[float, float | str]]
"""What the caller measured, by the name of the figure and the budget: ``{"top-1 in %": {1.0: 82.2, 0.6: 82.0}}``."""

_BUDGETS = (1.0, 0.8, 0.7, 0.6, 0.5, 0.4)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MODES = {
    "fixed": "Every image keeps the same number of patches.",
    "adaptive": "Each image keeps its own number of patches; the table has means over images.",
}


class Row(NamedTuple):
    """One budget: its cost, and the patches that enter the last block."""

    budget: float
    flops: Flops
    kept: int


def model_card(
    model: SlimModel,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    results: Results | None = None,
    changes_weights: bool = False,
    picture: str | None = None,
) -> ModelCard:
    """The card as a text with a YAML header.

    Args:
        model: the slimmed model, with the budget and the mode that it is published with.
        repo_id: name of the repository, ORG/NAME.
        license: identifier of the licence, such as apache-2.0.
        base_model: name of the backbone's repository on the hub, if it has one.
        results: figures that were measured, as further columns of the table.
        changes_weights: whether the adapter changes weights of the backbone.
        picture: name of the file with a life map.
    """
    data = ModelCardData(
        library_name="patchlife",
        base_model=base_model,
        pipeline_tag="image-classification" if model.backbone.num_classes else "image-feature-extraction",
        tags=["patchlife", "vision-transformer", "token-pruning"],
        license=license,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        _description(model, base_model, changes_weights),
        f"![Life map]({picture})\n\nThe brighter a patch, the more blocks it takes part in." if picture else "",
        f"## Budgets\n\n{_table(model, results or {})}",
        f"## Use\n\n```bash\npip install patchlife\n```\n\n```python\n{_usage(model, repo_id, base_model)}\n```",
        f"## Versions\n\n{_versions(model)}",
    ]
    return ModelCard("\n\n".join(filter(None, sections)) + "\n")


def cost_table(model: SlimModel, measured: Results) -> list[Row]:
    """One row for each budget: the usual ones, the model's own, and the measured ones; the highest first.

    Usual budgets that the model cannot reach are left out. Raises ConfigError for a measured one.
    """
    required = {model.settings.budget, *(check_budget(budget) for figures in measured.values() for budget in figures)}
    rows = []
    for budget in sorted({*_BUDGETS, *required}, reverse=True):
        try:
            with model.temporarily(budget=budget):
                rows.append(Row(budget, flops(model), model.schedule().kept[-1]))
        except ConfigError:
            if budget in required:
                raise
    return rows


def base_model_of(model: SlimModel) -> str | None:
    """Name of the backbone's repository on the hub, if the model came from there."""
    origin = model.origin
    if origin is None:
        name = model.backbone.name
    elif ":" in origin.model:  # hf-hub:ORG/NAME, perhaps with a revision
        name = origin.model.partition(":")[2].partition("@")[0]
        name = name if origin.model.lower().startswith("hf") else ""
    else:  # a name of timm, whose weights are on the hub too
        cfg = getattr(model.wrapped, "pretrained_cfg", None) if origin.pretrained else None
        name = (cfg or {}).get("hf_hub_id") or ""
    return name if _HUB_NAME.fullmatch(name) and not is_path(name) else None


def is_path(name: str) -> bool:
    """Whether a model's name is a file or folder of this machine."""
    return bool(name) and (Path(name).exists() or Path(name).is_absolute())


def _name_of(model: SlimModel) -> str:
    """The backbone's name for people, without folders of this machine."""
    name = model.backbone.name
    return Path(name).name if is_path(name) else name or model.backbone.family


def _description(model: SlimModel, base_model: str | None, changes_weights: bool) -> str:
    link = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    of = link or _name_of(model)
    parts = [f"the scorer (`{getattr(model.scorer, 'kind', type(model.scorer).__name__)}`)", "the settings"]
    parts += ["the thresholds of adaptive mode"] if model.calibrations else []
    if changes_weights:
        gated = model.delta is not None and model.delta.gates
        parts.append("the changes of the backbone's weights" + (", which are none at budget 1.0" if gated else ""))
    starts = " or ".join(map(str, model.starts))
    return (
        f"An adapter of PatchLife for {of}. It makes this Vision Transformer faster: a scorer decides once, before "
        f"block {starts} of {model.backbone.depth}, how many blocks each image patch takes part in. The adapter "
        f"holds {', '.join(parts[:-1])} and {parts[-1]}, not the backbone."
    )


def _table(model: SlimModel, measured: Results) -> str:
    height, width = model.backbone.image_size
    header = ["budget", "GFLOPs per image", "of the dense FLOPs", "patches in the last block", *measured]
    lines = [header, ["---"] * len(header)]
    for budget, cost, kept in cost_table(model, measured):
        own = " (default)" if budget == model.settings.budget and model.settings.kept is None else ""
        figures = [str(values.get(budget, "")) for values in measured.values()]
        lines.append([f"{budget:g}{own}", _gflops(cost.slimmed), f"{cost.budget:.1%}", str(kept), *figures])
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        f"For images of {height} x {width} pixels in {model.settings.mode} mode. {_MODES[model.settings.mode]} "
        f"FLOPs count two operations per multiply-add.\n\n{rows}\n\nAnother budget needs no training: "
        "`model.set_budget(0.5)`."
    )


def _gflops(flops: int) -> str:
    value = flops / 1e9
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _usage(model: SlimModel, repo_id: str, base_model: str | None) -> str:
    """Python lines that load the adapter."""
    origin = model.origin
    if origin is not None and origin.pretrained:
        return f'import patchlife\n\nmodel = patchlife.from_hub("{repo_id}")'
    if base_model and model.backbone.library == "transformers":
        kind = type(model.wrapped).__name__
        first, vit = "import transformers\n\n", f'transformers.{kind}.from_pretrained("{base_model}")'
    else:
        first, vit = "", f"...  # {_name_of(model)}, with the weights that the adapter was made for"
    return f'import patchlife\n{first or chr(10)}backbone = {vit}\nmodel = patchlife.from_hub("{repo_id}", backbone)'


def _versions(model: SlimModel) -> str:
    packages = ("torch", model.backbone.library)
    return ", ".join([f"patchlife {__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in packages)])
