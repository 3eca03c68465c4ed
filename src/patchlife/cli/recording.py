"""Write a record for each of many photos, once, even if the run is interrupted and continued; count them."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from ..errors import ConfigError
from ..io.jsonl import printable
from .common import progress, say
from .results import KEY, Record, Results

if TYPE_CHECKING:
    from ..data import AnyPhoto
    from ..runtime.pipeline import Pipeline

__all__ = ["Tally", "run_identity", "write_results"]


@dataclass
class Tally:
    """Counts for the summary at the end of a run.

    Attributes:
        photos: number of records.
        processed: number of records without an error.
        dense_fractions: sum of the processed photos' fractions of the dense FLOPs.
        first_error: the error of the first photo that failed.
    """

    photos: int = 0
    processed: int = 0
    dense_fractions: float = 0.0
    first_error: str = ""

    @property
    def failed(self) -> int:
        """Number of photos without a result."""
        return self.photos - self.processed

    def add(self, record: Record) -> None:
        """Count one record."""
        self.photos += 1
        if error := record.get("error"):
            self.first_error = self.first_error or error
            return
        self.processed += 1
        self.dense_fractions += record["fraction_of_dense"]
        self.add_result(record)

    def add_result(self, record: Record) -> None:
        """Count what a record without an error holds."""

    def summary(self) -> str:
        """The counts in one line."""
        parts = [f"{self.photos} photos", f"{self.failed} failed"]
        if self.failed:
            parts[-1] += f" (the first: {self.first_error})"
        if self.processed:
            parts.append(f"{self.dense_fractions / self.processed:.3f} of the dense FLOPs")
        return ", ".join(parts)


def run_identity(pipeline: Pipeline, settings: Mapping[str, Any], calibrated_on: Sequence[AnyPhoto]) -> str:
    """Eight hexadecimal digits of a hash of the weights, settings, preprocessing, labels and calibration.

    Args:
        pipeline: the model.
        settings: options of the verb that change its records.
        calibrated_on: the photos on which the thresholds of adaptive mode were set by this run.
    """
    import torch

    model = pipeline.model
    metadata = {
        "life": model.settings.to_dict(),
        "preprocess": pipeline.preprocess.to_dict(),
        "labels": pipeline.labels.names,
        **settings,
        "calibrated_on": [str(photo) for photo in calibrated_on],
    }
    digest = hashlib.sha256(json.dumps(metadata).encode())
    tensors = [*model.state_dict().values()]
    if model.calibration is not None and not calibrated_on:
        tensors += model.calibration.tensors().values()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:8]


def write_results(
    results: Results,
    photos: Sequence[AnyPhoto],
    earlier: Sequence[Record],
    make: Callable[[Sequence[AnyPhoto]], Iterator[Record]],
    identity: str,
    tally: Tally,
    run: RunConfig,
) -> int:
    """Write a record for each photo that has none, and a summary to standard error; returns the exit code.

    Args:
        results: where the records go.
        photos: all photos.
        earlier: the records of an earlier run.
        make: gives the records of photos, in their order.
        identity: of this run, see `run_identity`.
        tally: counts the records.
        run: batch size and progress bar.

    Raises ConfigError if an earlier record is of a run with another identity.
    """
    for record in earlier:
        _check_same_run(record, identity, results.out)
        tally.add(record)
    remaining = _without(photos, earlier)
    started = time.perf_counter()
    try:
        if remaining:
            with results.appending(run.batch_size) as write:
                bar = _bar_wanted(results, run)
                for record in progress(make(remaining), len(photos), bar, len(photos) - len(remaining)):
                    write(record | {"run": identity})
                    tally.add(record)
    except KeyboardInterrupt:
        hint = "; continue with --resume" if results.out else ""
        say(f"{tally.photos} of {len(photos)} photos are done{hint}")
        raise
    speed = len(remaining) / (time.perf_counter() - started)
    results.finish(tally.photos)
    say(tally.summary() + (f", {speed:.1f} photos/s including reading" if remaining else ""))
    return 1 if tally.failed else 0


def _without(photos: Sequence[AnyPhoto], earlier: Sequence[Record]) -> list[AnyPhoto]:
    """The photos that have no record."""
    done = {printable(record[KEY]) for record in earlier}
    return [photo for photo in photos if printable(str(photo)) not in done] if done else list(photos)


def _check_same_run(record: Record, identity: str, out: Path | None) -> None:
    if record.get("run") != identity:
        raise ConfigError(
            f"{out} was started with another model or other settings: expected run {identity}, got run "
            f"{record.get('run')}; use the same model and settings, or choose another --out"
        )


def _bar_wanted(results: Results, run: RunConfig) -> bool | None:
    """Whether to draw a progress bar; by default not if the records are printed on the same terminal."""
    lines_on_terminal = results.out is None and sys.stdout.isatty()
    return False if run.progress is None and lines_on_terminal else run.progress
