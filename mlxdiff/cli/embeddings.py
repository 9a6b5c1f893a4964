"""``--embedding PATH[:WORD]``, and the embeddings that a picture says it was drawn with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlxdiff.errors import UsageError, quoted

Asked = tuple[str, str | None]


def replayed(asked: tuple[Asked, ...], found: Any, picture: str | None) -> list[Asked]:
    """The embeddings to load: those asked for, else those of the picture.

    Args:
        asked: by the command line.
        found: ``embeddings`` of the picture's metadata, if there are any; they are taken where the
            same file lies in the working folder.
        picture: its path, for messages.
    Raises: UsageError where the picture was drawn with embeddings that are not at hand.
    """
    if asked:
        return list(asked)
    from mlxdiff.machine.disk import sha256

    here: list[Asked] = []
    missing = []
    for one in found or ():
        if not isinstance(one, dict) or not all(
            isinstance(one.get(key), str) for key in ("token", "name", "sha256")
        ):
            raise UsageError(f"{picture}: embeddings in its mlxdiff metadata holds {quoted(one)}")
        file = Path(Path(one["name"]).name)  # never a place of its own choosing
        if os.path.isfile(file) and sha256(file) == one["sha256"]:
            here.append((str(file), one["token"]))
        else:
            missing.append(f"{file} (the word {one['token']!r})")
    if missing:
        raise UsageError(
            f"{picture}: was drawn with the embedding {' and '.join(missing)}: give all of its "
            "embeddings with --embedding PATH:WORD"
        )
    return here
