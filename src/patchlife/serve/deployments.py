"""The two deployments of Ray Serve: replicas of the model, and the gate that speaks HTTP with clients."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ..config import ServeConfig
from .application import Service, application
from .bodies import limits_of
from .degrading import Ladder
from .errors import RequestError, busy
from .loopback import keep_to_loopback
from .pace import Pace
from .placement import Placement
from .questions import Ask, Description
from .replica import Model

__all__ = ["GATE", "NAME", "deployed"]

NAME, GATE, MODEL = "patchlife", "Gate", "Model"

_TRIES = 3  # a photo whose replica ends is given to another one; a photo that ends replicas must not end them all
_ONGOING = 2  # batches in a replica: one runs, the next one is read
_READY_SECONDS = 1.0
_UNBOUNDED = 100_000  # requests in the gate, whose own limits are lower
_GRACE = 3.0  # seconds that Ray Serve gives replicas to end


class _Replicas:
    """The backend of the application: the replicas of the model."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    async def answer(self, ask: Ask, photo: bytes) -> dict[str, Any]:
        """The record of a photo. Raises RequestError."""
        for _ in range(_TRIES):
            response = self._model.answer.remote(ask, photo)
            try:
                status, found = await response
            except BackPressureError:
                raise busy("too many photos wait") from None
            except (RayActorError, DeploymentUnavailableError):
                continue
            except asyncio.CancelledError:
                response.cancel()
                raise
            if status != 200:
                raise RequestError(status, found)
            return found
        raise busy("the replica of this photo ended", "replica_lost")

    async def ready(self) -> bool:
        """Whether a replica runs."""
        response = self._model.ready.remote()
        try:
            async with asyncio.timeout(_READY_SECONDS):
                return bool(await response)
        except BackPressureError:
            return True  # it is busy
        except (TimeoutError, RayActorError, DeploymentUnavailableError):
            response.cancel()
            return False


class Gate:
    """The ingress: checks requests, chooses the budget by load, and gives photos to the replicas."""

    def __init__(self, config: ServeConfig, description: Description, model: DeploymentHandle) -> None:
        keep_to_loopback(config)
        batches = config.max_batch * config.replicas
        ladder = Ladder(config.degrade or (description.budget,), batches)
        pace = Pace(_ONGOING * batches, config.max_queue, config.deadline, max(2, config.replicas))
        self._service = Service(_Replicas(model), description, ladder, pace)
        self._limits = limits_of(config.max_body * 2**20)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Ray Serve calls this when the replica starts."""
        return application(self._service, self._limits)

    async def drain(self, seconds: float) -> int:
        """Refuse new photos and wait for the accepted ones; returns how many were left and refused."""
        return await self._service.drain(seconds)


def deployed(config: ServeConfig, description: Description, placement: Placement) -> serve.Application:
    """The application for `serve.run`."""
    threads, own = placement.threads, config.address is None
    replicas = serve.deployment(
        name=MODEL,
        num_replicas=config.replicas,
        max_ongoing_requests=_ONGOING * config.max_batch,
        max_queued_requests=config.max_queue,
        ray_actor_options={"num_cpus": 0 if own else threads, "num_gpus": int(placement.on_gpu)},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=_GRACE,
        graceful_shutdown_wait_loop_s=0.1,
    )(Model)
    gate = serve.deployment(
        name=GATE,
        max_ongoing_requests=_UNBOUNDED,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=_GRACE,
        graceful_shutdown_wait_loop_s=0.1,
    )(serve.ingress()(Gate))
    return gate.bind(config, description, replicas.bind(config, threads))
