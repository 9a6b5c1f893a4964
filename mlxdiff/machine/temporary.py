"""Temporary files and folders beside their destination, and what killed processes leave of them.

A temporary file or folder is locked (flock) by the process that writes it. The system releases the
lock when the process ends for any reason, so one that nobody locks is a leftover. Without such
locks, a leftover is one that is a day old.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

FILES = ".mlxdiff-????????????????.tmp"
"""Pattern of temporary files."""

_OLD = 86400.0  # seconds
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Make a temporary file in a folder and delete it at the end, unless it was renamed.

    Yields: its path, and the file, open for writing in binary.
    Raises: OSError.
    """
    path = folder
    try:
        while True:
            path = folder / f".mlxdiff-{secrets.token_hex(8)}.tmp"
            with open(path, "xb") as file:
                if _claim(file.fileno(), path):
                    yield path, file
                    return
    finally:
        if path != folder:
            path.unlink(missing_ok=True)


@contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Lock a temporary folder that was just made, while it is written."""
    descriptor = -1
    try:
        with suppress(OSError):  # a system that opens no folders
            descriptor = os.open(folder, os.O_RDONLY)
            _claim(descriptor, folder)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders of this pattern that no process writes any more."""
    with suppress(OSError):
        for path in folder.glob(pattern):
            with suppress(OSError):
                if is_abandoned(path):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()


def is_abandoned(path: Path) -> bool:
    """Return True if no process writes a temporary file or folder. Raises: OSError."""
    if path.is_symlink():
        return False
    if fcntl is None:
        return time.time() - path.stat().st_mtime > _OLD
    descriptor = os.open(path, os.O_RDONLY | _NO_LINK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    finally:
        os.close(descriptor)


def _claim(descriptor: int, path: Path) -> bool:
    """Lock what was just made. Return False if another process took it for a leftover before."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # no locks on this file system
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
