"""Our own interface, ``/api``: jobs, pictures, what there is, and its OpenAPI document."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mlxdiff._version import __version__
from mlxdiff.errors import UsageError
from mlxdiff.pictures import metadata
from mlxdiff.serve.desk import Desk, Endpoint, changes, json_body
from mlxdiff.serve.engine import Job
from mlxdiff.serve.request import picture_of
from mlxdiff.serve.schema import capabilities, local_place, request_schema
from mlxdiff.serve.shelf import KINDS

ALIVE_SECONDS = 10.0
"""A stream of events says at least this often that it is alive."""
_PICTURE_BODY = {
    "type": "object",
    "properties": {"image": {"type": "string", "contentEncoding": "base64"}},
    "required": ["image"],
}


class OwnAPI:
    """Handlers of ``/api``.

    Args:
        desk: of the server.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk, self.engine, self.shelf = desk, desk.engine, desk.shelf
        self._capabilities: dict[str, dict[str, Any]] = {}

    def endpoints(self) -> list[Endpoint]:
        """All entries of the interface."""
        job = {"type": "object", "description": "a job: state, stage, step, seconds_left, drawn"}
        jobs = {"type": "array", "items": job}
        return [
            Endpoint("POST", "/api/jobs", self.submit, "Queue a request for pictures.",
                     request_schema(), job, status=202),
            Endpoint("GET", "/api/jobs", self.jobs, "List jobs, the newest first.", None, jobs),
            Endpoint("GET", "/api/jobs/{job}", self.job, "Describe a job.", None, job),
            Endpoint("DELETE", "/api/jobs/{job}", self.cancel, "Cancel a job.", None, job),
            Endpoint("POST", "/api/jobs/{job}/skip", self.skip,
                     "End the picture that is being drawn, and go on with the next.", None, job),
            Endpoint("GET", "/api/jobs/{job}/events", self.events,
                     "Follow a job: events `job` (JSON) and `preview` (PNG in base64).",
                     None, {"type": "string"}, "text/event-stream"),
            Endpoint("GET", "/api/models", self.models, "List what a request may name."),
            Endpoint("GET", "/api/capabilities", self.capabilities,
                     "List all options; with ?model=NAME, say which of them it honours."),
            Endpoint("GET", "/api/schema", self.schema, "JSON schema of a request."),
            Endpoint("GET", "/api/pictures", self.pictures,
                     "List kept pictures, the newest first; ?before=ID&count=N."),
            Endpoint("GET", "/api/pictures/{picture}.png", self.picture, "A picture.",
                     None, {"type": "string", "format": "binary"}, "image/png"),
            Endpoint("GET", "/api/pictures/{picture}", self.described,
                     "How a picture was made."),
            Endpoint("DELETE", "/api/pictures/{picture}", self.delete, "Delete a picture."),
            Endpoint("POST", "/api/picture-info", self.info,
                     "Read how a picture that is sent was made.", _PICTURE_BODY),
        ]  # fmt: skip

    # Jobs

    async def submit(self, request: Request) -> Response:
        job = await self.desk.submit(await json_body(request))
        return JSONResponse(job.to_dict(), 202, {"Location": f"/api/jobs/{job.id}"})

    async def jobs(self, request: Request) -> Response:
        return JSONResponse([job.to_dict() for job in reversed(self.engine.jobs())])

    async def job(self, request: Request) -> Response:
        return JSONResponse(self._job(request).to_dict())

    async def cancel(self, request: Request) -> Response:
        job = self._job(request)
        self.engine.cancel(job)
        return JSONResponse(job.to_dict())

    async def skip(self, request: Request) -> Response:
        job = self._job(request)
        job.skip()
        return JSONResponse(job.to_dict())

    async def events(self, request: Request) -> Response:
        return StreamingResponse(
            _events(self._job(request)),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    def _job(self, request: Request) -> Job:
        job = self.engine.job(request.path_params["job"])
        if job is None:
            raise HTTPException(404, "there is no such job")
        return job

    # What there is

    async def models(self, request: Request) -> Response:
        names = await asyncio.to_thread(
            lambda: {kind: list(self.shelf.names(kind)) for kind in KINDS}
        )
        return JSONResponse(
            names
            | {
                "default": self.shelf.default,
                "loaded": self.engine.loaded,
                "warm": list(self.engine.models.names),
                "waiting": self.engine.waiting,
                "version": __version__,
            }
        )

    async def capabilities(self, request: Request) -> Response:
        name = request.query_params.get("model", "")
        if name not in self._capabilities:
            place = self.shelf.find("models", name) if name else None
            local = await asyncio.to_thread(local_place, place)
            self._capabilities[name] = await asyncio.to_thread(capabilities, local, name)
        return JSONResponse(self._capabilities[name])

    async def schema(self, request: Request) -> Response:
        return JSONResponse(request_schema())

    # Pictures

    async def pictures(self, request: Request) -> Response:
        query = request.query_params
        count = query.get("count", "50")
        if not count.isdecimal() or not 1 <= int(count) <= 500:
            raise UsageError(f"count is {count!r}; expected a whole number, 1 to 500")
        return JSONResponse(self.engine.gallery.names(query.get("before"), int(count)))

    async def picture(self, request: Request) -> Response:
        png = await asyncio.to_thread(self.engine.gallery.png, request.path_params["picture"])
        if png is None:
            raise HTTPException(404, "there is no such picture")
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(png, media_type="image/png", headers=headers)

    async def described(self, request: Request) -> Response:
        found = await asyncio.to_thread(
            self.engine.gallery.described, request.path_params["picture"]
        )
        if found is None:
            raise HTTPException(404, "there is no such picture")
        return JSONResponse(found)

    async def delete(self, request: Request) -> Response:
        if not self.engine.gallery.delete(request.path_params["picture"]):
            raise HTTPException(404, "there is no such picture")
        return JSONResponse({"deleted": request.path_params["picture"]})

    async def info(self, request: Request) -> Response:
        given = (await json_body(request)).get("image")
        picture = await asyncio.to_thread(picture_of, given, "image", self.desk.limits)
        found = metadata.of_picture(picture, "image")
        return JSONResponse(found.to_dict() | {"parameters": found.to_parameters()})


async def _events(job: Job) -> AsyncIterator[str]:
    shown: bytes | None = None
    job.wants_preview()
    yield _event("job", sent := json.dumps(job.to_dict()))
    async for _ in changes(job, ALIVE_SECONDS):
        job.wants_preview()
        yield _event("job", sent := json.dumps(job.to_dict()))
        preview = job.preview
        if preview is not None and preview is not shown:
            shown = preview
            yield _event("preview", base64.b64encode(preview).decode())
    # The job may have ended while the last event was written.
    if (last := json.dumps(job.to_dict())) != sent:
        yield _event("job", last)


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def openapi(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document of some entries."""
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        operation: dict[str, Any] = {
            "summary": one.summary,
            "responses": {
                str(one.status): {
                    "description": "success",
                    "content": {one.kind: {"schema": dict(one.answer)}},
                },
                "default": {"description": "an error, with a message"},
            },
        }
        names = [part[1:].partition("}")[0] for part in one.path.split("/") if part[:1] == "{"]
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in names
            ]
        if one.body is not None:
            body = {key: value for key, value in one.body.items() if key != "$schema"}
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": body}},
            }
        paths.setdefault(one.path, {})[one.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlxdiff", "version": __version__},
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
        "paths": paths,
    }
