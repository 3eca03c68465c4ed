"""Limits on bodies: what is read, what is held, and what the client gets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from patchlife.serve import bodies
from patchlife.serve.bodies import Limited, Limits

LIMITS = Limits(body=1000, all_bodies=2500, seconds=0.3)


class Client:
    """Sends parts, and keeps the answer."""

    def __init__(
        self, parts: list[bytes] | None = None, headers: dict[str, str] | None = None, query: str = ""
    ) -> None:
        self.parts, self.sent, self.answers = parts or [], 0, list[dict[str, Any]]()
        named = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.scope = {"type": "http", "path": "/", "headers": named, "query_string": query.encode()}
        self.endless = self.stalls = self.leaves = False

    async def receive(self) -> dict[str, Any]:
        self.sent += 1
        if self.endless:
            return {"type": "http.request", "body": b"x" * 100, "more_body": True}
        if self.sent <= len(self.parts):
            last = self.sent == len(self.parts) and not (self.stalls or self.leaves)
            return {"type": "http.request", "body": self.parts[self.sent - 1], "more_body": not last}
        if not self.leaves:  # as uvicorn: after the body, or a stalled one, nothing comes until the client leaves
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.answers.append(dict(message))

    @property
    def status(self) -> int:
        return self.answers[0]["status"]

    @property
    def error(self) -> str:
        return json.loads(self.answers[1]["body"])["error"]

    def header(self, name: bytes) -> bytes | None:
        return dict(self.answers[0]["headers"]).get(name)


class Application:
    """Reads the body and answers; notes what it saw."""

    def __init__(self, status: int = 200, kind: bytes = b"application/json") -> None:
        self.bodies, self.scopes, self.status, self.kind = list[bytes](), list[Any](), status, kind

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", self.kind)]})
        await send({"type": "http.response.body", "body": b'"traceback: /home/me/secret.py"'})


def run(limited: Limited, client: Client) -> Client:
    asyncio.run(limited(client.scope, client.receive, client.send))
    return client


def test_a_body_in_parts_arrives_whole():
    application = Application()
    limited = Limited(application, LIMITS)
    assert run(limited, Client([b"a" * 400, b"b" * 600])).status == 200
    assert application.bodies == [b"a" * 400 + b"b" * 600]
    assert limited._held == 0


def test_a_stated_length_over_the_limit_is_refused_before_anything_is_held():
    application = Application()
    client = run(Limited(application, LIMITS), Client([b"x" * 1001], {"content-length": "1001"}))
    assert (client.status, application.bodies) == (413, [])
    assert client.error == "the body must have at most 1,000 bytes; send a smaller photo"
    assert client.header(b"connection") == b"close"


def test_an_endless_chunked_body_is_refused_and_not_held(monkeypatch):
    monkeypatch.setattr(bodies, "_DISCARD", 0.05)
    client = Client()
    client.endless = True
    limited = Limited(Application(), LIMITS)
    most = []

    async def receive() -> Any:
        most.append(limited._held)
        if len(most) % 50 == 0:
            await asyncio.sleep(0.01)
        return await client.receive()

    asyncio.run(limited(client.scope, receive, client.send))
    assert client.status == 413
    assert max(most) <= LIMITS.body
    assert most[-1] == 0  # it is released before the rest is read and dropped


def test_all_bodies_together_are_limited():
    async def three() -> list[Client]:
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def application(scope: Any, receive: Any, send: Any) -> None:
            inside.set()
            await go_on.wait()
            await Application()(scope, receive, send)

        limited = Limited(application, LIMITS)
        clients = [Client([b"x" * 1000]) for _ in range(3)]
        tasks = [asyncio.create_task(limited(c.scope, c.receive, c.send)) for c in clients]
        await inside.wait()
        await tasks[2]
        go_on.set()
        await asyncio.gather(*tasks)
        assert limited._held == 0
        return clients

    clients = asyncio.run(three())
    assert [client.status for client in clients] == [200, 200, 503]
    assert clients[2].header(b"retry-after") == b"1"


def test_a_body_that_stalls_is_refused(monkeypatch):
    monkeypatch.setattr(bodies, "_DISCARD", 0.01)
    client = Client([b"x"])
    client.stalls = True
    limited = Limited(Application(), LIMITS)
    assert run(limited, client).status == 408
    assert limited._held == 0


def test_a_client_that_leaves_gets_nothing():
    client, application = Client([b"x"]), Application()
    client.leaves = True
    assert run(Limited(application, LIMITS), client).answers == []
    assert application.bodies == []


def test_a_long_query_is_refused():
    client = run(Limited(Application(), LIMITS), Client([b""], query="budget=" + "9" * 5000))
    assert client.status == 414


@pytest.mark.parametrize(("status", "told"), [(500, 503), (503, 503), (408, 503), (404, 404)])
def test_errors_in_plain_text_tell_nothing(status, told):
    client = run(Limited(Application(status, b"text/plain"), LIMITS), Client([b"x"]))
    assert client.status == told
    assert "traceback" not in client.error
    assert len(client.answers) == 2
    assert (client.header(b"retry-after") == b"1") == (told == 503)


def test_errors_in_json_are_the_applications_own():
    assert run(Limited(Application(422), LIMITS), Client([b"x"])).status == 422


def test_headers_that_change_ray_are_removed():
    application = Application()
    headers = {"x-request-id": "1", "x-request-timeout-seconds": "0", "serve_multiplexed_model_id": "2", "accept": "a"}
    run(Limited(application, LIMITS), Client([b"x"], headers))
    assert application.scopes[0]["headers"] == [(b"accept", b"a")]


def test_the_process_that_listens_gets_its_limit_from_the_environment(monkeypatch):
    for name, value in bodies.limits_in_environment(12345).items():
        monkeypatch.setenv(name, value)
    (middleware,) = bodies.middlewares()
    assert middleware.kwargs["limits"] == bodies.limits_of(12345)
    module, _, function = bodies.MIDDLEWARES.partition(":")
    assert (module, function) == (bodies.__name__, "middlewares")
