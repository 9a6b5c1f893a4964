"""A connection that ends where the head of a request does not arrive in time."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """One connection.

    Args:
        head_seconds: for the first line and all headers, from the moment that the connection is
            made or, on one that is kept alive, from their first byte.
    """

    def __init__(self, *args: Any, head_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_seconds = head_seconds
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def _lacks_head(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        if self._lacks_head and self._deadline is None:
            self._wait_for_head()
        super().data_received(data)
        if not self._lacks_head:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._deadline = self.loop.call_later(self._head_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self._lacks_head:
            self.transport.abort()
