"""One owner of the cores: the threads on which the NumPy path computes.

Work is divided here, also matrix products, and BLAS computes each part on the thread that calls it.
Two sets of threads would fight for the cores. BLAS's threads also spin while they wait, which costs
CPU time on a busy machine. The threads of this pool sleep.

Only OpenBLAS can be held to one thread at a time like this (NumPy's wheels for Linux, Windows and
macOS 13 use it). Any other BLAS keeps the matrix products for itself. Accelerate is one: the cores
of a cluster share a matrix unit, and it divides the work and sleeps on its own.
"""

from __future__ import annotations

import contextvars
import ctypes
import importlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from mlxdiff.machine.probe import THREAD_VARIABLES, usable_cores

Part = TypeVar("Part")
Result = TypeVar("Result")


@cache
def count() -> int:
    """Return the number of threads that may compute. Default: the usable cores of this process.

    The variables that limit BLAS's threads (probe.THREAD_VARIABLES) limit it too.
    """
    for variable in THREAD_VARIABLES:
        if re.fullmatch("[0-9]{1,4}", os.environ.get(variable, "")):
            return max(1, int(os.environ[variable]))
    return usable_cores()


def for_products() -> int:
    """Return the number of threads among which we may divide a matrix product.

    It is 1 if BLAS divides products itself.
    """
    return count() if one_blas_thread.possible else 1


@cache
def pool() -> ThreadPoolExecutor:
    """Return the thread pool. It starts on first use."""
    return ThreadPoolExecutor(count(), thread_name_prefix="mlxdiff")


_dividing: ContextVar[bool] = ContextVar("dividing", default=False)


def for_each(work: Callable[[Part], Result], parts: Sequence[Part], most: int) -> list[Result]:
    """Return the results of the work for all parts, in order.

    The calling thread takes parts too. Work inside such work stays on its thread.

    Args:
        most: use at most this number of threads, and at most ``count()``.
    Raises: what the work raises; parts that have not begun are dropped then.
    """
    most = min(most, count(), len(parts))
    if most <= 1 or _dividing.get():
        return [work(part) for part in parts]
    results: dict[int, Result] = {}
    waiting = deque(enumerate(parts))

    def take() -> None:
        _dividing.set(True)
        try:
            while True:
                try:
                    i, part = waiting.popleft()
                except IndexError:
                    return
                results[i] = work(part)
        except BaseException:
            waiting.clear()
            raise

    # A copied context: the threads see np.errstate of the caller, and _dividing ends with it.
    others = [pool().submit(contextvars.copy_context().run, take) for _ in range(most - 1)]
    try:
        contextvars.copy_context().run(take)
    finally:
        started = [other for other in others if not other.cancel()]
        wait(started)
    for other in started:
        other.result()
    return [results[i] for i in range(len(parts))]


class _OneBlasThread:
    """A context in which BLAS computes on the thread that calls it. Contexts may overlap.

    The number of BLAS's threads belongs to the whole process, so it is put back at the end of the
    last context.

    Attributes:
        possible: False if this BLAS cannot be told; the context then does nothing.
    """

    def __init__(self) -> None:
        found = _openblas()
        self.possible = found is not None
        self._get, self._set = found or (lambda: 1, lambda number: None)
        self._lock = Lock()
        self._users = 0
        self._before = 1

    def after_fork(self) -> None:
        """Begin anew: the other threads, and so their contexts, do not survive a fork."""
        if self._users:
            self._set(self._before)
        self._lock = Lock()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = self._get()
                if self._before != 1:
                    self._set(1)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._before != 1:
                self._set(self._before)


def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Find OpenBLAS's functions that get and set its number of threads.

    Returns: None if NumPy has another BLAS, or one on OpenMP, which counts for each thread.
    """
    for library in _libraries():
        for name in (
            "scipy_openblas_{}64_",
            "openblas_{}64_",
            "scipy_openblas_{}",
            "openblas_{}",
        ):
            try:
                found: list[Any] = [
                    getattr(library, name.format(function))
                    for function in ("get_num_threads", "set_num_threads", "get_parallel")
                ]
            except AttributeError:
                continue
            get, put, parallel = found
            put.restype = None
            return None if parallel() == _OPENMP else (get, put)
    return None


_OPENMP = 2  # OPENBLAS_OPENMP in OpenBLAS's cblas.h


def _libraries() -> Iterator[ctypes.CDLL]:
    """Yield the loaded libraries in which NumPy's BLAS can be looked up."""
    # Linux and macOS look names up in the libraries that this one needs, too. Windows does not.
    files = [importlib.import_module("numpy.linalg._umath_linalg").__file__]
    files += sorted(map(str, Path(np.__file__).parents[1].glob("numpy.libs/*openblas*.dll")))
    for file in files:
        try:
            yield ctypes.CDLL(file)
        except (OSError, TypeError):  # TypeError: built into the interpreter
            continue


one_blas_thread = _OneBlasThread()


def _after_fork() -> None:
    """Threads do not survive a fork."""
    pool.cache_clear()
    one_blas_thread.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
