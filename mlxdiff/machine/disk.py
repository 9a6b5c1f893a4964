"""Files on the disk: reading, locks between processes, free space, digests and JSON.

Files can come from strangers, and folders can be shared with them. So only regular files are read:
a FIFO or a device would block or never end. A file that mlxdiff writes under a known name is
opened without following a symbolic link, which could lead to another file of the user's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

from mlxdiff.errors import ConfigError, UsageError, one_line

MAX_DOCUMENT = 16 << 20
"""Largest JSON or text file that is read, in bytes. CLIP's tokenizer.json has 4 MB. JSON takes up
to 20 times its size in memory."""

_MOST_AT_ONCE = 1 << 30  # bytes; some systems refuse 2 GiB or more in one call
_NEVER_BLOCK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a regular file without blocking; return its descriptor.

    Raises: OSError if it cannot be opened, or is a folder, device, pipe or socket.
    """
    try:
        descriptor = os.open(path, flags | _NEVER_BLOCK, 0o666)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is a device, pipe or socket, not a file", str(path))
    return descriptor


class SourceFile:
    """A regular file that is read at any offset. It is closed when the object goes.

    All reads are of the file that was opened, also if its name is given to another file meanwhile.
    Nothing is mapped: a mapped file that shrinks would kill the process.

    Attributes:
        path: the file.
        size: its bytes when it was opened.
    Raises: OSError if it cannot be opened, or is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor = -1
        self.path = Path(path)
        self._descriptor = open_regular(path)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytearray:
        """Read ``size`` bytes from an offset. Raises: OSError, also if the file ends before."""
        if offset + size > max(self.size, os.fstat(self._descriptor).st_size):
            raise OSError(errno.EIO, "the file is too short", str(self.path))
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            part = view[done : done + _MOST_AT_ONCE]
            got = os.preadv(self._descriptor, [part], offset + done)
            if got == 0:
                raise OSError(errno.EIO, "the file became shorter", str(self.path))
            done += got
        return data


class Cursor:
    """A place in a SourceFile, for readers that go from one part of it to the next."""

    def __init__(self, file: SourceFile) -> None:
        self._file, self._place = file, 0

    def seek(self, place: int) -> None:
        """Go to an offset."""
        self._place = place

    def read(self, size: int) -> bytes:
        """Read up to ``size`` bytes; fewer at the end of the file. Raises: OSError."""
        size = max(0, min(size, self._file.size - self._place))
        data = bytes(self._file.read(self._place, size))
        self._place += size
        return data


def read_document(path: str | os.PathLike[str], most: int = MAX_DOCUMENT) -> bytes:
    """Read a whole file of at most ``most`` bytes.

    Raises: OSError if it cannot be read, is larger, or is not a regular file.
    """
    file = SourceFile(path)
    if file.size > most:
        what = f"has {file.size} bytes; at most {most} are read"
        raise OSError(errno.EFBIG, what, str(path))
    return bytes(file.read(0, file.size))


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file that mlxdiff writes under a known name; return its descriptor.

    Args:
        path: the file. It is made if ``flags`` say so.
        flags: flags of ``os.open``.
    Raises: OSError, also if the path is a symbolic link or not a regular file.
    """
    return open_regular(path, flags | _NO_LINK)


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
    Raises: UsageError if the lock file is a symbolic link, or cannot be opened or made.
    """
    with _open_lock(path) as file:
        held = _acquire(file, on_wait)
        if held and file.writable():
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        yield held  # closing the file releases the lock


def _open_lock(path: Path) -> Any:
    """Open a lock file. One of another user, in a shared folder, need only be readable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = open_own(path, os.O_RDWR | os.O_CREAT)
        except PermissionError:
            if not path.exists():
                raise
            return open(open_own(path, os.O_RDONLY), encoding="utf-8", errors="replace")
        return open(opened, "r+", encoding="utf-8", errors="replace")
    except OSError as error:
        if path.is_symlink():
            what = "is a symbolic link, so it is not used as a lock; remove it"
        else:
            what = (
                f"the lock file cannot be opened ({error.strerror}); ask the owner of its folder "
                "for the right to write there, or set MLXDIFF_HOME or HF_HOME to another folder"
            )
        raise UsageError(f"{path}: {what}") from None


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
                holder = file.read(20).strip()
                on_wait(holder if holder.isdecimal() else "?")
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
    file, place = SourceFile(path), 0
    while place < file.size:
        piece = file.read(place, min(1 << 22, file.size - place))
        digest.update(piece)
        on_bytes(len(piece))
        place += len(piece)
    return digest.hexdigest()


def identity(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return numbers that change when a file is replaced or written to. Raises: OSError."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises: ConfigError if there is none."""
    try:
        data = json.loads(read_document(path).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"{path}: not readable as JSON ({reason})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
