"""Memory that is freed and taken again at once: keep it in the process (glibc alone)."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

# Parameters of mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


@cache
def keep_freed() -> bool:
    """Let arrays of up to 32 MB come from memory that is kept; return whether that is possible.

    By default glibc gives freed arrays back to the system and gets new ones from it, cleared page
    by page. Training frees and takes gigabytes in each step; this took a quarter of its time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 1 << 30), (_TOP_PAD, 64 << 20))
    return all([mallopt(name, value) for name, value in settings])
