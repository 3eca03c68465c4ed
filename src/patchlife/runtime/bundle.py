"""A package: one slimmed model at several budgets, a graph for each, the weights once.

A folder of ``bundle.json`` (what `Metadata` says, for each graph), the graphs, ``weights.bin``, and ``SHA256SUMS``,
which is checked before anything else is opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import ConfigError, ExportError
from ..io.files import BUNDLE, SUMS, check_sums, sha256_of
from .engine import Engine, opened
from .metadata import Metadata

__all__ = ["WEIGHTS", "Bundle", "bundle_json", "graph_name"]

WEIGHTS = "weights.bin"
"""The file that holds the weights of all graphs."""

_OWN = ("budget", "config", "start", "kept", "flops", "int8_from", "parity")
"""What differs from graph to graph."""


class Bundle:
    """A package on disk; graphs are opened when they are asked for, and kept.

    Args:
        folder: as `export_bundle` wrote it.
        threads: CPU threads of each engine; as many as torch uses if not given.

    Attributes:
        metadatas: by budget, largest first. kind: onnx or openvino.
        sha256: of all that is in it.

    Raises:
        ExportError: damaged, incomplete, or written by a newer patchlife.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self.folder, self.threads = Path(folder), threads
        files = check_sums(self.folder, ExportError)
        try:
            common = json.loads(files[BUNDLE].read_text("utf-8"))
            graphs = common.pop("graphs")
            metadatas = [Metadata.from_json(json.dumps({**common, **graph}), self.folder) for graph in graphs]
            self._graphs = {metadata.budget: files[graph_name(metadata)] for metadata in metadatas}
            self._weights = files[WEIGHTS]
            (self.kind,) = {metadata.kind for metadata in metadatas}
            if self.kind not in ("onnx", "openvino"):  # a .pt2 could run code
                raise ValueError(f"a package holds onnx or openvino, got {self.kind}")
        except (KeyError, ValueError, TypeError) as error:
            raise ExportError(f"{self.folder} is no whole package ({error}); copy or export it again") from None
        self.metadatas = {metadata.budget: about for metadata in metadatas}
        self.sha256 = sha256_of(self.folder / SUMS)
        self._engines: dict[float, Engine] = {}

    @property
    def budgets(self) -> list[float]:
        """Largest first."""
        return list(self.metadatas)

    def engine(self, budget: float | None = None) -> Engine:
        """What runs the graph of ``budget``, which need not be named where there is one only.

        Raises ConfigError for a budget that is not in the package, and MissingExtraError without its engine.
        """
        there = ", ".join(f"{b:g}" for b in self.budgets)
        if budget is None and len(self.budgets) > 1:
            raise ConfigError(f"{self.folder} holds the budgets {there}; say which one with --budget")
        found = [b for b in self.budgets if budget is None or abs(b - budget) < 1e-9]
        if not found:
            raise ConfigError(
                f"{self.folder} holds the budgets {there}, got {budget:g}; choose one of them, or export it again "
                f"with --budgets {there.replace(' ', '')},{budget:g}"
            )
        (key,) = found
        if key not in self._engines:
            path, metadata = self._graphs[key], self.metadatas[key]
            self._engines[key] = Engine(
                opened(path, metadata.kind, path.read_bytes(), self.threads, self._weights), metadata
            )
        return self._engines[key]


def graph_name(metadata: Metadata) -> str:
    """What a graph's file is called in its package."""
    return f"budget-{metadata.budget:g}.{'onnx' if metadata.kind == 'onnx' else 'xml'}"


def bundle_json(metadatas: Sequence[Metadata]) -> tuple[str, str]:
    """(name, text) of the file that describes a package: what all graphs share once, then what each has of its own."""
    every = [json.loads(metadata.to_json()) for metadata in metadatas]
    common = {name: value for name, value in asdict(metadatas[0]).items() if name not in _OWN}
    graphs = [
        {"file": graph_name(metadata)} | {name: body[name] for name in _OWN}
        for metadata, body in zip(metadatas, every, strict=True)
    ]
    return BUNDLE, json.dumps({**common, "graphs": graphs}, indent=1) + "\n"
