"""Threads for NumPy, which lets several compute at once: as many as BLAS may use."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from mlxdiff.machine.probe import THREAD_VARIABLES, usable_cores


def count() -> int:
    """As many as BLAS is told to use, else one for each core that this process may run on."""
    for variable in THREAD_VARIABLES:
        if os.environ.get(variable, "").isdecimal():
            return max(1, int(os.environ[variable]))
    return usable_cores()


@cache
def pool() -> ThreadPoolExecutor:
    """The threads, started when they are first used."""
    return ThreadPoolExecutor(count(), thread_name_prefix="mlxdiff")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not survive a fork
