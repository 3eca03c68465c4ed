"""The table of faults, on a running service with Ray: what a client must never be able to do to the others.

The tests share one service. A test that ends it leaves the next one to start it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from live_service import LIMITS, WORDS, wait_until
from not_photos import BAD
from serve_load import Alone, Reply, Service, at_rate, by_clients, percentile, sent, session

from patchlife.data import list_photos
from patchlife.runtime.demo_model import demo_folder
from patchlife.serve.supervisor import descendants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEADLINE = 20.0
LIMIT = 2 * 2**20  # of bodies, in bytes


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return [path.read_bytes() for path in list_photos(demo_folder() / "photos")[::3]]


@pytest.fixture(scope="module")
def bodies(photos: list[bytes]) -> list[bytes]:
    """Photos and what is not a photo."""
    return [*photos, *(content for content, _ in BAD.values())]


@pytest.fixture(scope="module")
def alone(bodies: list[bytes]) -> Alone:
    return Alone(WORDS, bodies)


def url(live: Service, path: str = "/v1/predict") -> str:
    return live.url + path


def predicted(live: Service, body: bytes, query: str = "") -> Reply:
    async def one() -> Reply:
        async with session(1) as own:
            return await sent(own, url(live) + query, 0, body)

    return asyncio.run(one())


def raw(live: Service, request: bytes, seconds: float = 20) -> bytes:
    """The answer to bytes on a connection."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=seconds) as connection:
        connection.sendall(request)
        with contextlib.suppress(ConnectionError, TimeoutError):
            return b"".join(iter(lambda: connection.recv(65536), b""))
    return b""


def get(live: Service, path: str) -> tuple[int, str]:
    request = f"GET {path} HTTP/1.1\r\nHost: service\r\nConnection: close\r\n\r\n"
    head, _, body = raw(live, request.encode()).decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


def listening(processes: set[int]) -> Iterator[str]:
    """The addresses, in hexadecimal, on which these processes listen."""
    sockets = set()
    for pid in processes:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(entry.path))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                yield fields[1].partition(":")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_listens_on_other_addresses_than_loopback(live):
    addresses = set(listening({live.process.pid, *descendants(live.process.pid)}))
    mapped = "0000000000000000FFFF00000100007F"  # ::ffff:127.0.0.1
    assert addresses
    assert addresses <= {"0100007F", mapped, "00000000000000000000000001000000"}


def test_answers_equal_those_alone(live, photos, alone):
    for index, photo in enumerate(photos[:5]):
        for budget in (1.0, 0.5):
            reply = predicted(live, photo, f"?budget={budget}&top=10")
            assert reply.budget == budget
            assert alone.wrong(Reply(index, reply.status, 0, reply.budget, reply.content)) == ""
    assert predicted(live, photos[0], "?lives=true").content["lives"]["grid"] == [14, 14]


def test_a_body_over_the_limit_is_413_and_memory_is_bounded(live):
    listens = "ProxyActor"
    before = live.memory(listens)
    stated = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMIT + 1}\r\n\r\n".encode()
    assert raw(live, stated + b"x" * (LIMIT + 1)).startswith(b"HTTP/1.1 413 ")
    chunked = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    part = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert raw(live, chunked + part * (2 * LIMIT // 65536) + b"0\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", live.port), timeout=30) as endless:
        endless.sendall(chunked)
        for _ in range(2048):  # 128 MB, or until it is closed
            endless.sendall(part)
    assert live.memory(listens) - before < 60 * 2**20
    assert get(live, "/healthz")[0] == 200


def test_what_is_not_a_photo_is_422_and_its_batch_mates_are_answered_as_alone(live, bodies, alone):
    async def together() -> list[Reply]:
        async with session(20) as own:
            target = url(live) + "?budget=0.6&top=10"
            return await asyncio.gather(*(sent(own, target, i, bodies[i]) for i in range(-12, 0)))

    replies = [Reply(r.body % len(bodies), r.status, 0, r.budget, r.content) for r in asyncio.run(together())]
    assert {reply.status for reply in replies} == {200, 422}
    assert [alone.wrong(reply) for reply in replies] == [""] * len(replies)


@pytest.mark.parametrize(
    ("request_line", "headers", "statuses"),
    [
        ("GET /../../../../etc/passwd", "", {400, 404}),
        ("GET /%2e%2e/%2e%2e/etc/passwd", "", {400, 404}),
        ("GET /docs/../../etc/passwd", "", {400, 404}),
        ("POST /v1/predict?budget=9", "", {422}),
        ("POST /v1/predict?budget=0.5%0d%0aX-Injected:%20yes", "", {422}),
        ("POST /v1/predict?budget=0." + "5" * 3000, "", {414}),
        ("POST /v1/predict?top=" + "9" * 400, "", {422}),
        ("POST /v1/predict", "X-Request-ID: a\r\nX-Request-Timeout-Seconds: 0.000001\r\n", {422}),
        ("POST /v1/predict", "X-Request-ID: a\rX-Injected: yes\r\n", {400, 422}),
        ("POST /v1/predict", "Content-Length: 5\r\n", {400}),
        ("BREW /v1/predict", "", {400, 405}),
    ],
)
def test_hostile_requests_are_refused_and_nothing_is_told(live, request_line, headers, statuses):
    request = f"{request_line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n{headers}\r\n"
    answer = raw(live, request.encode()).decode("latin-1")
    head, _, body = answer.partition("\r\n\r\n")
    assert int(head.split()[1]) in statuses, answer
    assert "x-injected" not in head.lower()
    assert not any(secret in body for secret in ("root:", "Traceback", "site-packages", ".py", "/tmp", "ray."))


def test_clients_that_leave_do_not_disturb_the_others(live, photos, alone):
    for photo in photos[:8]:
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photo)}\r\n\r\n"
            connection.sendall(head.encode() + photo)
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(head.encode() + photo[:100])  # leaves in the middle of its body
    replies = asyncio.run(by_clients(url(live) + "?budget=0.8", photos, 4, 12))
    assert {reply.status for reply in replies} == {200}
    assert [alone.wrong(reply) for reply in replies] == [""] * 12
    wait_until(lambda: "patchlife_pending 0.0" in get(live, "/metrics")[1], 30, "photos are left")


def test_a_hundred_clients_get_answers_or_503(live, bodies, alone):
    before, replies = live.memory(), asyncio.run(by_clients(url(live), bodies, 100, seconds=20))
    statuses = {reply.status for reply in replies}
    good = [reply for reply in replies if reply.status == 200]
    assert statuses <= {200, 422, 503}  # 422 for the bodies that are not photos
    assert 200 in statuses
    assert percentile([reply.seconds for reply in good], 99) <= DEADLINE
    assert len({reply.budget for reply in good}) > 1, "the load did not lower the budget"
    wrong = [text for reply in replies if reply.status != 503 and (text := alone.wrong(reply))]
    assert wrong == []
    assert live.memory() - before < 300 * 2**20
    assert get(live, "/readyz")[0] == 200


def test_schemathesis_finds_nothing(live, tmp_path):
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", url(live, "/openapi.json"), "--url", live.url),
        *("--max-examples", "15", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--request-timeout", "60"),
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        *("--exclude-path", "/metrics", "--no-color"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_a_replica_that_is_killed_comes_back(live, photos, alone):
    (replica,) = [pid for pid, name in live.processes().items() if "ServeReplica:patchlife:Model" in name]

    async def killed() -> list[Reply]:
        load = asyncio.create_task(by_clients(url(live), photos, 6, seconds=6))
        await asyncio.sleep(1.5)
        os.kill(replica, signal.SIGKILL)
        return await load

    replies = asyncio.run(killed())
    assert {reply.status for reply in replies} <= {200, 503}
    wait_until(lambda: get(live, "/readyz")[0] == 200, 240, "not ready again")
    after = asyncio.run(by_clients(url(live), photos, 2, 6))
    assert {reply.status for reply in after} == {200}
    assert [alone.wrong(reply) for reply in [*replies, *after] if reply.status == 200 and alone.wrong(reply)] == []


def test_sigterm_under_load_ends_all_processes_in_time(live, photos, alone):
    processes = {live.process.pid, *descendants(live.process.pid)}

    async def ended() -> tuple[list[Reply], float]:
        load = asyncio.create_task(at_rate(url(live), photos, 10, 6))
        await asyncio.sleep(2)
        seconds = await asyncio.to_thread(live.end)
        return await load, seconds

    replies, seconds = asyncio.run(ended())
    assert seconds < 5 + 5  # drains within 5 s, and 5 s for a slow machine
    assert live.process.returncode == 0
    assert not [pid for pid in processes if runs(pid)]
    assert {reply.status for reply in replies} <= {200, 503, 0}  # 0: the port is closed
    assert sum(reply.status == 200 for reply in replies) > 0
    assert [text for reply in replies if reply.status == 200 and (text := alone.wrong(reply))] == []


def runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def started_wrongly(words: Sequence[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "patchlife", "serve", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_an_error_of_the_model_is_told_in_one_line():
    run = started_wrongly(["vit_tiny_patch16_224", *LIMITS])
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("patchlife: error: vit_tiny_patch16_224 would have random weights")
    assert run.stderr.count("\n") == 1
