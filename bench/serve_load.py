"""Load and soak of `patchlife serve`, on this machine only, bounded in count and time.

    python bench/serve_load.py soak recipes/vit_tiny/adapter photos/ --checkpoint vit_tiny.safetensors --out soak.json
    python bench/serve_load.py overload recipes/vit_tiny/adapter photos/ --checkpoint ... --out o.json --plot o.png

soak: 5,000 requests by 32 clients, one in five with something that is not a photo. Each answer is compared with the
photo's answer alone, in this process. overload: photos come at twice the rate that the service answers at budget 1,
once with --degrade and once without; goodput is the answers within the deadline, per second. All arguments but those
below are those of `patchlife serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp

from patchlife.data import evenly_spaced, list_photos
from patchlife.io.files import write_atomic
from patchlife.serve.supervisor import descendants

LADDER = (1.0, 0.8, 0.6, 0.45)
BAD = (
    b"",
    b"<html><body>no photo</body></html>",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"\xff\xd8\xff" + b"0" * 99,
)
"""Bodies that are not photos: nothing, HTML, SVG, a damaged JPEG."""


@dataclass(frozen=True)
class Reply:
    """What came back for one request.

    Attributes:
        body: index of the body that was sent.
        status: of HTTP; 0 if the connection broke.
        seconds: until the whole answer was there.
        budget: that answered; None for an error.
        content: the JSON document.
    """

    body: int
    status: int
    seconds: float
    budget: float | None = None
    content: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Service:
    """A running service.

    Attributes:
        process: that was started. port: on 127.0.0.1.
    """

    process: subprocess.Popen
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self) -> dict[int, str]:
        """Name of each process of the service, by its number."""
        found = {}
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def memory(self, of: str = "") -> int:
        """Resident bytes of the processes whose name holds ``of``."""
        total = 0
        for pid, name in self.processes().items():
            with contextlib.suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE") if of in name else 0
        return total

    def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> float:
        """Signal it and wait; returns the seconds that it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(seconds)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return time.monotonic() - started


def started(words: Sequence[str], seconds: float = 480, environment: dict[str, str] | None = None) -> Service:
    """Start `patchlife serve` with these arguments on a free port, and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "patchlife", "serve", *words, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {}))
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if "http://" in (process.stdout.readline() or ""):
            return Service(process, port)
        time.sleep(0.2)
    process.kill()
    process.stdout.close()
    raise RuntimeError(f"the service did not start within {seconds:g} s (exit code {process.poll()})")


@contextmanager
def running(words: Sequence[str]) -> Iterator[Service]:
    """A service inside a ``with`` block."""
    service = started(words)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.end()


async def sent(session: aiohttp.ClientSession, url: str, index: int, body: bytes) -> Reply:
    """Send one body and read the answer."""
    begun = time.monotonic()
    try:
        async with session.post(url, data=body, headers={"Content-Type": "application/octet-stream"}) as answer:
            content = await answer.json()
            budget = answer.headers.get("X-PatchLife-Budget")
            return Reply(index, answer.status, time.monotonic() - begun, float(budget) if budget else None, content)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
        return Reply(index, 0, time.monotonic() - begun)


def session(connections: int) -> aiohttp.ClientSession:
    """A client with so many connections, and two minutes for an answer."""
    connector = aiohttp.TCPConnector(limit=connections)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120))


async def by_clients(
    url: str, bodies: Sequence[bytes], clients: int, requests: int | None = None, seconds: float = 3600
) -> list[Reply]:
    """So many clients, each sends its next request when it has the answer to the last one."""
    replies: list[Reply] = []
    end, count = time.monotonic() + seconds, iter(range(requests if requests is not None else 10**9))

    async def client(own: aiohttp.ClientSession, chance: random.Random) -> None:
        while time.monotonic() < end and next(count, None) is not None:
            index = chance.randrange(len(bodies))
            replies.append(await sent(own, url, index, bodies[index]))
            if replies[-1].status == 503:
                await asyncio.sleep(0.2)

    async with session(clients) as own:
        await asyncio.gather(*(client(own, random.Random(seed)) for seed in range(clients)))
    return replies


async def at_rate(url: str, bodies: Sequence[bytes], rate: float, seconds: float) -> list[Reply]:
    """Requests at a rate per second, whether answers come or not: evenly spaced, at most 4,000 of them."""
    tasks, begun = [], time.monotonic()
    async with session(0) as own:
        for number in range(min(4000, int(rate * seconds))):
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
            index = number % len(bodies)
            tasks.append(asyncio.create_task(sent(own, url, index, bodies[index])))
        return list(await asyncio.gather(*tasks))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent * len(ordered) / 100))] if ordered else float("nan")


# ---- answers alone


class Alone:
    """The answers that each body gets alone, in this process: batches of one."""

    def __init__(self, words: Sequence[str], bodies: Sequence[bytes]) -> None:
        from patchlife.cli.main import _parse
        from patchlife.serve.answering import open_answerer

        _, config = _parse(["serve", *words])
        self.answerer, self.bodies = open_answerer(config), bodies
        self._known: dict[tuple[int, float], dict[str, Any]] = {}

    def wrong(self, reply: Reply, tolerance: float = 2e-4) -> str:
        """What is wrong with a reply of status 200 or 422; empty if it equals the answer alone."""
        from patchlife.errors import ImageError
        from patchlife.serve.questions import Ask

        try:
            image = self.answerer.read(self.bodies[reply.body])
        except ImageError as error:
            return "" if (reply.status, reply.content) == (422, {"error": str(error)}) else f"expected {error}"
        if reply.status != 200 or reply.budget is None:
            return f"status {reply.status} for a photo"
        key = reply.body, reply.budget
        if key not in self._known:
            (self._known[key],) = self.answerer.answer([Ask("predict", reply.budget, 1000)], [image])
        known = self._known[key]
        expected = {entry["class"]: entry["probability"] for entry in known["top"]}
        got = {entry["class"]: entry["probability"] for entry in reply.content["top"]}
        if any(abs(expected[index] - probability) > tolerance for index, probability in got.items()):
            return f"probabilities {got}, alone {expected}"
        others = [probability for index, probability in expected.items() if index not in got]
        if others and min(got.values()) < max(others) - tolerance:
            return "a more probable class is missing"
        return "" if reply.content["kept"] == known["kept"] else f"kept {reply.content['kept']}, alone {known['kept']}"


# ---- the two measurements


def soak(words: Sequence[str], photos: Sequence[bytes], requests: int, clients: int) -> dict[str, Any]:
    """Mixed good and bad requests; how many answers are wrong."""
    bodies = [*photos, *list(BAD) * max(1, len(photos) // (4 * len(BAD)))]
    words = [*words, "--degrade", ",".join(map(str, LADDER))]
    with running(words) as service:
        url = f"{service.url}/v1/predict"
        asyncio.run(by_clients(url, bodies, clients, 200))  # buffers reach their size
        before, begun = service.memory(), time.monotonic()
        replies = asyncio.run(by_clients(url, bodies, clients, requests, 1500))
        seconds, after = time.monotonic() - begun, service.memory()
    alone = Alone(words, bodies)
    answered = [reply for reply in replies if reply.status != 503]
    wrong = [text for reply in answered if (text := alone.wrong(reply))]
    times = [reply.seconds for reply in replies if reply.status == 200]
    return {
        "requests": len(replies),
        "clients": clients,
        "statuses": dict(sorted(Counter(reply.status for reply in replies).items())),
        "wrong": len(wrong),
        "first_wrong": wrong[:3],
        "budgets": dict(sorted(Counter(reply.budget for reply in replies if reply.budget).items())),
        "seconds": round(seconds, 1),
        "milliseconds": {f"p{p}": round(1000 * percentile(times, p), 1) for p in (50, 95, 99)},
        "memory_mb": {"before": before >> 20, "after": after >> 20},
    }


def overload(words: Sequence[str], photos: Sequence[bytes], seconds: float, rounds: int) -> dict[str, Any]:
    """Goodput at twice the rate that is answered at budget 1: refusing alone against --degrade."""
    ways = {"refuse": ["--budget", "1.0"], "degrade": ["--degrade", ",".join(map(str, LADDER))]}
    capacity, found = None, {way: [] for way in ways}
    for _ in range(rounds):
        for way, options in ways.items():
            with running([*words, *options]) as service:
                url = f"{service.url}/v1/predict"
                asyncio.run(by_clients(url, photos, 4, 40))
                if capacity is None:
                    begun = time.monotonic()
                    full = asyncio.run(by_clients(url, photos, 16, seconds=seconds))
                    capacity = sum(r.status == 200 for r in full) / (time.monotonic() - begun)
                begun = time.monotonic()
                replies = asyncio.run(at_rate(url, photos, 2 * capacity, seconds))
                found[way].append(_overloaded(replies, time.monotonic() - begun))
    return {"capacity_at_budget_1": round(capacity or 0, 2), "offered": round(2 * (capacity or 0), 2), "rounds": found}


def _overloaded(replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    good = [reply for reply in replies if reply.status == 200]
    budgets = [reply.budget for reply in good if reply.budget]
    return {
        "offered": len(replies),
        "goodput": round(len(good) / seconds, 2),
        "answered": round(len(good) / len(replies), 4),
        "statuses": dict(sorted(Counter(reply.status for reply in replies).items())),
        "budgets": dict(sorted(Counter(budgets).items())),
        "mean_budget": round(statistics.mean(budgets), 4) if budgets else None,
        "milliseconds": {f"p{p}": round(1000 * percentile([r.seconds for r in good], p)) for p in (50, 95, 99)},
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Goodput of both ways, and the budgets that answered."""
    from patchlife.visual.plots import new_figure, rendered

    figure = new_figure(8, 3.2)
    left, right = figure.subplots(1, 2)
    ways = {"refuse": "refusing alone", "degrade": "--degrade"}
    colours = {1.0: "#1b4965", 0.8: "#3a7ca5", 0.6: "#81b1d6", 0.45: "#c3dbee"}
    for place, way in enumerate(ways):
        bottom = 0.0
        for budget, colour in colours.items():
            parts = [
                r["goodput"]
                * r["budgets"].get(budget, r["budgets"].get(str(budget), 0))
                / max(1, sum(r["budgets"].values()))
                for r in result["rounds"][way]
            ]
            height = statistics.mean(parts)
            left.bar(place, height, bottom=bottom, color=colour, label=f"budget {budget:g}" if place == 0 else None)
            bottom += height
        for round_ in result["rounds"][way]:
            left.plot(place, round_["goodput"], "k_", markersize=14)
    left.axhline(result["offered"], color="grey", linestyle="--", linewidth=1, label="offered")
    left.set_xticks(range(2), ways.values())
    left.set_ylabel("answers within the deadline, per second")
    left.set_ylim(0, 1.25 * result["offered"])
    left.legend(fontsize=7, loc="upper left", ncols=2)
    for place, way in enumerate(ways):
        for number, key in enumerate(("p50", "p99")):
            values = [r["milliseconds"][key] / 1000 for r in result["rounds"][way]]
            right.bar(
                place + 0.35 * (number - 0.5),
                statistics.mean(values),
                0.33,
                color=("#81b1d6", "#1b4965")[number],
                label=key if place == 0 else None,
            )
    right.set_xticks(range(2), ways.values())
    right.set_ylabel("seconds until the answer")
    right.legend(fontsize=7)
    rendered(figure).save(path)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("soak", "overload"))
    parser.add_argument("model")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--count", type=int, default=100, help="different photos")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args, words = parser.parse_known_args()
    photos = [path.read_bytes() for path in evenly_spaced(list_photos(args.photos), args.count)]
    command = [args.model, *words]
    if args.what == "soak":
        found = soak(command, photos, args.requests, args.clients)
    else:
        found = overload(command, photos, args.seconds, args.rounds)
    import torch

    from patchlife.evaluation.timing import conditions

    own = {"dtype": "float32", "ray": version("ray"), **conditions(torch.device("cpu"))}
    names = [Path(word).name if "/" in word else word for word in command]
    result = {"what": args.what, "arguments": names, "photos": len(photos), **found, "conditions": own}
    print(json.dumps(found, indent=1))
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
