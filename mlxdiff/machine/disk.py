"""Files: their digests; sharing them between processes, only where there is room."""

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
    """Hold a lock that only one process has at a time.

    The lock is the system's own (flock) on an open file: it goes when its holder ends, however it
    ends, so a lock file that was left behind locks nothing. Where the system or the file system has
    no such locks, nothing is held; what is written under a lock must be whole without it, too.

    Args:
        path: the lock file; made, with its folder, and kept. Its text is the holder's process id.
        on_wait: called once, with the holder's process id (or "?"), if another process holds it.
    Yields: whether it is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        held = _acquire(file, on_wait)
        if held:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield held  # closing the file gives the lock back


def _acquire(file: Any, on_wait: Callable[[str], None] | None) -> bool:
    """Wait for the lock; whether there is one."""
    if fcntl is None:
        return False
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not told and on_wait is not None:
                file.seek(0)
                on_wait(file.read().strip() or "?")
            told = True
            time.sleep(0.1)
        except OSError:
            return False


def free_space(folder: Path) -> int:
    """Bytes free where a folder is, or will be made."""
    return shutil.disk_usage(_existing(folder)).free


def same_disk(a: Path, b: Path) -> bool:
    """Whether two folders, which need not exist yet, share one file system."""
    return _existing(a).stat().st_dev == _existing(b).stat().st_dev


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def require_space(needs: dict[Path, int], what: str, advice: str) -> None:
    """Make sure that there is room before anything is begun.

    Args:
        needs: folder -> bytes to be written there; those on one disk are added up.
        what: what needs the room, for the message.
        advice: what to do, for the message.
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
    """sha256 of a file, in hex. ``on_bytes`` is called with the size of each piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; ConfigError where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
