"""The server: all interfaces behind the guard, and the page at ``/``."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
from functools import partial
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mlxdiff.errors import MlxdiffError, UsageError
from mlxdiff.serve import openai_api
from mlxdiff.serve.a1111_api import A1111API
from mlxdiff.serve.connections import Connection
from mlxdiff.serve.desk import Desk, Endpoint, headers_of, status_of
from mlxdiff.serve.guard import Guard, Policy
from mlxdiff.serve.openai_api import OpenAIAPI
from mlxdiff.serve.own_api import OwnAPI, openapi

CONNECTIONS = 256
"""Connections at a time; more are answered with 503."""


def application(desk: Desk, policy: Policy) -> Any:
    """The ASGI application.

    Args:
        desk: takes requests to the engine.
        policy: what is allowed.
    """
    endpoints = [
        *OwnAPI(desk).endpoints(),
        *OpenAIAPI(desk).endpoints(),
        *A1111API(desk).endpoints(),
    ]
    document = openapi(endpoints)

    async def described(request: Request) -> Response:
        return JSONResponse(document)

    app = Starlette(
        routes=[
            Route("/", _page(), methods=["GET"]),
            Route("/api/openapi.json", described, methods=["GET"]),
            *(_route(one) for one in endpoints),
        ],
        exception_handlers={
            HTTPException: _failed,
            MlxdiffError: _failed,
            Exception: _faulty,
        },
    )
    return Guard(app, policy)


def _route(one: Endpoint) -> Route:
    return Route(one.path, one.handler, methods=[one.method])


async def _failed(request: Request, cause: Exception) -> Response:
    """Say an error in the form of the interface."""
    if isinstance(cause, HTTPException):
        status, message, headers = cause.status_code, cause.detail, dict(cause.headers or {})
    else:
        status, message, headers = status_of(cause), " ".join(str(cause).split()), headers_of(cause)
    path = request.url.path
    if path.startswith(openai_api.PREFIX):
        status = 400 if status == 422 else status
        body = openai_api.error(message, status, cause)
    elif path.startswith("/sdapi/"):
        body = {"error": type(cause).__name__, "detail": message, "errors": message}
    else:
        body = {"error": {"message": message}}
    return JSONResponse(body, status, headers)


async def _faulty(request: Request, cause: Exception) -> Response:
    message = f"a fault of mlxdiff: {type(cause).__name__}; what it printed says more"
    return await _failed(request, HTTPException(500, message))


def _page() -> Any:
    """The page, with a policy that lets nothing but its own script run."""
    text = resources.files("mlxdiff.serve").joinpath("page.html").read_text("utf-8")
    hashes = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'"
            for one in re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )

    async def page(request: Request) -> Response:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    return page


def listen(host: str, port: int) -> socket.socket:
    """Bind an address; port 0 takes a free one. Raises: UsageError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UsageError(
            f"{host}:{port}: cannot be used ({error.strerror}); give another --port"
        ) from None
    return listener


def server(desk: Desk, policy: Policy) -> uvicorn.Server:
    """The server, ready to ``run(sockets=[...])``. It prints nothing of what is requested."""
    return uvicorn.Server(
        uvicorn.Config(
            application(desk, policy),
            http=partial(Connection, head_seconds=policy.head_seconds),  # type: ignore[arg-type]
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=3,
            lifespan="off",
            ws="none",
        )
    )
