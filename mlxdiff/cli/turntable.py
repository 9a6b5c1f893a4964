"""A turn around an object: views as pictures, and an animation of them (``--turntable``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxdiff.batch.jobs import Axis, Job, make_axis
from mlxdiff.cli.streams import tell
from mlxdiff.errors import UsageError, argument
from mlxdiff.pictures.formats import ending
from mlxdiff.pictures.image import check_writable, load_image, to_image, write_bytes
from mlxdiff.pictures.videos import ANIMATED, encode_video, require_writer
from mlxdiff.run.options import CommandOptions

FPS = 10.0
"""Views a second in the animation."""


def axis(views: int, options: Mapping[str, Any]) -> Axis:
    """The cameras of a turn: evenly around the object, from ``options["azimuth"]`` on."""
    start = options.get("azimuth") or 0.0
    return make_axis("azimuth", [start + 360 * i / views for i in range(views)], float)


def check(views: int, jobs: Sequence[Job]) -> None:
    """Raise UsageError unless the jobs are the views of one turn."""
    if len(jobs) != views or any(job.count != 1 for job in jobs):
        raise UsageError(
            f"{argument('turntable')} draws one turn around one object; leave out what asks for "
            f"more ({argument('count')}, {argument('prompt_file')}, {argument('vary_option')}, a "
            "folder of images)"
        )


def places(command: CommandOptions, seed: int) -> tuple[CommandOptions, Path]:
    """Return the command with the names of the views, and the file of the animation.

    The views stand beside it: chair.gif, chair-0.png, chair-1.png, ...
    Raises: UsageError if ``--output`` names no animation, or it cannot be written.
    """
    path = Path(command.output or f"mlxdiff-{seed}.gif").expanduser()
    if ending(path) not in ANIMATED or "{" in str(path):
        *others, last = ANIMATED
        raise UsageError(
            f"{argument('output')} {path}: {argument('turntable')} writes an animation; end the "
            f"name in {', '.join(others)} or {last}, without braces (the views are written beside "
            "it, as .png)"
        )
    require_writer(path)
    check_writable(path, command.force or command.resume, ANIMATED)
    return replace(command, output=str(path.with_suffix("")) + "-{index}.png"), path


def write(path: Path, views: Mapping[int, Path], overwrite: bool) -> None:
    """Write the animation of the views that are files, again and again from the first.

    Args:
        views: by index.
    Raises: UsageError.
    """
    frames = [to_image(load_image(views[index])) for index in sorted(views)]
    if not frames:
        return
    encoded = encode_video(frames, ending(path), FPS)
    write_bytes(encoded, path, overwrite)
    tell(f"The turn is {path}")
