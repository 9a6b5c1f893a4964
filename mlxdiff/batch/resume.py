"""Which pictures of a request are there already, drawn with the same settings."""

from __future__ import annotations

import json
from pathlib import Path

from mlxdiff.errors import UsageError
from mlxdiff.pictures import metadata
from mlxdiff.pictures.metadata import Metadata


def is_there(path: Path, planned: Metadata) -> bool:
    """Return True if a file is the picture that is to be drawn.

    Args:
        planned: how it would be made.
    Raises: UsageError if there is another picture.
    """
    if not path.exists():
        return False
    try:
        found = metadata.read(path)
    except UsageError as error:
        raise UsageError(f"{error}; resuming skips pictures that say how they were made") from None
    if names := differences(found, planned):
        raise UsageError(
            f"{path}: is there, drawn with another {', '.join(names[:5])}; choose another name, or "
            "delete it"
        )
    return True


def differences(found: Metadata, planned: Metadata) -> list[str]:
    """Return the names of settings that differ. The version of mlxdiff does not count."""
    own, other = (json.loads(one.to_json()) for one in (found, planned))
    names = sorted({*own, *other} - {"version", "schema"})
    return [name for name in names if own.get(name) != other.get(name)]
