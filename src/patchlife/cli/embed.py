"""``patchlife embed``: write the embedding of every photo to a .parquet or .npy file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EmbedConfig
from ..errors import ConfigError
from ..io.exported_files import is_exported
from .common import (
    calibrate_if_needed,
    check_engine,
    check_takes_any_size,
    find_samples,
    open_model,
    say,
    use_threads,
)
from .parts import Verb, write_parts
from .recording import Tally, run_identity, write_results
from .results import KEY, Record, results_in

if TYPE_CHECKING:
    from ..data import AnyPhoto
    from ..io.table import Table
    from ..runtime.pipeline import Pipeline

__all__ = ["embed", "run"]


def run(config: EmbedConfig) -> int:
    """Write the embedding of each photo; returns the exit code."""
    check_engine(config.model.model, None, config.trust, config.run.dtype)
    if config.cluster.ray is not None:
        return write_parts(Verb(_open, _settings, _records, _table, _tally), config)
    results = results_in(Path(config.out), embeddings=True)
    photos = find_samples(config.paths)
    earlier = results.earlier(config.resume)
    pipeline = _open(config)
    calibrated_now = calibrate_if_needed(pipeline, photos, config.run)
    identity = run_identity(pipeline, _settings(pipeline, config), photos if calibrated_now else [])

    def records_of(remaining: Sequence[AnyPhoto]) -> Iterator[Record]:
        return _records(pipeline, remaining, config)

    code = write_results(results, photos, earlier, records_of, identity, Tally(), config.run)
    say(f"embeddings: {' and '.join(map(str, results.files))}")
    return code


def _settings(pipeline: Pipeline, config: EmbedConfig) -> dict[str, Any]:
    """The options that change the records."""
    return {"output": "embedding", "normalize": config.normalize}


def _records(pipeline: Pipeline, photos: Sequence[AnyPhoto], config: EmbedConfig) -> Iterator[Record]:
    return embed(pipeline, photos, config.normalize, config.run.batch_size, config.run.workers)


def _table() -> Table:
    from ..io.parquet import EMBEDDINGS

    return EMBEDDINGS


def _tally(*_: object) -> Tally:
    return Tally()


def embed(
    pipeline: Pipeline,
    photos: Sequence[AnyPhoto],
    normalize: bool = False,
    batch_size: int = 16,
    workers: int | None = None,
) -> Iterator[Record]:
    """Compute embeddings; yields one record for each photo, in their order.

    A record has ``path`` and either ``error`` or these fields: ``embedding`` (packed, see `io.vectors`; of length 1
    with ``normalize``), ``flops`` and ``fraction_of_dense`` (of the dense model's FLOPs for its size).
    """
    from torch.nn.functional import normalize as to_length_1

    from ..io.vectors import VECTOR, packed
    from ..runtime.inference import Failure, embed_photos

    for result in embed_photos(pipeline, photos, batch_size, workers):
        if isinstance(result, Failure):
            yield {KEY: str(result.path), "error": result.error}
            continue
        vector = to_length_1(result.vector, dim=0) if normalize else result.vector
        yield {
            KEY: str(result.path),
            VECTOR: packed(vector.numpy()),
            "flops": result.flops,
            "fraction_of_dense": round(result.flops / result.dense_flops, 6),
        }


def _open(config: EmbedConfig) -> Pipeline:
    """Open the model, or the exported file or bundle. Raises ConfigError if it does not give embeddings."""
    if is_exported(config.model.model):
        check_takes_any_size(config.model.model, config.keep_aspect)
        from ..runtime.exported import open_exported

        use_threads(config.run)
        exported = open_exported(config.model, config.trust)
        if exported.labels.names:
            raise ConfigError(
                f"{config.model.model} is an exported classifier, which gives logits; give the model or adapter that "
                "it was exported from, or export a model without classifier"
            )
        return exported
    pipeline = open_model(config.model, config.run, config.keep_aspect)
    if not pipeline.model.backbone.pools:
        raise ConfigError(
            f"{pipeline.name} gives a vector for each patch, not one for the photo; choose a pooling, for example "
            "--model-args global_pool=avg"
        )
    return pipeline
