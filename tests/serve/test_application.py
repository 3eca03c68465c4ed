"""The HTTP application without Ray: parameters, errors, load, state, documents."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from patchlife.serve.application import application
from patchlife.serve.bodies import limits_of
from patchlife.serve.errors import RequestError, busy
from patchlife.serve.questions import Ask, Description

PREDICT = "/v1/predict"


def test_a_raw_body_and_a_multipart_body_are_the_same_photo(ask, backend):
    first = ask("POST", PREDICT, content=b"photo")
    second = ask("POST", PREDICT, files={"photo": ("a.jpg", b"photo", "image/jpeg")})
    assert (first.status_code, second.status_code) == (200, 200)
    assert backend.photos == [b"photo", b"photo"]
    assert first.headers["X-PatchLife-Budget"] == "1"


def test_parameters_reach_the_backend(ask, backend):
    assert ask("POST", f"{PREDICT}?budget=0.45&top=3&lives=true", content=b"x").headers["X-PatchLife-Budget"] == "0.45"
    assert ask("POST", "/v1/embed?budget=0.5", content=b"x").status_code == 200
    assert backend.asks == [Ask("predict", 0.45, 3, True), Ask("embed", 0.5)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("budget=0", "budget must be in (0, 1], got 0"),
        ("budget=60", "budget must be in (0, 1], got 60; did you mean 0.6?"),
        ("budget=-1", "budget must be in (0, 1], got -1"),
        ("budget=nan", "budget must be a number in (0, 1], got 'nan'"),
        ("budget=inf", "budget must be a number in (0, 1], got 'inf'"),
        ("budget=1e999", "budget must be a number in (0, 1], got '1e999'"),
        ("budget=0.123", "budget must have at most two digits after the point, got '0.123'"),
        ("budget=", "budget must be a number in (0, 1], got ''"),
        ("budget=" + "9" * 100, "budget must be a number in (0, 1], got '99999999999999999999999999999999...'"),
        ("budget=%0d%0aSet-Cookie:%20a=b", r"budget must be a number in (0, 1], got '\r\nSet-Cookie: a=b'"),
        ("budget=%E0%A5%A7", "budget must be a number in (0, 1], got '\\u0967'"),  # a digit of another script
        ("budget=0.5&budget=0.6", "each parameter may be given once, got one twice"),
        ("top=0", "top must be a whole number from 1 to 1000, got '0'"),
        ("top=99999999999999", "top must be a whole number from 1 to 1000, got '99999999999999'"),
        ("top=-1", "top must be a whole number from 1 to 1000, got '-1'"),
        ("top=1.5", "top must be a whole number from 1 to 1000, got '1.5'"),
        ("lives=maybe", "lives must be true or false, got 'maybe'"),
        ("path=../../etc/passwd", "expected the parameters budget, lives, top, got 'path'"),
    ],
)
def test_invalid_parameters_are_named(ask, backend, query, message):
    answer = ask("POST", f"{PREDICT}?{query}", content=b"x")
    assert (answer.status_code, answer.json()) == (422, {"error": message})
    assert backend.asks == []
    assert not any("set-cookie" in name.lower() for name in answer.headers)


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/v1/..%2f..%2fetc/passwd", "/v1/predict/x", "/static/x", "//"])
def test_other_paths_are_404_in_json(ask, path):
    answer = ask("GET", path)
    assert (answer.status_code, answer.json()) == (404, {"error": "there is nothing here; GET /docs tells what is"})


def test_another_method_is_405(ask):
    answer = ask("GET", PREDICT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_a_budget_of_an_exported_file_must_be_in_it(service, backend):
    service.description = Description("bundle", ("predict",), 10, 1.0, (1.0, 0.6), "fixed")

    async def statuses() -> list[httpx.Response]:
        transport = httpx.ASGITransport(application(service, limits_of(1000)))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return [
                await client.post(path, content=b"x")
                for path in (f"{PREDICT}?budget=0.6", f"{PREDICT}?budget=0.7", "/v1/embed")
            ]

    good, other, embedding = asyncio.run(statuses())
    assert good.status_code == 200
    assert other.json() == {"error": "budget must be one of 1, 0.6, got 0.7"}
    assert embedding.json() == {"error": "this model gives classes, not embeddings; use POST /v1/predict"}
    assert embedding.status_code == 422


def test_errors_of_the_backend(ask, backend):
    backend.error = RequestError(422, "photo: expected a JPEG, PNG or WEBP photo, found an empty file")
    assert ask("POST", PREDICT, content=b"").status_code == 422
    backend.error = busy("too many photos wait")
    answer = ask("POST", PREDICT, content=b"x")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json() == {"error": "too many photos wait; try again in 1 s"}
    assert 'refused_total{reason="queue_full"} 1.0' in ask("GET", "/metrics").text


def test_a_bug_tells_nothing_of_the_code(ask, backend):
    backend.error = RuntimeError("/home/me/secret.py")
    answer = ask("POST", PREDICT, content=b"x")
    assert answer.status_code == 500
    assert answer.json() == {"error": "an error inside the service; its log has the details"}


def test_a_body_over_the_limit_is_413(ask, backend):
    assert ask("POST", PREDICT, content=b"x" * 100_001).status_code == 413
    assert ask("POST", PREDICT, content=b"x" * 100_000).status_code == 200
    assert len(backend.photos) == 1


def test_after_the_deadline_a_photo_is_refused(ask, backend, service):
    backend.wait, service.pace.deadline = 10, 0.05
    answer = ask("POST", PREDICT, content=b"x")
    assert answer.status_code == 503
    assert answer.json() == {"error": "the photo was not answered within 0.05 s; try again in 1 s"}
    assert service.pending == 0


def test_load_lowers_the_budget_and_the_header_says_so(app, backend, service):
    async def together() -> list[httpx.Response]:
        backend.wait = 0.05
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            return await asyncio.gather(*(client.post(PREDICT, content=b"x") for _ in range(12)))

    budgets = [float(answer.headers["X-PatchLife-Budget"]) for answer in asyncio.run(together())]
    assert sorted(set(budgets), reverse=True) == [1.0, 0.8, 0.6]
    assert budgets == [ask.budget for ask in backend.asks]
    assert service.ladder.step(service.pending, service.pace.limit) == 0


def test_photos_that_would_wait_too_long_are_refused_at_once(app, backend, service):
    service.pace.answered(front=9, seconds=5.0)  # of a deadline of 5 s half may be waited: 5 photos
    backend.wait = 0.05

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            return await asyncio.gather(*(client.post(PREDICT, content=b"x") for _ in range(8)))

    answers = asyncio.run(together())
    assert [answer.status_code for answer in answers] == [200] * 5 + [503] * 3
    assert answers[-1].json() == {"error": "too many photos wait; try again in 1 s"}
    assert answers[-1].headers["retry-after"] == "1"
    assert len(backend.photos) == 5


def test_photos_after_their_deadline_shorten_the_queue(app, backend, service):
    backend.wait, service.pace.deadline = 10, 0.05

    async def together() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            await asyncio.gather(*(client.post(PREDICT, content=b"x") for _ in range(12)))

    assert service.pace.limit == 12
    asyncio.run(together())
    assert service.pace.limit == 2


def test_a_client_that_leaves_is_counted_and_forgotten(backend, service):
    async def leave() -> None:
        backend.wait = 10
        task = asyncio.create_task(service.answer(Ask("predict", 1.0), b"x"))
        await asyncio.sleep(0.01)
        assert service.pending == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert service.pending == 0
    assert b"patchlife_disconnected_total 1.0" in service.metrics.text()


def test_draining_answers_what_was_accepted_and_refuses_the_rest(app, backend, service):
    async def drain() -> tuple[httpx.Response, httpx.Response, httpx.Response, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            backend.wait = 0.1
            accepted = asyncio.create_task(client.post(PREDICT, content=b"x"))
            await asyncio.sleep(0.02)
            ending = asyncio.create_task(service.drain(5))
            await asyncio.sleep(0.02)
            new, ready = await client.post(PREDICT, content=b"x"), await client.get("/readyz")
            return await accepted, new, ready, await ending

    accepted, new, ready, left = asyncio.run(drain())
    assert (accepted.status_code, new.status_code, ready.status_code, left) == (200, 503, 503, 0)
    assert new.json() == {"error": "the service ends; try again in 1 s"}


def test_what_is_left_after_draining_is_refused(app, backend, service):
    async def drain() -> tuple[httpx.Response, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            backend.wait = 10
            accepted = asyncio.create_task(client.post(PREDICT, content=b"x"))
            await asyncio.sleep(0.02)
            left = await service.drain(0.05)
            return await accepted, left

    accepted, left = asyncio.run(drain())
    assert (accepted.status_code, left) == (503, 1)


def test_ready_says_what_the_model_is(ask, backend):
    assert ask("GET", "/healthz").json() == {"status": "ok"}
    assert ask("GET", "/readyz").json()["tasks"] == ["predict", "embed"]
    backend.runs = False
    assert ask("GET", "/readyz").status_code == 503
    assert ask("GET", "/healthz").status_code == 200


def test_a_replica_with_work_is_ready(backend, service):
    """It answers the question whether it is ready only after its batches, and these may take seconds."""
    backend.runs, service.pending, service._answered = False, 5, time.monotonic() - 4
    assert asyncio.run(service.ready())
    service.pending = 0
    assert not asyncio.run(service.ready())


def test_metrics_are_prometheus_text(ask):
    ask("POST", PREDICT, content=b"x")
    answer = ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'patchlife_requests_total{path="/v1/predict",status="200"} 1.0' in answer.text
    assert 'patchlife_answers_total{budget="1"} 1.0' in answer.text


def test_paths_of_clients_are_not_kept_as_metrics(ask):
    for number in range(5):
        ask("GET", f"/{number}")
    assert "/3" not in ask("GET", "/metrics").text


def test_the_page_loads_nothing_from_elsewhere(ask):
    page = ask("GET", "/docs")
    assert "<script" not in page.text
    assert "http" not in page.text.replace("http://service/v1/", "")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert all(
        path in page.text for path in ("/v1/predict", "/v1/embed", "/healthz", "/readyz", "/metrics", "?budget=")
    )


def test_the_document_is_openapi(ask):
    document = ask("GET", "/openapi.json").json()
    assert set(document["paths"]) == {"/v1/predict", "/v1/embed", "/healthz", "/readyz", "/metrics"}
    predict = document["paths"][PREDICT]["post"]
    assert {"image/jpeg", "multipart/form-data"} <= set(predict["requestBody"]["content"])
    assert {"200", "413", "422", "503"} <= set(predict["responses"])
    assert json.dumps(document)
