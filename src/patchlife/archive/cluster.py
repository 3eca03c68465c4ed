"""Parts on a Ray cluster, by Ray Data: a pool of workers, one task per part, restarts, memory that does not grow.

Ray gives the pool, the transport of parts and results, back pressure, restarted workers and repeated tasks. Because Ray
Data repeats a task without end, the journal that finds a photo which kills its worker is our own (`worker.py`).
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import ConfigError, PatchLifeError
from ..extras import need
from ..logs import errors_only
from .worker import Done, Journal, Part, Work, Worker

__all__ = ["LOCAL", "Workers", "compute", "connected", "machines", "room", "run_once", "workers_of"]

T = TypeVar("T")

LOCAL = "local"
_WHAT = "--ray"
_OBJECTS = 256 * 2**20  # bytes of a local cluster's object store: results that wait to be written
_MOST_CORES = 8  # for a worker with a GPU


@dataclass(frozen=True)
class Workers:
    """The pool.

    Attributes:
        count: number of workers.
        cores: CPU cores of each.
        gpus: GPUs of each, 0 or 1.
    """

    count: int
    cores: int
    gpus: int


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine (`LOCAL`) that ends with the context.

    A local cluster listens on 127.0.0.1 only, without dashboard. Usage statistics are off unless the user's environment
    switches them on. If this process is connected already, this connection is used and stays.

    Raises ConfigError if there is no cluster at the address.
    """
    _set_environment(address)
    ray: Any = need("ray", _WHAT)
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECTS}
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray raises many kinds, among them a plain Exception if a machine is too busy to start
        reason = str(error).partition("\n")[0]
        expected = "to start a cluster on this machine" if address == LOCAL else "the address of a running cluster"
        raise ConfigError(f"--ray {address}: expected {expected}, got: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _set_environment(address: str) -> None:
    """Ray reads these when it is imported and when it starts processes."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # on standard error; workers that end are no error here
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # would upload the working folder and install it anew
    if address == LOCAL:
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: any other process would be served first
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all ports on 127.0.0.1, also on Linux


def workers_of(device: str, threads: int, reading: int | None) -> Workers:
    """One worker per GPU; per ``threads`` CPU cores if the cluster has no GPU or ``device`` is cpu.

    Raises ConfigError if the cluster has no room for a worker.
    """
    if device == "mps":
        raise ConfigError("--ray runs on CPUs and CUDA GPUs, got --device mps; choose --device cpu")
    found = machines()
    if device != "cpu" and (with_gpu := [(cores, gpus) for cores, gpus in found if gpus and cores]):
        own = max(1, min(reading or _MOST_CORES, *(cores // gpus for cores, gpus in with_gpu)))
        return Workers(room(found, own, on_gpu=True), own, 1)
    if device == "cuda":
        raise ConfigError("the Ray cluster has no GPU; choose --device auto")
    if not (count := room(found, threads)):
        most = max((cores for cores, _ in found), default=0)
        raise ConfigError(
            f"a worker needs {threads} CPU cores of one machine (--threads), the Ray cluster has {most}; give fewer"
        )
    return Workers(count, threads, 0)


def machines() -> list[tuple[int, int]]:
    """(CPU cores, GPUs) of each machine of the cluster, as they are offered to Ray."""
    nodes = [node["Resources"] for node in need("ray", _WHAT).nodes() if node["Alive"]]
    return [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]


def room(found: Iterable[tuple[int, int]], cores: int, on_gpu: bool = False) -> int:
    """How many processes with so many ``cores``, and a GPU each if ``on_gpu``, the machines have room for at a time."""
    return sum(min(of_machine // cores, gpus) if on_gpu else of_machine // cores for of_machine, gpus in found)


def run_once(function: Callable[[], T], workers: Workers) -> T:
    """The result of a function that is run by one process of the cluster. Errors of patchlife are raised here."""
    ray: Any = need("ray", _WHAT)
    task = ray.remote(_caught).options(num_cpus=workers.cores, num_gpus=workers.gpus, max_retries=3)
    outcome = ray.get(task.remote(function))
    if isinstance(outcome, _Failure):
        raise ConfigError(outcome.message)
    result: T = outcome
    return result


@dataclass(frozen=True)
class _Failure:
    message: str


def _caught(function: Callable[[], T]) -> T | _Failure:
    try:
        return function()
    except (PatchLifeError, OSError) as error:
        return _Failure(str(error))


def compute(parts: Iterable[Part], work: Work, workers: Workers, ordered: bool) -> Iterator[Done]:
    """Compute parts; yields each when it is done, or in their order.

    Raises ConfigError if a worker cannot open the model or write a part.
    """
    ray: Any = need("ray", _WHAT)
    data: Any = need("ray.data", _WHAT)
    rows = [{"part": pickle.dumps(part)} for part in parts]
    if not rows:
        return
    journal = ray.remote(Journal).options(num_cpus=0, scheduling_strategy=_here(ray)).remote()
    pool = data.ActorPoolStrategy(size=min(workers.count, len(rows)), max_tasks_in_flight_per_actor=2)
    with _quiet(data, ordered):
        results = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _MapParts,
            batch_size=None,
            compute=pool,
            fn_constructor_args=(pickle.dumps(work), journal),
            num_cpus=workers.cores,
            num_gpus=workers.gpus or None,
        )
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            for content in batch["done"]:
                done: Done = pickle.loads(content)
                if done.failure:
                    raise ConfigError(done.failure)
                yield done


class _MapParts:
    """The worker as Ray Data calls it: pickled parts in, pickled results out."""

    def __init__(self, work: bytes, journal: Any) -> None:
        self.worker = Worker(pickle.loads(work), _JournalThere(journal))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        done = [pickle.dumps(self.worker.done(pickle.loads(part))) for part in batch["part"]]
        return {"done": np.array(done, object)}


class _JournalThere:
    """The journal, an actor. A note has arrived when its function returns."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.ray = actor, need("ray", _WHAT)

    def begin(self, part: int, what: object) -> int | None:
        """As in `Journal`."""
        found: int | None = self.ray.get(self.actor.begin.remote(part, what))
        return found

    def end(self, part: int, what: object) -> None:
        """As in `Journal`."""
        self.ray.get(self.actor.end.remote(part, what))

    def forget(self, part: int) -> None:
        """As in `Journal`."""
        self.actor.forget.remote(part)


def _here(ray: Any) -> Any:
    """Place an actor on the machine of the command: without it, nothing could go on anyway."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


@contextmanager
def _quiet(data: Any, ordered: bool) -> Iterator[None]:
    """Ray Data without its own progress bars and messages; the order of results as asked for."""
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = ordered
    with errors_only("ray.data"):
        yield
