"""The contact sheet of a request: where each picture stands, and its labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxdiff.batch.jobs import Axis, Job
from mlxdiff.pictures.formats import encode
from mlxdiff.pictures.sheet import contact_sheet


@dataclass(frozen=True)
class Layout:
    """Places of pictures.

    Attributes:
        cells: rows of the index of a picture; None: the place is empty.
        rows, columns: their labels; (): there are none.
        captions: a text under each picture; (): there are none.
    """

    cells: list[list[int | None]]
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    captions: tuple[tuple[str, ...], ...] = ()


def layout(jobs: Sequence[Job], axes: Sequence[Axis]) -> Layout:
    """Place the pictures: the first axis in columns, all else in rows; without axes, in a square.

    Args:
        jobs: of a request, in order.
        axes: that its jobs vary over.
    """
    jobs = [job for job in jobs if job.fault is None]
    several = len({job.line for job in jobs}) > 1
    return _square(jobs, several) if not axes else _table(jobs, axes, several)


def _square(jobs: Sequence[Job], several: bool) -> Layout:
    places = [
        (job.first + i, _caption(job, seed, several))
        for job in jobs
        for i, seed in enumerate(job.seeds)
    ]
    width = max(1, math.ceil(math.sqrt(len(places))))
    rows = [places[i : i + width] for i in range(0, len(places), width)]
    empty = width - len(rows[-1])
    cells: list[list[int | None]] = [[index for index, _ in row] for row in rows]
    cells[-1] += [None] * empty
    captions = [tuple(text for _, text in row) for row in rows]
    captions[-1] += ("",) * empty
    return Layout(cells, captions=tuple(captions))


def _caption(job: Job, seed: int, several: bool) -> str:
    return f"{job.options.get('prompt') or job.place}, seed {seed}" if several else f"seed {seed}"


def _table(jobs: Sequence[Job], axes: Sequence[Axis], several: bool) -> Layout:
    columns = dict.fromkeys(job.labels[0] for job in jobs)
    found: dict[tuple[object, ...], dict[str, int]] = {}
    labels: dict[tuple[object, ...], str] = {}
    seen: dict[tuple[object, ...], int] = {}
    most = 1
    for job in jobs:
        group = (job.line, *job.labels)
        for i, seed in enumerate(job.seeds):
            number = seen[group] = seen.get(group, -1) + 1
            most = max(most, number + 1)
            key = (*job.labels[1:], job.line, number)
            found.setdefault(key, {})[job.labels[0]] = job.first + i
            parts = [f"{axes[1].name} {job.labels[1]}"] if len(axes) > 1 else []
            parts += [str(job.options.get("prompt") or job.place)] if several else []
            parts += [f"seed {seed}"] if number or not parts else []
            labels.setdefault(key, ", ".join(parts))
    order = sorted(found, key=list(found).index)
    return Layout(
        cells=[[found[key].get(column) for column in columns] for key in order],
        rows=tuple(labels[key] for key in order) if len(order) > 1 else (),
        columns=tuple(f"{axes[0].name} {column}" for column in columns),
    )


def draw(
    places: Layout, files: Mapping[int, Path], ending: str, quality: int | None = None
) -> bytes | None:
    """Draw the sheet of pictures that are files; None if there is no picture.

    Args:
        files: by the index of the picture; one that was not drawn is missing.
        ending, quality: of the file, see ``pictures.formats.encode``.
    Raises: UsageError if a file cannot be read.
    """
    cells = [[None if i is None else files.get(i) for i in row] for row in places.cells]
    if not any(one is not None for row in cells for one in row):
        return None
    sheet = contact_sheet(cells, places.rows, places.columns, places.captions)
    return encode(sheet, ending, quality=quality)
