"""The command line, a small model, photos; a cluster that is this process, and one of three Ray nodes."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small import NAME, checkpoint, write_photos

from patchlife.archive import cluster as on_ray
from patchlife.archive.worker import Journal, Worker
from patchlife.cli import parts
from patchlife.cli.main import main


@dataclass(frozen=True)
class CommandResult:
    """Exit code and standard error of a command."""

    code: int
    err: str


@pytest.fixture
def patchlife(capfd) -> Callable[..., CommandResult]:
    """A function that runs a command line; arguments are converted by ``str``."""

    def run(*argv: object) -> CommandResult:
        capfd.readouterr()
        code = main([str(word) for word in argv])
        return CommandResult(code, capfd.readouterr().err)

    return run


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights") / "vit.safetensors")


@pytest.fixture
def model(vit_file) -> list[object]:
    """The arguments that select the small model, in batches of two."""
    return [NAME, "--checkpoint", vit_file, "--batch-size", 2, "--threads", 1]


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of eleven photos, one of which cannot be read."""
    paths = write_photos(tmp_path / "photos", 11)
    paths[3].write_bytes(b"no photo")
    return tmp_path / "photos"


@pytest.fixture
def here(monkeypatch) -> list[int]:
    """A cluster of two workers that is this process. Gives the numbers of the parts that it computes."""
    computed: list[int] = []

    @contextmanager
    def connected(address: str) -> Iterator[None]:
        yield

    def compute(wanted, work, workers, ordered):
        worker = Worker(pickle.loads(pickle.dumps(work)), Journal())  # as it is sent to the workers
        for part in wanted if ordered else reversed(list(wanted)):
            computed.append(part.number)
            done = worker.done(part)
            if done.failure:
                raise parts.ConfigError(done.failure)
            yield done

    monkeypatch.setattr(parts, "connected", connected)
    monkeypatch.setattr(parts, "workers_of", lambda *_: on_ray.Workers(2, 1, 0))
    monkeypatch.setattr(parts, "run_once", lambda function, workers: function())
    monkeypatch.setattr(parts, "compute", compute)
    return computed


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Three Ray nodes of one core each, connected. What a photo does to its worker depends on its name.

    ``kills*``: ends its worker by signal 9. ``once*``: the same, at the first time. ``unplug*``: writes the id of its
    node to a file beside it and waits, unless the node is the head or there is such a file.
    """
    on_ray._set_environment("")
    os.environ.setdefault("RAY_worker_niceness", "0")  # as in a cluster that the command starts
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    head = cluster.head_node.node_id

    def with_deadly_photos() -> None:
        import patchlife.data.reading as reading

        real = reading._read_bytes

        def read(path: Path, max_bytes: int) -> bytes:
            if path.name.startswith("kills"):
                os.kill(os.getpid(), signal.SIGKILL)
            if path.name.startswith("once") and not path.with_suffix(".begun").exists():
                path.with_suffix(".begun").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            node = ray.get_runtime_context().get_node_id()
            if path.name.startswith("unplug") and node != head and not (path.parent / "node.begun").exists():
                (path.parent / "node.begun").write_text(node)
                time.sleep(600)
            return real(path, max_bytes)

        reading._read_bytes = read

    try:
        for _ in range(2):
            cluster.add_node(**{name: value for name, value in small.items() if name != "include_dashboard"})
        environment = {"worker_process_setup_hook": with_deadly_photos, "env_vars": {"OMP_NUM_THREADS": "1"}}
        ray.init(address=cluster.address, runtime_env=environment, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
