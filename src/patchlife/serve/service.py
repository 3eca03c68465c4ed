"""A service that starts, runs until a signal and ends: on a Ray cluster of its own, or on an existing one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..archive.cluster import machines
from ..config import ServeConfig
from ..errors import ConfigError
from .bodies import MIDDLEWARES, limits_in_environment
from .placement import Placement, on_cluster, on_this_machine
from .questions import Description
from .supervisor import descendants, kill

__all__ = ["serve_until_signal"]

_DRAIN = 2.5  # seconds in which accepted photos are answered when the service ends
_TRIES = 3
_LOOPBACK = "127.0.0.1"
_STORE = 256 * 2**20  # bytes of Ray's object store, which holds bodies on their way to a replica


def serve_until_signal(config: ServeConfig, description: Description) -> None:
    """Serve until SIGTERM or SIGINT, then answer the accepted photos.

    Raises ConfigError if the service cannot start.
    """
    config = _absolute(config)
    here = on_this_machine(config) if config.address is None else None
    os.environ |= _environment(config)
    with _signals() as signals, _cluster(config) as ended:
        placement = here or on_cluster(config, machines())
        where = f"at http://{_shown(config.host)}:{config.port}"
        if config.address is not None and _serve_runs():
            where = "at the address of the Serve that runs there, path "
        try:
            handle = _run(config, description, placement)
            told = f"{description.name} {where}/v1/{description.tasks[0]}, its page at /docs  (Ctrl-C ends it)"
            print(told, flush=True)
            signals.wait()
            with contextlib.suppress(Exception):  # the gate may have ended; the processes end in any case
                handle.drain.remote(_DRAIN).result(timeout_s=_DRAIN + 1)
        finally:
            ended()  # also if it does not start, or is interrupted before


def _environment(config: ServeConfig) -> dict[str, str]:
    """Settings of Ray that are read from the environment, also by its other processes."""
    always = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would build another environment for its workers
    }
    if config.address is not None:
        return always
    return always | {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": MIDDLEWARES,
        "RAY_SERVE_ROUTER_RETRY_MAX_BACKOFF_S": "0.05",  # half a second by default, in which a replica has no work
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 by default, too short on a busy machine
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own ports are then reachable from this machine only
        "RAY_worker_niceness": "0",  # 15 by default: any other process would be served first
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a replica on the CPU keeps its CUDA_VISIBLE_DEVICES
        **limits_in_environment(config.max_body * 2**20),
    }


def _serve_runs() -> bool:
    """Whether Serve runs on the cluster already. Raises ConfigError if our application does: it would be replaced."""
    from ray import serve

    from .deployments import NAME

    status = serve.status()
    if NAME in status.applications:
        raise ConfigError(
            f"an application named {NAME} runs on this cluster already; end that `patchlife serve` first, or, if its "
            f"process is gone: python -c \"from ray import serve; serve.delete('{NAME}')\" on a machine of the cluster"
        )
    return bool(status.proxies)


def _run(config: ServeConfig, description: Description, placement: Placement) -> Any:
    """Start the application; returns the handle of its gate."""
    from ray import serve
    from ray.exceptions import RayError

    from .deployments import NAME, deployed

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options = {"host": config.host, "port": config.port, "request_timeout_s": config.deadline + 5}
    logs: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}
    try:
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=logs)
        return serve.run(deployed(config, description, placement), name=NAME, route_prefix="/", logging_config=logs)
    except (RuntimeError, RayError) as error:
        raise ConfigError(f"the service did not start: {error}") from None


@contextmanager
def _cluster(config: ServeConfig) -> Iterator[Any]:
    """A cluster; gives a function that ends the service on it."""
    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "serve"}
    if config.address is not None:
        ray.init(address=config.address, **common)
        try:
            yield _deleted
        finally:
            ray.shutdown()
        return
    with TemporaryDirectory(prefix="pl-serve-", ignore_cleanup_errors=True) as folder:
        own: dict[str, Any] = {
            "num_cpus": max(os.cpu_count() or 1, config.replicas),
            "include_dashboard": False,
            "object_store_memory": _STORE,
            "_node_ip_address": _LOOPBACK,
            "_temp_dir": folder if len(folder) < 40 else None,  # the paths of its sockets are limited to 107 bytes
        }
        try:
            _start(**common, **own)
            yield lambda: None
        finally:
            ray.shutdown()


def _start(**options: Any) -> None:
    """Start a cluster. Ray gives its processes half a minute, which is too short on a busy machine: three tries."""
    import ray

    for _ in range(_TRIES):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises the base class
            reason = str(error).partition("\n")[0]
        ray.shutdown()
        kill(descendants(os.getpid()))
    raise ConfigError(f"Ray does not start on this machine: {reason}; is it overloaded?")


def _deleted() -> None:
    """Remove the application from an existing cluster, whose Serve goes on."""
    from ray import serve

    from .deployments import NAME

    with contextlib.suppress(Exception):  # the cluster may have ended
        serve.delete(NAME)


class _Signals:
    """SIGTERM and SIGINT: until `wait` they interrupt what is done, as Ctrl-C does; `wait` waits for them."""

    def __init__(self) -> None:
        self._event, self._waits = threading.Event(), False

    def wait(self) -> None:
        """Wait for a signal; later ones change nothing."""
        self._waits = True
        self.set()
        self._event.wait()

    def set(self) -> None:
        """Handle the signals; Ray sets a handler of its own when it starts."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.received)

    def received(self, *_: Any) -> None:
        """A signal came."""
        if not self._waits:
            raise KeyboardInterrupt
        self._event.set()


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signals.set()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _absolute(config: ServeConfig) -> ServeConfig:
    """The settings with absolute paths: a replica may have another working directory."""
    model = config.model
    path = Path(model.model)
    return replace(
        config,
        model=replace(
            model,
            model=str(path.resolve()) if path.exists() else model.model,
            checkpoint=model.checkpoint and model.checkpoint.resolve(),
            labels=model.labels and model.labels.resolve(),
        ),
    )


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
