"""Decide who may talk to the server, and how much they may send.

A server on 127.0.0.1 is open to every web page that its user visits: a page can send requests to
it, and can give its own name the address 127.0.0.1 (DNS rebinding). So Host must be a name of this
server, and a request that a browser marks as another site's is refused. A server that others can
reach needs a token.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException

from mlxdiff.errors import UsageError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COOKIE = "mlxdiff_token"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ALLOWED_HEADERS = "Authorization, Content-Type"
_ALLOWED_METHODS = "GET, POST, DELETE"
_SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


@dataclass(frozen=True)
class Policy:
    """The rules of access.

    Attributes:
        host: the address that the server listens at.
        names: other names of the server that a Host header may have.
        origins: web origins, such as https://example.org, whose pages may use the server.
        token: what clients must show; None: nothing.
        upload_bytes: of a request.
        head_seconds: for the head of a request to arrive.
        upload_seconds: for a request to arrive.
        pause_seconds: from one piece of a request to the next.
    Raises: UsageError for an address that others can reach, without a token.
    """

    host: str = "127.0.0.1"
    names: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    token: str | None = None
    upload_bytes: int = 64_000_000
    head_seconds: float = 20.0
    upload_seconds: float = 120.0
    pause_seconds: float = 20.0

    def __post_init__(self) -> None:
        if self.token is None and not self.is_local:
            raise UsageError(
                f"--host {self.host}: others can reach this address; give a --token that clients "
                "must show, or listen at 127.0.0.1"
            )
        if self.token is not None and len(self.token) < 8:
            raise UsageError("--token: give at least 8 characters")
        for origin in self.origins:
            scheme, _, rest = origin.partition("://")
            if scheme not in ("http", "https") or not rest or "/" in rest or "*" in rest:
                raise UsageError(
                    f"--allow-origin {origin!r}: expected an origin such as https://example.org"
                )

    @property
    def is_local(self) -> bool:
        """Return True if only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def knows(self, host: str) -> bool:
        """Return True if a Host header names this server."""
        name = _without_port(host)
        if name in LOOPBACK_NAMES or name == self.host or name in self.names:
            return True
        try:  # an address in digits cannot be rebound
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return not self.is_local

    def accepts(self, token: str) -> bool:
        """Return True if this is the token, compared in constant time."""
        return self.token is None or hmac.compare_digest(token.encode(), self.token.encode())


_CLOSE = {"Connection": "close"}
"""What comes after such an answer is not read."""


class Guard:
    """Checks each request before the application sees it.

    Args:
        app: the ASGI application.
        policy: what is allowed.
    """

    def __init__(self, app: Any, policy: Policy) -> None:
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        origin = headers.get("origin")
        cors = self._cors(origin)
        extra = _SAFE + cors

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        if (refusal := self._refusal(scope, headers)) is not None:
            await _answer(send_safely, *refusal)
            return
        if scope["method"] == "OPTIONS" and origin is not None:
            extra += [
                (b"access-control-allow-methods", _ALLOWED_METHODS.encode()),
                (b"access-control-allow-headers", _ALLOWED_HEADERS.encode()),
            ]
            await _answer(send_safely, 204, None)
            return
        if (cookie := self._login(scope)) is not None:
            await _answer(send_safely, 303, None, [(b"location", b"/"), (b"set-cookie", cookie)])
            return
        if not self._is_known(headers):
            challenge = [(b"www-authenticate", b'Bearer realm="mlxdiff"')]
            await _answer(
                send_safely,
                401,
                "the token is missing or wrong; send it as Authorization: Bearer TOKEN, or open "
                "/?token=TOKEN in a browser",
                challenge,
            )
            return
        await self.app(scope, self._counted(receive), send_safely)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self.policy.knows(host):
            return 421, (
                f"Host {host[:100]!r} is no name of this server; start it with --allow-host NAME"
            )
        origin = headers.get("origin")
        own = f"{scope.get('scheme', 'http')}://{host}"
        if origin is not None and origin != own and origin not in self.policy.origins:
            return 403, (
                f"pages of {origin[:100]!r} may not use this server; start it with "
                "--allow-origin ORIGIN"
            )
        site = headers.get("sec-fetch-site", "none")
        opens_page = headers.get("sec-fetch-mode") == "navigate" and scope["path"] == "/"
        if site in ("cross-site", "same-site") and origin is None and not opens_page:
            return 403, "pages of other sites may not use this server"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.policy.upload_bytes:
            return 413, f"the request is too large; at most {self.policy.upload_bytes} bytes"
        return None

    def _cors(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        if origin is None or origin not in self.policy.origins:
            return [(b"cross-origin-resource-policy", b"same-origin")]
        return [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]

    def _login(self, scope: Scope) -> bytes | None:
        """A cookie for a page that is opened with the token in its address."""
        if self.policy.token is None or scope["path"] != "/" or scope["method"] != "GET":
            return None
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        if not given or not self.policy.accepts(given[0]):
            return None
        value = base64.urlsafe_b64encode(given[0].encode()).decode().rstrip("=")
        return f"{COOKIE}={value}; HttpOnly; SameSite=Strict; Path=/".encode()

    def _is_known(self, headers: dict[str, str]) -> bool:
        if self.policy.token is None:
            return True
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.policy.accepts(value.strip()):
            return True
        if kind.lower() == "basic" and self.policy.accepts(_decoded(value).partition(":")[2]):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and self.policy.accepts(_decoded(cookie.value))

    def _counted(self, receive: Receive) -> Receive:
        """Receive the body within the limits of size and time. Raises: HTTPException."""
        policy = self.policy
        end = time.monotonic() + policy.upload_seconds
        received, more = 0, True

        async def counted() -> Message:
            nonlocal received, more
            if not more:  # the body is complete: what comes next is that the client leaves
                return await receive()
            left = min(policy.pause_seconds, end - time.monotonic())
            try:
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except (asyncio.TimeoutError, TimeoutError):
                raise HTTPException(408, "the request arrives too slowly", _CLOSE) from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                more = message.get("more_body", False)
                if received > policy.upload_bytes:
                    raise HTTPException(
                        413,
                        f"the request is too large; at most {policy.upload_bytes} bytes",
                        _CLOSE,
                    )
            return message

        return counted


def _without_port(host: str) -> str:
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _decoded(value: str) -> str:
    try:
        data = base64.urlsafe_b64decode(value.strip() + "=" * (-len(value.strip()) % 4))
        return data.decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return ""


async def _answer(
    send: Send, status: int, error: str | None, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = b"" if error is None else json.dumps({"error": {"message": error}}).encode()
    kind = [] if error is None else [(b"content-type", b"application/json")]
    length = [(b"content-length", str(len(body)).encode())]
    if status >= 400:  # a body that is still to come is not read
        length.append((b"connection", b"close"))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*kind, *length, *(headers or [])],
        }
    )
    await send({"type": "http.response.body", "body": body})
