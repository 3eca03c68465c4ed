"""A bundle: one slimmed model at several budgets, with one graph per budget and the weights stored once.

It is a folder of ``bundle.json`` (the `Metadata` of each graph), the graphs, ``weights.bin``, and ``SHA256SUMS``, which
is checked before any other file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import ConfigError, ExportError
from ..io.exported_files import BUNDLE
from ..io.files import sha256_of
from ..io.folders import SUMS, check_sums
from .engine import Engine, open_file_session
from .metadata import Metadata

__all__ = ["WEIGHTS", "Bundle", "bundle_json", "graph_name"]

WEIGHTS = "weights.bin"
"""The file that holds the weights of all graphs."""

_PER_GRAPH = ("budget", "config", "start", "kept", "flops", "int8_from", "parity")
"""The fields of `Metadata` that differ between the graphs of a bundle."""


class Bundle:
    """A bundle on disk. Each graph is opened on first use and kept open.

    Args:
        folder: a folder that `export_bundle` wrote.
        threads: CPU threads of each engine; torch's number of threads if not given.

    Attributes:
        graphs_metadata: the metadata of each graph by budget, largest budget first.
        kind: onnx or openvino.
        sha256: checksum of all files of the bundle.

    Raises:
        ExportError: the bundle is damaged, incomplete, or written by a version of patchlife with another format.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self.folder, self.threads = Path(folder), threads
        files = check_sums(self.folder, ExportError)
        try:
            common = json.loads(files[BUNDLE].read_text("utf-8"))
            graphs = common.pop("graphs")
            graphs_metadata = [Metadata.from_json(json.dumps({**common, **graph}), self.folder) for graph in graphs]
            self._graphs = {metadata.budget: files[graph_name(metadata)] for metadata in graphs_metadata}
            self._weights = files[WEIGHTS]
            (self.kind,) = {metadata.kind for metadata in graphs_metadata}
            if self.kind not in ("onnx", "openvino"):  # a .pt2 could run code
                raise ValueError(f"a bundle holds onnx or openvino graphs, got {self.kind}")
        except (KeyError, ValueError, TypeError) as error:
            raise ExportError(f"{self.folder} is not a complete bundle ({error}); copy or export it again") from None
        self.graphs_metadata = {metadata.budget: metadata for metadata in graphs_metadata}
        self.sha256 = sha256_of(self.folder / SUMS)
        self._engines: dict[float, Engine] = {}

    @property
    def budgets(self) -> list[float]:
        """The budgets of the graphs, largest first."""
        return list(self.graphs_metadata)

    def engine(self, budget: float | None = None) -> Engine:
        """The engine for the graph of ``budget``, which may be omitted if there is only one graph.

        Raises:
            ConfigError: the bundle has no graph of this budget.
            MissingExtraError: the package that runs the graph is not installed.
        """
        available = ", ".join(f"{b:g}" for b in self.budgets)
        if budget is None and len(self.budgets) > 1:
            raise ConfigError(f"{self.folder} holds the budgets {available}; choose one with --budget")
        matching = [b for b in self.budgets if budget is None or abs(b - budget) < 1e-9]
        if not matching:
            raise ConfigError(
                f"{self.folder} holds the budgets {available}, got {budget:g}; choose one of them, or export it again "
                f"with --budgets {available.replace(' ', '')},{budget:g}"
            )
        (key,) = matching
        if key not in self._engines:
            path, metadata = self._graphs[key], self.graphs_metadata[key]
            session = open_file_session(path, metadata.kind, path.read_bytes(), self.threads, self._weights)
            self._engines[key] = Engine(session, metadata)
        return self._engines[key]


def graph_name(metadata: Metadata) -> str:
    """The file name of a graph in its bundle."""
    return f"budget-{metadata.budget:g}.{'onnx' if metadata.kind == 'onnx' else 'xml'}"


def bundle_json(graphs_metadata: Sequence[Metadata]) -> tuple[str, str]:
    """(name, text) of the file that describes a bundle: fields common to all graphs, then the fields of each graph."""
    common = {name: value for name, value in asdict(graphs_metadata[0]).items() if name not in _PER_GRAPH}
    bodies = [json.loads(metadata.to_json()) for metadata in graphs_metadata]
    graphs = [
        {"file": graph_name(metadata)} | {name: body[name] for name in _PER_GRAPH}
        for metadata, body in zip(graphs_metadata, bodies, strict=True)
    ]
    return BUNDLE, json.dumps({**common, "graphs": graphs}, indent=1) + "\n"
