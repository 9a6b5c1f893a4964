"""Files on the disk: locks between processes, free space, digests and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

from mlxdiff.errors import ConfigError, UsageError


@contextmanager
def exclusive(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[bool]:
    """Hold a lock that only one process can hold at a time.

    The operating system owns the lock (flock on an open file) and releases it when the process ends
    for any reason. A lock file that is left behind locks nothing. Some systems and file systems
    have no such locks; the block then runs without one, so files that it writes must be whole
    without it too.

    Args:
        path: the lock file. It is made, with its folder, and kept. It holds the process id of the
            holder.
        on_wait: called once, with the holder's process id (or "?"), if another process holds the
            lock.
    Yields: True if the lock is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        held = _acquire(file, on_wait)
        if held:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield held  # closing the file releases the lock


def _acquire(file: Any, on_wait: Callable[[str], None] | None) -> bool:
    """Wait for the lock. Return False if there are no locks here."""
    if fcntl is None:
        return False
    reported = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not reported and on_wait is not None:
                file.seek(0)
                on_wait(file.read().strip() or "?")
            reported = True
            time.sleep(0.1)
        except OSError:
            return False


def free_space(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def same_disk(a: Path, b: Path) -> bool:
    """Return True if two folders, which need not exist yet, are on the same file system."""
    return _existing(a).stat().st_dev == _existing(b).stat().st_dev


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def require_space(needs: dict[Path, int], what: str, advice: str) -> None:
    """Check that the disk has enough room, before any work starts.

    Args:
        needs: folder -> bytes to write there. Folders on the same disk are added up.
        what: the task that needs the room, for the message.
        advice: the way out, for the message.
    Raises: UsageError.
    """
    for folder in needs:
        size = sum(n for other, n in needs.items() if same_disk(folder, other))
        free = free_space(folder)
        if free < size:
            raise UsageError(
                f"{what} needs {size / 1e9:.2f} GB at {folder}, where {free / 1e9:.2f} GB are "
                f"free; {advice}"
            )


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda size: None) -> str:
    """Return a file's sha256 in hex. ``on_bytes`` is called with the size of each piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises: ConfigError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
