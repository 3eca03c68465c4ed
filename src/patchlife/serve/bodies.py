"""Limits on requests before anything else reads them: an ASGI middleware for the process that listens on the port."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .errors import RETRY_AFTER

__all__ = ["MIDDLEWARES", "Limited", "Limits", "limits_in_environment", "limits_of", "middlewares"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LONGEST_QUERY = 2048
_BODY_SECONDS = 30.0  # in which a body must arrive
_DISCARD = 5.0  # seconds in which the rest of a refused body is read and dropped, so that the client reads the answer
_RAYS_BUSY = (408, 429)  # no replica within its own deadline, its queue is full
_RAYS_OWN = (b"x-request-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
"""Headers by which a client would change how Ray Serve treats its request."""


@dataclass(frozen=True)
class Limits:
    """Limits on bodies.

    Attributes:
        body: of one request, in bytes.
        all_bodies: of all requests that are in work, in bytes.
        seconds: in which a body must arrive.
    """

    body: int
    all_bodies: int
    seconds: float = _BODY_SECONDS


MIDDLEWARES = "patchlife.serve.bodies:middlewares"
"""For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, by which Ray Serve adds middlewares to the processes that listen."""

_MAX_BODY = "PATCHLIFE_SERVE_MAX_BODY"
_ALL_BODIES = 16  # as many largest bodies are held at a time


def limits_of(body: int) -> Limits:
    """The limits for bodies of at most so many bytes."""
    return Limits(body, _ALL_BODIES * body)


def limits_in_environment(body: int) -> dict[str, str]:
    """Environment variables that hold these limits, for `middlewares`."""
    return {_MAX_BODY: str(body)}


def middlewares() -> list[Any]:
    """The middlewares of the processes that listen; the limit is in the environment variable."""
    from starlette.middleware import Middleware

    return [Middleware(Limited, limits=limits_of(int(os.environ.get(_MAX_BODY, 16 * 2**20))))]


class Limited:
    """Reads the body of each request up to a limit before the application is called.

    At most ``limits.all_bodies`` bytes are held at a time. A body over a limit gets an answer and is not held. Errors
    that Ray Serve answers itself, in plain text, become JSON without its details.
    """

    def __init__(self, app: App, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if len(scope.get("query_string", b"")) > _LONGEST_QUERY:
            await _refuse(receive, send, 414, f"the query must have at most {_LONGEST_QUERY} bytes")
            return
        held = _Body(self)
        try:
            error = await held.read(scope, receive)
            if error is None:
                await self.app(_without_rays(scope), held.receiver(receive), _json_errors(send))
            elif error[0]:
                held.release()
                await _refuse(receive, send, *error, ended=held.ended)
        finally:
            held.release()


class _Body:
    """The body of one request while it is in work."""

    def __init__(self, of: Limited) -> None:
        self.of, self.size, self.ended = of, 0, False
        self.parts: list[bytes] = []

    async def read(self, scope: Scope, receive: Receive) -> tuple[int, str] | None:
        """Read it; (status, message) if it breaks a limit, (0, "") if the client left, else None."""
        limits = self.of.limits
        too_large = (413, f"the body must have at most {limits.body:,} bytes; send a smaller photo")
        if _stated(scope) > limits.body:
            return too_large
        try:
            async with asyncio.timeout(limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return 0, ""
                    part, self.ended = message.get("body", b""), not message.get("more_body", False)
                    if self.size + len(part) > limits.body:
                        return too_large
                    if self.of._held + len(part) > limits.all_bodies:
                        return 503, f"too many photos are being sent; try again in {RETRY_AFTER} s"
                    self.parts.append(part)
                    self.size += len(part)
                    self.of._held += len(part)
                    if self.ended:
                        return None
        except TimeoutError:
            return 408, f"the body must arrive within {limits.seconds:g} s"

    def receiver(self, receive: Receive) -> Receive:
        """A ``receive`` that gives the body as one message, then what comes from the client."""
        given = False

        async def body_first() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            parts, self.parts = self.parts, []
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}

        return body_first

    def release(self) -> None:
        """The request has been answered."""
        self.parts = []
        self.of._held -= self.size
        self.size = 0


def _stated(scope: Scope) -> int:
    """The length that the client states; 0 if it states none. More than one header was refused by the HTTP parser."""
    stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(stated) if stated.isdigit() else 0


def _without_rays(scope: Scope) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name not in _RAYS_OWN]
    return {**scope, "headers": [header for header in headers if not header[0].startswith(b"serve")]}


async def _refuse(receive: Receive, send: Send, status: int, message: str, ended: bool = False) -> None:
    """Answer, after the client has sent its body or five seconds have passed; then the connection is closed.

    ``ended``: the whole body has come already.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD):
            while not ended:
                part = await receive()
                ended = part["type"] == "http.disconnect" or not part.get("more_body", False)
    await _send_json(send, status, message, [(b"connection", b"close")])


async def _send_json(send: Send, status: int, message: str, headers: list[tuple[bytes, bytes]]) -> None:
    content = json.dumps({"error": message}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        *headers,
    ]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _json_errors(send: Send) -> Send:
    """A ``send`` that replaces errors in plain text, which are Ray's own, by JSON."""
    replaced = False

    async def checked(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start" and message["status"] >= 400:
            types = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            if not any(value.startswith(b"application/json") for value in types):
                replaced = True
                if message["status"] in _RAYS_BUSY or message["status"] >= 500:
                    text = f"the service cannot answer now; try again in {RETRY_AFTER} s"
                    await _send_json(send, 503, text, [])
                else:
                    await _send_json(send, message["status"], "there is nothing here; GET /docs tells what is", [])
                return
        if not replaced:
            await send(message)

    return checked
