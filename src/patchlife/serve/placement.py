"""Where the replicas of a service run: on GPUs or not, and on how many CPU threads each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..archive.cluster import room
from ..config import ServeConfig
from ..errors import ConfigError
from ..io.exported_files import is_exported

__all__ = ["Placement", "on_cluster", "on_this_machine"]


@dataclass(frozen=True)
class Placement:
    """What each replica has.

    Attributes:
        threads: CPU threads.
        on_gpu: whether it has a GPU of its own.
    """

    threads: int
    on_gpu: bool


def on_this_machine(config: ServeConfig) -> Placement:
    """The replicas of a service on this machine. Raises ConfigError if it has no room for them."""
    import torch

    from ..runtime.pipeline import pick_device

    on_gpu = _may_use_gpu(config) and pick_device(config.device).type == "cuda"
    if on_gpu and config.replicas > torch.cuda.device_count():
        raise ConfigError(_too_few("a GPU for each", config.replicas, torch.cuda.device_count(), "this machine"))
    return Placement(config.threads or max(1, (os.cpu_count() or 1) // config.replicas), on_gpu)


def on_cluster(config: ServeConfig, machines: Sequence[tuple[int, int]]) -> Placement:
    """The replicas of a service on a cluster of ``machines``: (CPU cores, GPUs) of each.

    A replica gets as many threads as leave room for the others, at most the cores of a machine.

    Raises ConfigError if the cluster has no room for the replicas.
    """
    gpus = sum(gpu for _, gpu in machines)
    on_gpu = _may_use_gpu(config) and (config.device == "cuda" or gpus > 0)
    if on_gpu and gpus < config.replicas:
        raise ConfigError(_too_few("a GPU for each", config.replicas, gpus, "the cluster"))
    most = config.threads or max((cores for cores, _ in machines), default=1)
    least = config.threads or 1
    fewer = range(most, least - 1, -1)
    threads = next((count for count in fewer if room(machines, count, on_gpu) >= config.replicas), None)
    if threads is None:
        what = f"{least} CPU core{'' if least == 1 else 's'} for each"
        raise ConfigError(_too_few(what, config.replicas, room(machines, least, on_gpu), "the cluster"))
    return Placement(threads, on_gpu)


def _may_use_gpu(config: ServeConfig) -> bool:
    """Whether replicas may run on a GPU: what ONNX Runtime and OpenVINO run does only if it is asked for."""
    if config.device != "auto":
        return config.device == "cuda"
    return config.engine in (None, "eager", "compile") and not is_exported(config.model.model)


def _too_few(what: str, replicas: int, room: int, where: str) -> str:
    return f"--replicas {replicas}: expected {what}, {where} has room for {room}; give fewer --replicas or --threads"
