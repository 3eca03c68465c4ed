"""The HTTP application: paths, parameters, errors, OpenAPI. What answers is a `Backend`; Ray is not known here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from math import isfinite
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from ..config.checks import check_budget
from ..errors import ConfigError
from ..version import __version__
from .bodies import Limited, Limits
from .degrading import Ladder
from .documents import docs_page, embed_schema, predict_schema, schema_of
from .errors import RequestError, busy
from .metrics import CONTENT_TYPE_LATEST, Metrics
from .multipart import photo_in
from .pace import Pace
from .questions import Ask, Description, Task

__all__ = ["Backend", "Service", "application"]

_STEPS = 100  # budgets that can be asked for are multiples of 1 / so many


class Backend(Protocol):
    """Answers photos."""

    async def answer(self, ask: Ask, photo: bytes) -> dict[str, Any]:
        """The record of a photo. Raises RequestError."""

    async def ready(self) -> bool:
        """Whether it can answer now."""


class Service:
    """What all requests share: the limits, the load, and whether the service ends.

    Args:
        backend: answers photos.
        description: of the model.
        ladder: the budget by load.
        pace: how many photos are accepted, and the deadline of each.
    """

    def __init__(self, backend: Backend, description: Description, ladder: Ladder, pace: Pace) -> None:
        self.backend, self.description, self.ladder, self.pace = backend, description, ladder, pace
        self.metrics = Metrics()
        self.pending = 0
        self.draining = False
        self._answered = float("-inf")
        self._waiting: set[asyncio.Timeout] = set()

    async def answer(self, ask: Ask, photo: bytes) -> tuple[float, dict[str, Any]]:
        """(the budget that answered, the record). Raises RequestError."""
        started, front = time.monotonic(), self.pending
        async with self._counted():
            try:
                async with asyncio.timeout(self.pace.deadline) as limit:
                    self._waiting.add(limit)
                    try:
                        record = await self.backend.answer(ask, photo)
                    finally:
                        self._waiting.discard(limit)
            except TimeoutError:
                if self.draining:
                    raise busy("the service ends", "draining") from None
                self.pace.late(front)
                raise busy(f"the photo was not answered within {self.pace.deadline:g} s", "deadline") from None
        self._answered = time.monotonic()
        self.pace.answered(front, self._answered - started)
        self.metrics.seconds.observe(self._answered - started)
        self.metrics.answers.labels(f"{ask.budget:g}").inc()
        return ask.budget, record

    def budget(self, asked: float | None) -> float:
        """The budget that answers a photo which comes now. Raises RequestError if it cannot be accepted."""
        if self.draining:
            raise busy("the service ends", "draining")
        limit = self.pace.limit
        if self.pending >= limit:
            raise busy("too many photos wait")
        self.metrics.step.set(self.ladder.step(self.pending, limit))
        return self.ladder.budget(self.pending, limit, asked)

    async def ready(self) -> bool:
        """Whether photos are answered: one was not long ago, or the backend says so.

        A replica with work does not answer the question before it: while photos are in work, as long ago as the
        deadline of a photo is not long.
        """
        if self.draining:
            return False
        recent = max(2.0, self.pace.deadline) if self.pending else 2.0
        return time.monotonic() - self._answered < recent or await self.backend.ready()

    async def drain(self, seconds: float) -> int:
        """Refuse new photos, wait for the accepted ones, and refuse those left after ``seconds``; returns how many."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.pending and time.monotonic() < end:
            await asyncio.sleep(0.02)
        left = self.pending
        for limit in list(self._waiting):
            limit.reschedule(asyncio.get_running_loop().time())
        return left

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        self.pending += 1
        self.metrics.pending.set(self.pending)
        try:
            yield
        except asyncio.CancelledError:
            self.metrics.disconnected.inc()
            raise
        finally:
            self.pending -= 1
            self.metrics.pending.set(self.pending)


def application(service: Service, limits: Limits) -> FastAPI:
    """The application of a service."""
    app = FastAPI(title="PatchLife", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.add_middleware(Limited, limits=limits)
    _add_errors(app, service)
    _add_photos(app, service)
    _add_state(app, service)
    app.openapi = lambda: schema_of(app)  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(docs_page(app.openapi(), service.description, str(request.base_url)), headers=policy)

    return app


def _add_photos(app: FastAPI, service: Service) -> None:
    description = service.description

    @app.post("/v1/predict", openapi_extra=predict_schema(description, service.ladder.budgets))
    async def predict(request: Request) -> Response:
        """The most probable classes of one photo."""
        return await _answer(service, "predict", request, {"budget", "top", "lives"})

    @app.post("/v1/embed", openapi_extra=embed_schema(description, service.ladder.budgets))
    async def embed(request: Request) -> Response:
        """The embedding of one photo: the vector that the classifier reads."""
        return await _answer(service, "embed", request, {"budget"})


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", openapi_extra={"responses": {"200": {"description": "The process runs."}}})
    async def healthz() -> dict[str, str]:
        """Whether the process runs."""
        return {"status": "ok"}

    @app.get(
        "/readyz",
        openapi_extra={"responses": {"200": {"description": "Ready."}, "503": {"description": "Not ready."}}},
    )
    async def readyz() -> Response:
        """Whether photos are answered now."""
        if not await service.ready():
            error = busy("no replica is ready" if not service.draining else "the service ends", "not_ready")
            return _error(error)
        return JSONResponse({"status": "ready", **asdict(service.description), "degrade": service.ladder.budgets})

    @app.get("/metrics", openapi_extra={"responses": {"200": {"description": "Numbers for Prometheus."}}})
    async def metrics() -> Response:
        """Numbers in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        if error.status == 503:
            service.metrics.refused.labels(error.reason).inc()
        service.metrics.requests.labels(request.url.path, error.status).inc()
        return _error(error)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        texts = {404: "there is nothing here; GET /docs tells what is", 405: "this path has another method; GET /docs"}
        headers = dict(error.headers or {})
        return JSONResponse({"error": texts.get(error.status_code, "invalid request")}, error.status_code, headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        service.metrics.requests.labels("error", 500).inc()
        return JSONResponse({"error": "an error inside the service; its log has the details"}, 500)


def _error(error: RequestError) -> JSONResponse:
    return JSONResponse({"error": error.message}, error.status, error.headers)


async def _answer(service: Service, task: Task, request: Request, known: set[str]) -> Response:
    """Check a request, let it be answered, and say which budget did."""
    if task not in service.description.tasks:
        what = "has no classifier" if task == "predict" else "gives classes, not embeddings"
        other = "embed" if task == "predict" else "predict"
        raise RequestError(422, f"this model {what}; use POST /v1/{other}")
    query = _query(request, known)
    asked = _asked_budget(query, service.description)
    top, lives = _whole(query, "top", 5, 1, 1000), _switch(query, "lives")
    photo = await _photo(request)
    budget, record = await service.answer(Ask(task, service.budget(asked), top, lives), photo)
    service.metrics.requests.labels(request.url.path, 200).inc()
    return JSONResponse(record, headers={"X-PatchLife-Budget": f"{budget:g}"})


async def _photo(request: Request) -> bytes:
    body, content_type = await request.body(), request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/"):
        return photo_in(content_type, body)
    return body


# ---- parameters of the query


def _query(request: Request, known: set[str]) -> dict[str, str]:
    """The parameters. Raises RequestError for unknown ones, and for one that is given twice."""
    pairs = request.query_params.multi_items()
    if other := sorted({name for name, _ in pairs} - known):
        raise RequestError(422, f"expected the parameters {', '.join(sorted(known))}, got {_shown(other[0])}")
    if len(pairs) != len(dict(pairs)):
        raise RequestError(422, "each parameter may be given once, got one twice")
    return dict(pairs)


def _asked_budget(query: dict[str, str], description: Description) -> float | None:
    text = query.get("budget")
    if text is None:
        return None
    try:
        budget = check_budget(_number(text))
    except ConfigError as error:
        raise RequestError(422, str(error)) from None
    if description.budgets is not None:
        found = next((b for b in description.budgets if abs(b - budget) < 1e-9), None)
        if found is None:
            there = ", ".join(f"{b:g}" for b in description.budgets)
            raise RequestError(422, f"budget must be one of {there}, got {budget:g}")
        return found
    if abs(budget * _STEPS - round(budget * _STEPS)) > 1e-6:
        raise RequestError(422, f"budget must have at most two digits after the point, got {_shown(text)}")
    return round(budget * _STEPS) / _STEPS


def _number(text: str) -> float:
    try:
        number = float(text) if len(text) <= 32 and text.isascii() else float("nan")
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise RequestError(422, f"budget must be a number in (0, 1], got {_shown(text)}")
    return number


def _whole(query: dict[str, str], name: str, default: int, lowest: int, highest: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and lowest <= int(text) <= highest):
        raise RequestError(422, f"{name} must be a whole number from {lowest} to {highest}, got {_shown(text)}")
    return int(text)


def _switch(query: dict[str, str], name: str) -> bool:
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise RequestError(422, f"{name} must be true or false, got {_shown(text)}")
    return text == "true"


def _shown(text: str) -> str:
    """A value of the client in a message: short and printable."""
    return ascii(text if len(text) <= 32 else f"{text[:32]}...")
