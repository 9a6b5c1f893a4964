"""``--lora PATH[:SCALE]``, and the LoRAs that a picture says it was drawn with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlxdiff.cli.streams import tell
from mlxdiff.errors import UsageError, quoted
from mlxdiff.run.values import Scaled


def report(loras: tuple[Any, ...]) -> None:
    """Say on stderr what each LoRA changes."""
    for lora in loras:
        tell(f"LoRA {lora.report()}")


def replayed(
    asked: tuple[Scaled, ...], found: Any, picture: str | None
) -> list[tuple[str, float | tuple[float, float]]]:
    """The LoRAs to load: those asked for, else those of the picture.

    Args:
        asked: by the command line; a scale that is missing is the picture's for a file of the same
            name, else 1.
        found: ``loras`` of the picture's metadata, if there is any.
        picture: its path, for messages.
    Raises: UsageError where the picture was drawn with LoRAs that are not at hand.
    """
    recorded = _recorded(found, picture)
    if asked:
        scales = {name: scale for name, scale, _ in recorded}
        return [
            (path, scales.get(Path(path).name, (1.0, 1.0)) if scale is None else scale)
            for path, scale in asked
        ]
    from mlxdiff.machine.disk import sha256

    loras: list[tuple[str, float | tuple[float, float]]] = []
    missing = []
    for name, scale, digest in recorded:
        here = Path(name)
        if os.path.isfile(here) and (digest is None or sha256(here) == digest):
            loras.append((name, scale))
        else:
            missing.append(f"{name}:{scale[0]:g}")
    if missing:
        raise UsageError(
            f"{picture}: was drawn with the LoRA {' and '.join(missing)}: give all of its LoRAs "
            "with --lora PATH:SCALE"
        )
    return loras


def _recorded(found: Any, picture: str | None) -> list[tuple[str, tuple[float, float], str | None]]:
    """(name, scales, sha256) of each; the file may come from anyone."""
    result = []
    for one in found or ():
        if isinstance(one, dict) and (one.get("in_prompt") or one.get("fast")):
            continue  # the prompt, or --fast, asks for it
        values = one if isinstance(one, dict) else {}
        scale: Any = values.get("scale")
        text: Any = values.get("text_scale", scale)
        good = all(type(number) in (int, float) and abs(number) < 1e9 for number in (scale, text))
        if not good or not isinstance(values.get("name"), str):
            raise UsageError(f"{picture}: loras in its mlxdiff metadata holds {quoted(one)}")
        digest = one.get("sha256")
        name = Path(one["name"]).name  # never a place of its own choosing
        result.append(
            (name, (float(scale), float(text)), digest if isinstance(digest, str) else None)
        )
    return result
