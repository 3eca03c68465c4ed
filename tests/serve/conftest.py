"""A service without Ray for the fast tests, and one with Ray that the slow tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("ray", reason="the extra ray is not installed")

import httpx
from fastapi import FastAPI
from live_service import Shared

from patchlife.config import ModelConfig, ServeConfig
from patchlife.serve.answering import Answerer, open_answerer
from patchlife.serve.application import Service, application
from patchlife.serve.bodies import limits_of
from patchlife.serve.degrading import Ladder
from patchlife.serve.pace import Pace
from patchlife.serve.questions import Ask, Description

BODY = 100_000
"""The limit on bodies in the fast tests, in bytes."""


@dataclass
class FakeBackend:
    """Answers at once, or when it is told to."""

    asks: list[Ask] = field(default_factory=list)
    photos: list[bytes] = field(default_factory=list)
    wait: float = 0.0
    error: Exception | None = None
    runs: bool = True

    async def answer(self, ask: Ask, photo: bytes) -> dict[str, Any]:
        self.asks.append(ask)
        self.photos.append(photo)
        await asyncio.sleep(self.wait)
        if self.error:
            raise self.error
        return {"top": [], "budget": ask.budget, "flops": 1, "fraction_of_dense": 1.0, "kept": []}

    async def ready(self) -> bool:
        return self.runs


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def description() -> Description:
    return Description("test", ("predict", "embed"), 10, 1.0, None, "fixed")


@pytest.fixture
def service(backend: FakeBackend, description: Description) -> Service:
    return Service(backend, description, Ladder((1.0, 0.8, 0.6), 2), Pace(4, 8, deadline=5.0))


@pytest.fixture
def app(service: Service) -> FastAPI:
    return application(service, limits_of(BODY))


@pytest.fixture
def ask(app: FastAPI) -> Callable[..., httpx.Response]:
    """A function that sends one request to the application."""

    def send(method: str, path: str, **arguments: Any) -> httpx.Response:
        async def one() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(one())

    return send


@pytest.fixture(scope="session")
def demo() -> Answerer:
    return open_answerer(ServeConfig(ModelConfig("demo"), device="cpu"))


# ---- with Ray


@pytest.fixture(scope="session")
def shared_service() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    shared.end()


@pytest.fixture
def live(shared_service: Shared) -> Any:
    """The running service."""
    return shared_service.service()
