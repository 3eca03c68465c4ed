"""``predict`` and ``embed`` on a Ray cluster: the records go to a folder of parts, each computed by one worker."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..archive import Part, PartFolder, Run, Work
from ..archive.cluster import Workers, compute, connected, run_once, workers_of
from ..archive.folder import photo_list_sum
from ..config import EmbedConfig, PredictConfig
from ..errors import ConfigError
from ..extras import require
from ..io.table import Table
from .common import calibrate_if_needed, find_samples, needs_calibration, progress, say
from .recording import Tally, run_identity
from .results import KEY, Record

if TYPE_CHECKING:
    from ..data import AnyPhoto
    from ..data.labels import Labels
    from ..runtime.pipeline import Pipeline
    from ..slimming.calibration import Calibration

__all__ = ["Verb", "write_parts"]

_MOST_PHOTOS = 1024  # of a part, by default: a worker with a GPU fills its first batch anew in each part
_PARTS_PER_WORKER = 4  # by default, so that no worker waits long for the last ones
_SUMMARY = ("error", "fraction_of_dense")


@dataclass(frozen=True)
class Verb:
    """What differs between the verbs. The functions are of modules, so that a worker can import them.

    Attributes:
        open: opens the model.
        settings: the options that change the records.
        records: the records of photos, in their order.
        table: the format of .parquet parts.
        tally: counts the records, from the labels, whether a photo can have several, and the photos.
        labelled: whether the tally reads the classes of records.
    """

    open: Callable[[Any], Pipeline]
    settings: Callable[[Pipeline, Any], dict[str, Any]]
    records: Callable[[Pipeline, Sequence[AnyPhoto], Any], Iterator[Record]]
    table: Callable[[], Table]
    tally: Callable[[Labels, bool, Sequence[Any], Any], Tally]
    labelled: bool = False


@dataclass(frozen=True)
class _Opened:
    """What the command needs to know of a model, which it does not open itself.

    Attributes:
        base: identity of weights and settings, before a calibration by this run.
        run: identity of the run; None if it has to be calibrated first.
        calibrations: set by this run: (start block, thresholds).
        labels: class names.
        multi_label: whether a photo can have several classes.
        messages: what opening the model printed.
    """

    base: str
    run: str | None
    calibrations: tuple[tuple[int, Calibration], ...]
    labels: Labels
    multi_label: bool
    messages: str


def write_parts(verb: Verb, config: PredictConfig | EmbedConfig) -> int:
    """Write the parts that are absent, and a summary to standard error; returns the exit code."""
    cluster, out = config.cluster, config.out
    assert cluster.ray is not None
    assert out is not None
    require("ray", "ray", "--ray")
    folder = PartFolder(out, _table(verb, config))
    earlier = folder.earlier_run(config.resume)
    photos = find_samples(config.paths)
    with connected(cluster.ray):
        workers = workers_of(config.run.device, config.run.threads or 1, config.run.workers)
        config = _for_workers(config, workers)
        opened = _opened(verb, config, photos, workers)
        run = Run(
            str(opened.run), len(photos), photo_list_sum(photos), _part_size(config, len(photos), workers, earlier)
        )
        _check_same_run(earlier, run, folder.place)
        tally = verb.tally(opened.labels, opened.multi_label, photos, config)
        return _write(verb, config, folder, run, photos, opened, workers, tally)


def _write(
    verb: Verb,
    config: PredictConfig | EmbedConfig,
    folder: PartFolder,
    run: Run,
    photos: Sequence[AnyPhoto],
    opened: _Opened,
    workers: Workers,
    tally: Tally,
) -> int:
    folder.begin(run)
    finished = sorted(number for number in folder.finished() if number < run.parts)
    for number in finished:
        _count_finished(folder, run, number, tally)
    absent = sorted(set(range(run.parts)).difference(finished))
    missing = set(absent)
    done_before, started = tally.photos, time.perf_counter()
    kept = (*_SUMMARY, *((KEY, "top") if verb.labelled else ()))
    work = Work(
        os.getcwd(),
        partial(_open_again, verb, config, opened),
        partial(_records, verb, config, run.run),
        partial(_summary, kept),
        folder.encoded,
        None if folder.local or config.cluster.ordered else folder.write_part,
    )

    def summaries() -> Iterator[Record]:
        parts = (Part(number, tuple(photos[run.photos_of(number)])) for number in absent)
        for done in compute(parts, work, workers, config.cluster.ordered):
            if done.number not in missing:  # computed twice, because the first result was lost with its machine
                continue
            missing.remove(done.number)
            if done.content is not None:
                folder.write_part(done.number, done.content)
            yield from done.summaries

    try:
        for record in progress(summaries(), len(photos), config.run.progress, done_before):
            tally.add(record)
    except KeyboardInterrupt:
        say(f"{tally.photos} of {len(photos)} photos are done; continue with --resume")
        raise
    if missing:
        raise ConfigError(f"Ray gave no result for {len(missing)} of {run.parts} parts; continue with --resume")
    speed = (len(photos) - done_before) / (time.perf_counter() - started)
    say(tally.summary() + (f", {speed:.1f} photos/s including reading" if absent else ""))
    say(f"parts: {run.parts} in {folder.place}, {run.part_size} photos each")
    return 1 if tally.failed else 0


def _table(verb: Verb, config: PredictConfig | EmbedConfig) -> Table | None:
    """The format of the parts by the name of the folder; None for JSON lines."""
    suffix = Path(str(config.out)).suffix
    if suffix == ".jsonl" or (suffix != ".parquet" and isinstance(config, PredictConfig)):
        return None
    require("pyarrow", "parquet", f"--out {Path(str(config.out)).name}")
    return verb.table()


def _for_workers(config: Any, workers: Workers) -> Any:
    """The settings with the numbers of threads written out: they change the rounding of results."""
    threads = config.run.threads or 1
    return replace(config, run=replace(config.run, threads=threads, workers=config.run.workers or workers.cores))


def _part_size(config: PredictConfig | EmbedConfig, photos: int, workers: Workers, earlier: Run | None) -> int:
    """Photos per part: whole batches, so that each photo has the batch that it has in one process."""
    if config.cluster.part_size is None and earlier is not None:
        return earlier.part_size
    wanted = config.cluster.part_size or min(_MOST_PHOTOS, photos // (_PARTS_PER_WORKER * workers.count))
    return max(1, -(-wanted // config.run.batch_size)) * config.run.batch_size


def _check_same_run(earlier: Run | None, run: Run, place: object) -> None:
    if earlier is None or earlier == run:
        return
    if earlier.run != run.run:
        raise ConfigError(
            f"{place} was started with another model or other settings: expected run {run.run}, got run "
            f"{earlier.run}; use the same model and settings, or choose another --out"
        )
    if earlier.list != run.list:
        raise ConfigError(
            f"{place} was started with another list of photos ({earlier.photos} photos, now {run.photos}); give the "
            "same PATHS, or choose another --out"
        )
    raise ConfigError(
        f"{place} has parts of {earlier.part_size} photos, got {run.part_size}; remove --part-size and give the same "
        "--batch-size"
    )


def _count_finished(folder: PartFolder, run: Run, number: int, tally: Tally) -> None:
    before = tally.photos
    for record in folder.records_of(number):
        if record.get("run") != run.run:
            raise ConfigError(
                f"part {number} in {folder.place} is of another run; delete it, and continue with --resume"
            )
        tally.add(record)
    if tally.photos - before != len(range(run.photos)[run.photos_of(number)]):
        raise ConfigError(f"part {number} in {folder.place} is incomplete; delete it, and continue with --resume")


# ---- in a process of the cluster


def _opened(verb: Verb, config: Any, photos: Sequence[AnyPhoto], workers: Workers) -> _Opened:
    """Open the model in one process of the cluster; calibrate it there if it needs this."""
    found = run_once(partial(_describe, verb, config, os.getcwd(), None), workers)
    if found.run is None:
        found = run_once(partial(_describe, verb, config, os.getcwd(), list(photos)), workers)
    for line in found.messages.splitlines():
        say(line.removeprefix("patchlife: "))
    return found


def _describe(verb: Verb, config: Any, folder: str, photos: Sequence[AnyPhoto] | None) -> _Opened:
    """Describe the model; ``photos`` calibrate it if they are given and it needs this."""
    with suppress(OSError):
        os.chdir(folder)
    with redirect_stderr(io.StringIO()) as messages:
        pipeline = verb.open(config)
        settings = verb.settings(pipeline, config)
        base = run_identity(pipeline, settings, [])
        run: str | None = base
        known = dict(pipeline.model.calibrations) if pipeline.model.calibration is not None else {}
        if needs_calibration(pipeline):
            run = None
            if photos is not None and calibrate_if_needed(pipeline, photos, config.run):
                run = run_identity(pipeline, settings, photos)
    new = [] if run in (base, None) else [item for item in pipeline.model.calibrations.items() if item[0] not in known]
    return _Opened(
        base,
        run,
        tuple((start, calibration) for (_, start), calibration in new),
        pipeline.labels,
        pipeline.multi_label,
        messages.getvalue(),
    )


def _open_again(verb: Verb, config: Any, first: _Opened) -> Pipeline:
    """Open the model in a worker. Raises ConfigError if it is not the model that was opened first."""
    with redirect_stderr(io.StringIO()):
        pipeline = verb.open(config)
    found = run_identity(pipeline, verb.settings(pipeline, config), [])
    if found != first.base:
        raise ConfigError(
            f"other weights or settings than on the first one: expected {first.base}, got {found}; give every machine "
            "the same files and the same packages"
        )
    for start, calibration in first.calibrations:
        pipeline.model.use_calibration(calibration, start)
    return pipeline


def _records(verb: Verb, config: Any, run: str, pipeline: Pipeline, photos: Sequence[AnyPhoto]) -> Iterator[Record]:
    return (record | {"run": run} for record in verb.records(pipeline, photos, config))


def _summary(kept: Sequence[str], record: Record) -> Record:
    return {name: record[name] for name in kept if name in record}
