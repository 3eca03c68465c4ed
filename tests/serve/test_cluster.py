"""`patchlife serve --address` on a Ray cluster that runs already and goes on afterwards."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_service import WORDS, wait_until
from serve_load import started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def address(monkeypatch) -> Iterator[str]:
    """A new cluster of this machine's cores, in other processes; Serve stays on one after the first application."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # as in a cluster that the command starts
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster.address
    cluster.shutdown()


def applications(address: str) -> str:
    """What Serve runs on the cluster, asked in another process."""
    code = f"import ray; from ray import serve; ray.init({address!r}, log_to_driver=False); print(serve.status())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return asked.stdout


def command(address: str) -> list[str]:
    return [sys.executable, "-m", "patchlife", "serve", *WORDS, "--address", address]


def test_a_service_that_is_interrupted_while_it_starts_leaves_nothing_on_the_cluster(address):
    process = subprocess.Popen(command(address), stdout=subprocess.DEVNULL)
    wait_until(lambda: process.poll() is not None or "DEPLOYING" in applications(address), 300, "it does not start")
    assert process.poll() is None
    process.terminate()
    assert process.wait(30) == 0
    wait_until(lambda: "patchlife" not in applications(address), 60, "the application is left")


def test_it_answers_refuses_a_second_service_and_is_removed_at_the_end(address):
    service = started([*WORDS, "--address", address])
    photo = next((Path(__file__).parents[2] / "src/patchlife/assets/demo/photos/ketch").iterdir())
    with urllib.request.urlopen(f"{service.url}/v1/predict", data=photo.read_bytes(), timeout=60) as answer:
        assert answer.status == 200
        assert b'"ketch"' in answer.read()
    second = subprocess.run(command(address), capture_output=True, text=True, timeout=300)
    assert second.returncode == 2
    assert "an application named patchlife runs on this cluster already" in second.stderr
    assert "patchlife" in applications(address)
    service.end()
    wait_until(lambda: "patchlife" not in applications(address), 60, "the application is left")
