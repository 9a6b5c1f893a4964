"""Shared parts of the HTTP interfaces: reading requests, waiting for jobs, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mlxdiff.errors import Cancelled, MlxdiffError, UsageError
from mlxdiff.serve.engine import Engine, Job, QueueFull
from mlxdiff.serve.request import Limits, order_of
from mlxdiff.serve.shelf import Shelf, UnknownName

LOOK_SECONDS = 0.2
"""How often a waiting request looks whether its client is still there."""


@dataclass(frozen=True)
class Desk:
    """Takes requests for pictures to the engine.

    Attributes:
        engine, shelf, limits: of the server.
    """

    engine: Engine
    shelf: Shelf
    limits: Limits = field(default_factory=Limits)

    async def submit(self, given: Mapping[str, Any]) -> Job:
        """Queue a request of our own form. Raises: UsageError, UnknownName, QueueFull."""
        order = await asyncio.to_thread(order_of, given, self.shelf, self.limits)
        return self.engine.submit(order)

    async def draw(self, given: Mapping[str, Any], request: Request) -> Job:
        """Queue a request, and wait for its pictures. A client that leaves cancels it.

        Raises: UsageError and other MlxdiffErrors, of the request or of the job.
        """
        job = await self.submit(given)
        try:
            async for _ in changes(job, LOOK_SECONDS):
                if await request.is_disconnected():
                    break
        finally:
            if not job.has_ended:
                self.engine.cancel(job)
        if job.error is not None:
            raise job.error
        return job


async def changes(job: Job, seconds: float) -> AsyncIterator[None]:
    """Yield after each change of a job, or after some seconds without one, until it has ended."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def call() -> None:  # in the engine's thread
        with suppress(RuntimeError):  # the server is closing
            loop.call_soon_threadsafe(changed.set)

    stop = job.watch(call)
    try:
        while not job.has_ended:
            with suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(changed.wait(), seconds)
            changed.clear()
            yield
    finally:
        stop()


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; {} where it has no body. Raises: UsageError."""
    data = await request.body()
    try:
        found = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UsageError("the request is not a JSON object")
    return found


def status_of(error: Exception) -> int:
    """HTTP status of an error that mlxdiff raises on purpose."""
    if isinstance(error, QueueFull):
        return 429
    if isinstance(error, UnknownName):
        return 404
    if isinstance(error, Cancelled):
        return 409
    return 422 if isinstance(error, MlxdiffError) else 500


def headers_of(error: Exception) -> dict[str, str]:
    """Headers of an answer that says an error."""
    return {"Retry-After": str(error.seconds)} if isinstance(error, QueueFull) else {}


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """An entry of an interface; routes and the OpenAPI document follow from it.

    Attributes:
        method, path: of the request.
        handler: answers it.
        summary: one sentence.
        body: JSON schema of its body; None: it has none.
        answer: JSON schema of the answer.
        kind: media type of the answer.
        status: of a success.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: Mapping[str, Any] | None = None
    answer: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    kind: str = "application/json"
    status: int = 200
