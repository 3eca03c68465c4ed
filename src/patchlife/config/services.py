"""Settings of the verbs that listen on a port. As in `verbs.py`, the attribute docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ConfigError
from .checks import check_at_least, check_budget
from .groups import Device, EngineName, ModelConfig, Precision, RunConfig, check_dtype

__all__ = ["ExploreConfig", "ServeConfig"]


@dataclass(frozen=True)
class ExploreConfig:
    """Look at a model in the browser: a slider for the budget, life maps, answers, FLOPs and time.

    Attributes:
        model: Model and weights.
        paths: Photos, folders or glob patterns: the examples of the page, and the folder that its second tab measures.
            Default for demo: the photos that come with patchlife.
        host: Address to listen on. The default is reachable from this machine only.
        port: Port to listen on. Default: the first free one from 7860 on.
        open: Open the page in the default browser.
        trust: Open an exported .pt2 file. Opening one can run any code, so give only files that you exported.
        run: Device, number format and photo reading.
    """

    model: ModelConfig
    paths: tuple[str, ...] = field(default=(), metadata={"positional": True})
    host: str = field(default="127.0.0.1", metadata={"metavar": "ADDRESS"})
    port: int | None = field(default=None, metadata={"metavar": "PORT"})
    open: bool = False
    trust: bool = False
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_port(self.port)


@dataclass(frozen=True)
class ServeConfig:
    """Answer photos over HTTP: classes and embeddings, in batches, at the budget that each request asks for.

    Attributes:
        model: Model and weights.
        host: Address to listen on. The default is reachable from this machine only.
        port: Port to listen on.
        address: Address of an existing Ray cluster, or auto. Default: a cluster of this command, which ends with it.
        engine: Engine that runs the model. onnx and openvino export the model on the first start and keep the file in a
            cache folder (environment variable PATCHLIFE_CACHE). Default: eager, or the engine of an exported file or
            bundle, such as ONNX Runtime.
        device: Device of the model. auto: a CUDA GPU if there is one, else the CPU.
        dtype: Number format of weights and images. bfloat16 and float16 are for GPUs; on many CPUs they are slower.
        threads: CPU threads of each replica. Default: the CPU cores divided among the replicas.
        replicas: Processes that run the model, each with a copy of it.
        max_batch: Most photos in a batch. Photos of different budgets are in different batches.
        max_wait_ms: Longest time in milliseconds that a photo waits for others of its batch.
        max_queue: Most photos that wait for a replica. Further ones are refused with status 503 and Retry-After.
        max_body: Largest body of a request in MiB. Larger ones are refused with status 413.
        deadline: Seconds after which a photo that is not answered is refused with status 503. A photo is refused at
            once if those in front of it take more than half of it.
        degrade: Budgets, the largest first, such as 1.0,0.8,0.6,0.45. The first one answers. As the queue fills, the
            next ones answer, before anything is refused. The header X-PatchLife-Budget says which budget answered.
        trust: Open an exported .pt2 file. Opening one can run any code, so give only files that you exported.
    """

    model: ModelConfig
    host: str = field(default="127.0.0.1", metadata={"metavar": "ADDRESS"})
    port: int = field(default=8000, metadata={"metavar": "PORT"})
    address: str | None = field(default=None, metadata={"metavar": "ADDRESS"})
    engine: EngineName | None = None
    device: Device = "auto"
    dtype: Precision = "float32"
    threads: int | None = None
    replicas: int = 1
    max_batch: int = 8
    max_wait_ms: float = 5.0
    max_queue: int = 64
    max_body: int = field(default=16, metadata={"metavar": "MIB"})
    deadline: float = field(default=10.0, metadata={"metavar": "SECONDS"})
    degrade: tuple[float, ...] = ()
    trust: bool = False

    def __post_init__(self) -> None:
        _check_port(self.port)
        check_at_least(
            1,
            threads=self.threads,
            replicas=self.replicas,
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            max_body=self.max_body,
        )
        check_dtype(self.engine, self.dtype)
        if not 0 <= self.max_wait_ms <= 10_000:
            raise ConfigError(f"max_wait_ms must be 0 to 10000, got {self.max_wait_ms:g}")
        if not 0.1 <= self.deadline <= 3600:
            raise ConfigError(f"deadline must be 0.1 to 3600 seconds, got {self.deadline:g}")
        object.__setattr__(self, "degrade", tuple(check_budget(budget, "degrade") for budget in self.degrade))
        if any(after >= before for before, after in zip(self.degrade, self.degrade[1:], strict=False)):
            raise ConfigError(
                f"degrade must be budgets from the largest to the smallest, got {', '.join(map(str, self.degrade))}"
            )
        if self.degrade and (given := [name for name in ("budget", "speedup", "kept") if name in self.model.life]):
            raise ConfigError(f"degrade and {given[0]} are alternatives; the first budget of degrade is the usual one")


def _check_port(port: int | None) -> None:
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(f"port must be 1 to 65535, got {port}")
