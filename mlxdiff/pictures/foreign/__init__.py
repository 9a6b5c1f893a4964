"""What pictures of other programs say, and what of it mlxdiff can honour.

One reader for each program turns the texts of a picture into a ``Record``; ``translate`` turns a
record into our settings. To add a program: a file with ``read(texts) -> Record | None`` here, its
line in ``READERS``, and a row in docs/replay.md.
"""

from __future__ import annotations

from collections.abc import Callable

from mlxdiff.pictures.foreign import (
    a1111,
    comfyui,
    diffusers,
    draw_things,
    fooocus,
    invokeai,
    novelai,
    swarmui,
)
from mlxdiff.pictures.foreign.record import Record, Texts, short

READERS: tuple[Callable[[Texts], Record | None], ...] = (
    novelai.read,
    swarmui.read,
    fooocus.read,
    diffusers.read,
    draw_things.read,
    invokeai.read,
    a1111.read,
    comfyui.read,
)
"""In the order in which they are asked: those that know their own sign come first."""


def read(texts: Texts) -> Record | None:
    """Read the texts of a picture; None if no program here writes such texts."""
    found = next((record for read in READERS if (record := read(texts)) is not None), None)
    if found is not None and found.version is None and found.tool in ("AUTOMATIC1111", "ComfyUI"):
        # Savers of ComfyUI write A1111's text beside the graph. The graph says more.
        graph = comfyui.read(texts)
        if graph is not None and graph.unread_prompt is None:
            return graph
    return found


def unknown_keys(texts: Texts) -> str:
    """Name the first keys of JSON that no reader knows; "" if there is none."""
    for values in texts.documents.values():
        kinds = [one["class_type"] for one in values.values() if _is_node(one)]
        if values:
            return ", ".join(short(key) for key in list(dict.fromkeys(kinds or values))[:8])
    return ""


def _is_node(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_type"), str)
