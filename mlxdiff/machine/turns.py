"""Turns: one thread of the process computes at a time.

NumPy's and MLX's threads already use every core, and MLX's graphs must not be evaluated by two
threads at once. So a thread takes a turn for each piece of work: a step, an encoding, a decoding.
Nothing holds a turn while it waits for its caller, so a suspended run never blocks another one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.RLock()


def turn() -> AbstractContextManager[bool]:
    """Return the lock of the process, for ``with turn():``. A thread may take it again inside."""
    return _lock


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function so that each call takes a turn."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock:
            return function(*args, **kwargs)

    return call


def each_in_turn(items: Iterator[T]) -> Iterator[T]:
    """Take a turn to compute each item; give it back before the item is yielded."""
    while True:
        with _lock:
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _renew() -> None:
    """Make a new lock: after a fork, nobody would release the old one."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
