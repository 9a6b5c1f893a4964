"""``--lora PATH[:SCALE]``, and the LoRAs that a picture says it was drawn with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

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
        scales = {name: scale for name, scale, *_ in recorded}
        return [
            (path, scales.get(Path(path).name, (1.0, 1.0)) if scale is None else scale)
            for path, scale in asked
        ]
    loras: list[tuple[str, float | tuple[float, float]]] = []
    missing = []
    for name, scale, digest, short, source in recorded:
        here = next((one for one in (name, f"{name}.safetensors") if os.path.isfile(one)), None)
        if here is not None and _is_same(here, digest, short):
            loras.append((here, scale))
        else:
            missing.append(f"{source or name}:{scale[0]:g}")
    if missing:
        raise UsageError(
            f"{picture}: was drawn with the LoRA {' and '.join(missing)}: give all of its LoRAs "
            "with --lora PATH:SCALE"
        )
    return loras


def _is_same(file: str, digest: str | None, short: str | None) -> bool:
    """Return True unless the file has another hash than the one that is recorded."""
    if digest is not None:
        from mlxdiff.machine.disk import sha256

        return sha256(Path(file)) == digest
    if short is None:
        return True
    from mlxdiff.adapters.lora import open_lora

    return open_lora(file).short_hash == short


class _Recorded(NamedTuple):
    """A LoRA of a picture: name, scales, sha256, A1111's short hash, and hub id."""

    name: str
    scale: tuple[float, float]
    digest: str | None
    short: str | None
    source: str | None


def _recorded(found: Any, picture: str | None) -> list[_Recorded]:
    """The LoRAs of a picture; the file may come from anyone."""
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
        hashes = [
            one[key] if isinstance(one.get(key), str) else None
            for key in ("sha256", "short_hash", "source")
        ]
        name = Path(one["name"]).name  # never a place of its own choosing
        result.append(_Recorded(name, (float(scale), float(text)), *hashes))
    return result
