"""Where replicas run: threads and GPUs of each, on machines of several sizes."""

from __future__ import annotations

import pytest
import torch

from patchlife.config import ModelConfig, ServeConfig
from patchlife.errors import ConfigError
from patchlife.serve.placement import Placement, on_cluster, on_this_machine


def settings(**changes) -> ServeConfig:
    return ServeConfig(ModelConfig("demo"), **changes)


@pytest.mark.parametrize(
    ("machines", "changes", "placement"),
    [
        ([(16, 0)], {}, Placement(16, False)),
        ([(16, 0), (8, 0)], {"replicas": 3}, Placement(8, False)),
        ([(16, 0), (8, 0)], {"replicas": 4}, Placement(5, False)),
        ([(16, 0)], {"replicas": 3, "threads": 4}, Placement(4, False)),
        ([(32, 0), (16, 4)], {"replicas": 2}, Placement(8, True)),
        ([(32, 0), (16, 4)], {"replicas": 2, "device": "cpu"}, Placement(16, False)),
        ([(8, 1), (64, 1)], {"replicas": 2, "device": "cuda"}, Placement(8, True)),
        ([(16, 1)], {"replicas": 2, "engine": "onnx"}, Placement(8, False)),
    ],
)
def test_replicas_on_a_cluster_have_what_leaves_room_for_the_others(machines, changes, placement):
    assert on_cluster(settings(**changes), machines) == placement


@pytest.mark.parametrize(
    ("machines", "changes", "message"),
    [
        ([(16, 1)], {"replicas": 2}, "expected a GPU for each, the cluster has room for 1; give fewer --replicas"),
        ([(16, 0)], {"device": "cuda"}, "expected a GPU for each, the cluster has room for 0"),
        ([(8, 0), (8, 0)], {"threads": 16}, "expected 16 CPU cores for each, the cluster has room for 0"),
        ([(2, 0)], {"replicas": 3}, "expected 1 CPU core for each, the cluster has room for 2"),
        ([], {}, "the cluster has room for 0"),
    ],
)
def test_a_cluster_without_room_is_an_error_and_not_a_wait_without_end(machines, changes, message):
    with pytest.raises(ConfigError, match=message):
        on_cluster(settings(**changes), machines)


def test_replicas_on_this_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert on_this_machine(settings(device="cpu")) == Placement(8, False)
    assert on_this_machine(settings(device="cpu", replicas=3)) == Placement(2, False)
    assert on_this_machine(settings(device="cpu", replicas=20)) == Placement(1, False)
    assert on_this_machine(settings(device="cpu", threads=5)) == Placement(5, False)


def test_each_replica_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert on_this_machine(settings(threads=2)) == Placement(2, True)
    with pytest.raises(ConfigError, match="--replicas 2: expected a GPU for each, this machine has room for 1"):
        on_this_machine(settings(replicas=2))
