"""Finished pictures on the disk, the oldest of which make room for new ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxdiff.errors import UsageError
from mlxdiff.pictures import metadata

_ID = re.compile(r"[0-9]{15}-[0-9a-f]{8}")
_UNFINISHED = "unfinished.json"


class Gallery:
    """A folder of PNG files. Names sort by time.

    Args:
        folder: made if it does not exist.
        limit: bytes of all pictures; the oldest are deleted beyond it.
    Raises: UsageError if the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made ({error.strerror})") from None
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        self._sizes = {
            path.stem: path.stat().st_size
            for path in sorted(folder.glob("*.png"))
            if _ID.fullmatch(path.stem)
        }

    def add(self, png: bytes) -> str:
        """Keep a picture. Returns: its name. Raises: UsageError if it cannot be written."""
        name = f"{time.time_ns() // 10_000:015d}"[-15:] + f"-{secrets.token_hex(4)}"
        self._write(self._path(name), png)
        with self._lock:
            self._sizes[name] = len(png)
            while sum(self._sizes.values()) > self.limit and len(self._sizes) > 1:
                self._delete(min(self._sizes))
        return name

    def names(self, before: str | None = None, count: int = 50) -> list[str]:
        """Names of pictures, the newest first.

        Args:
            before: only those older than this one.
            count: how many.
        """
        with self._lock:
            known = sorted(self._sizes, reverse=True)
        return [name for name in known if before is None or name < before][:count]

    def png(self, name: str) -> bytes | None:
        """The file of a picture; None if there is none of this name."""
        with self._lock:
            if name not in self._sizes:
                return None
        with contextlib.suppress(FileNotFoundError):
            return self._path(name).read_bytes()
        return None

    def described(self, name: str) -> dict[str, Any] | None:
        """Return the settings of a picture as JSON values; None if there is none of this name."""
        if name not in self._sizes:
            return None
        try:
            return metadata.read(self._path(name)).to_dict()
        except UsageError:
            return {}

    def delete(self, name: str) -> bool:
        """Delete a picture. Returns: whether there was one."""
        with self._lock:
            return self._delete(name)

    def _delete(self, name: str) -> bool:
        if self._sizes.pop(name, None) is None:
            return False
        self._path(name).unlink(missing_ok=True)
        return True

    def unfinished(self) -> list[str]:
        """Names of the jobs that were under way when the server ended."""
        try:
            found = json.loads((self.folder / _UNFINISHED).read_text("utf-8"))
        except (OSError, ValueError):
            return []
        return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []

    def remember_unfinished(self, jobs: Sequence[str]) -> None:
        """Write down which jobs are under way. Raises: UsageError if it cannot be written."""
        self._write(self.folder / _UNFINISHED, json.dumps(list(jobs)).encode())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.png"

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
        finally:
            temporary.unlink(missing_ok=True)
