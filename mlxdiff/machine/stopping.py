"""Signals that stop a command: SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal).

The first signal raises ``Stopped``, so that ``finally`` blocks clean up. Further signals are
ignored for some seconds, because they would interrupt the cleaning. Later ones raise again, for
people whose command does not end. A process that is the command (``own_process``) ends at once and
in silence while it only starts. This module imports little: it must be there before all that is
slow.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

PATIENCE = 5.0
"""Seconds that cleaning up may take before another signal interrupts it."""

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """A signal asks the command to end.

    Attributes:
        code: exit code of the process, 128 and the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.code = 128 + number


class _State:
    own_process = False  # the process is a command, and ends with it
    working = False  # the command has begun; before that it only starts
    stopped_at: float | None = None  # time of the signal that was raised
    held: int = 0  # blocks that must not be interrupted
    waiting: int | None = None  # signal that arrived in such a block


_state = _State()


def own_process() -> None:
    """Say that this process is a command. Handle its signals from now on."""
    _state.own_process = True
    _install()


def begin_work() -> None:
    """Say that the start is over: from now on a signal is reported, and cleans up."""
    _state.working = True


@contextmanager
def handled() -> Iterator[None]:
    """Handle the signals while a command runs. Only the main thread can; others change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {} if _state.own_process else _install()
    _state.working, _state.stopped_at, _state.waiting = False, None, None
    try:
        yield
    finally:
        if _state.own_process:  # nothing is left to interrupt
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Run a short block to its end, such as the writing of a file. A signal is raised after it."""
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
    if _state.held == 0 and _state.waiting is not None:
        number, _state.waiting = _state.waiting, None
        _stop(number)


def _install() -> dict[int, Any]:
    """Handle the signals that are not ignored (nohup, jobs in the background)."""
    before: dict[int, Any] = {}
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):
            before[number] = handler
            signal.signal(number, _handle)
    return before


def _handle(number: int, frame: Any) -> None:
    if _state.held:
        _state.waiting = number
    else:
        _stop(number)


def _stop(number: int) -> None:
    if not _state.working and _state.own_process:
        if number != signal.SIGINT:  # the log of another program; a person knows
            with suppress(OSError):
                os.write(2, b"Interrupted; no partial files remain.\n")
        os._exit(128 + number)
    now = time.monotonic()
    if _state.stopped_at is not None and now - _state.stopped_at < PATIENCE:
        return
    _state.stopped_at = now
    raise Stopped(number)
