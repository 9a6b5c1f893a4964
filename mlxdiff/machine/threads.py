"""Threads for NumPy, which releases the GIL while it computes. Their number is BLAS's."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from mlxdiff.machine.probe import THREAD_VARIABLES, usable_cores


def count() -> int:
    """Return the number of threads that BLAS may use. Default: the usable cores of this process."""
    for variable in THREAD_VARIABLES:
        if re.fullmatch("[0-9]{1,4}", os.environ.get(variable, "")):
            return max(1, int(os.environ[variable]))
    return usable_cores()


@cache
def pool() -> ThreadPoolExecutor:
    """Return the thread pool. It starts on first use."""
    return ThreadPoolExecutor(count(), thread_name_prefix="mlxdiff")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not survive a fork
