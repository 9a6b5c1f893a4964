"""One request -> a list of jobs: every line with every value of every axis.

Nothing is opened or drawn here.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxdiff.batch import words
from mlxdiff.batch.lines import Line
from mlxdiff.batch.presets import TEXTS, styled
from mlxdiff.batch.wildcards import Wildcards
from mlxdiff.errors import UsageError, argument, one_line
from mlxdiff.run.values import SeedAndShare

MOST_AXES = 2


@dataclass(frozen=True)
class Axis:
    """An option that takes several values.

    Attributes:
        name: of the option.
        labels: the values in words.
        values: the values.
    """

    name: str
    labels: tuple[str, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """The pictures of one run.

    Attributes:
        options: of loading and of the run, by Python name.
        place: what it comes from, for messages; "": the command line.
        labels: the value of each axis in words.
        said: what the metadata of its pictures hold beside their settings.
        fault: why it cannot be drawn; None: nothing is known against it.
        first: index of its first picture among those of all jobs.
        line: number of its line, from 0.
    """

    options: Mapping[str, Any]
    place: str = ""
    labels: tuple[str, ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict)
    fault: UsageError | None = None
    first: int = 0
    line: int = 0

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return ", ".join((self.place, *self.labels)).strip(", ") or "the command line"

    @property
    def count(self) -> int:
        """Number of pictures."""
        count: int = self.options.get("variations") or self.options.get("count", 1)
        return count

    @property
    def seeds(self) -> list[int]:
        """Seed of each picture; of several that make one, that of the first."""
        first: int = self.options["seed"]
        step = 0 if self.options.get("vary") is not None else self._rivals
        return [first + step * i for i in range(self.count)]

    @property
    def _rivals(self) -> int:
        """Pictures that are drawn for each one of the result."""
        best: int = self.options.get("best_of") or 1
        joined: int = self.options.get("ensemble") or 1
        return best * joined

    def alone(self, picture: int) -> Job:
        """Return the job of one of its pictures."""
        options = {**self.options, "seed": self.seeds[picture], "count": 1}
        if options.get("variations") is not None:
            options["variations"] = 1
        if options.get("vary") is not None:  # the seed of the variation counts on
            seed, strength = SeedAndShare().accept(options["vary"])
            options["vary"] = seed + picture * self._rivals, strength
        return replace(self, first=self.first + picture, options=options)


def read_axis(text: str) -> Axis:
    """Read ``NAME=A,B,C``; quotes around a value keep its commas. Raises: UsageError."""
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UsageError(
            f"{argument('vary_option')} {text!r}: expected NAME=A,B,C, such as steps=10,20,30"
        )
    try:
        entry = words.find(name)
        given = next(csv.reader([rest], skipinitialspace=True))
        return make_axis(entry.name, given, lambda word: words.of_word(entry, word))
    except (UsageError, csv.Error) as error:
        raise UsageError(f"{argument('vary_option')} {name}: {one_line(error)}") from None


def make_axis(name: str, given: Sequence[Any], read: Callable[[Any], Any]) -> Axis:
    """Make an axis of an option.

    Args:
        read: turns each value into what the library takes.
    """
    return Axis(name, tuple(map(str, given)), tuple(map(read, given)))


def check_axes(axes: Sequence[Axis]) -> None:
    """Raise UsageError for more axes than a sheet has, or an option that varies twice."""
    names = [axis.name for axis in axes]
    if len(names) > MOST_AXES:
        raise UsageError(f"{len(names)} options vary; at most {MOST_AXES} can")
    if len(set(names)) < len(names):
        raise UsageError(f"{names[0]} varies twice; give all of its values at once")


def expand(
    options: Mapping[str, Any],
    seed: int,
    lines: Sequence[Line] = (Line(),),
    axes: Sequence[Axis] = (),
    preset: Mapping[str, Any] | None = None,
    wildcards: Wildcards | None = None,
) -> list[Job]:
    """Make the jobs of a request.

    Args:
        options: of all lines. A line comes before them, an axis before both.
        seed: of the first picture of each job that names none.
        lines: what each line asks for.
        axes: options that take several values: each line is drawn with every combination.
        preset: options behind all others.
        wildcards: fill in the wildcards of prompts; None: prompts stay as they are.
    """
    found = []
    for number, line in enumerate(lines):
        if line.fault is not None:
            found.append(Job({"seed": seed}, line.place, fault=line.fault, line=number))
            continue
        for places in itertools.product(*(range(len(axis.values)) for axis in axes)):
            varied = {axis.name: axis.values[i] for axis, i in zip(axes, places, strict=True)}
            asked = styled(preset or {}, {**options, **line.options, **varied})
            asked["seed"] = seed if asked.get("seed") is None else asked["seed"]
            job = Job(
                options=asked,
                place=line.place,
                labels=tuple(axis.labels[i] for axis, i in zip(axes, places, strict=True)),
                line=number,
            )
            found += [job] if wildcards is None else _filled(job, wildcards)
    return numbered(found)


def numbered(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs with the index of their first pictures."""
    found, first = [], 0
    for job in jobs:
        found.append(replace(job, first=first))
        first += job.count
    return found


def singly(jobs: Sequence[Job]) -> list[Job]:
    """Return a job for each picture."""
    return [job.alone(picture) for job in jobs for picture in range(job.count)]


def share(jobs: Sequence[Job], process: int, processes: int) -> list[Job]:
    """Return the jobs of one of several processes: each picture is drawn by one of them."""
    if processes == 1:
        return list(jobs)
    return [job for job in singly(jobs) if job.first % processes == process]


def _filled(job: Job, wildcards: Wildcards) -> list[Job]:
    """Fill in the wildcards, which differ from picture to picture."""
    texts = {name: job.options.get(name) for name in TEXTS}
    asked = {
        name: text
        for name, text in texts.items()
        if isinstance(text, str) and wildcards.has_any(text)
    }
    if not asked:
        return [job]
    found = []
    for one in singly([job]):
        try:
            chosen = {
                name: wildcards.fill(text, one.options["seed"]) for name, text in asked.items()
            }
        except UsageError as error:
            return [replace(job, fault=error)]
        said = {f"{name}_template": text for name, text in asked.items()}
        found.append(replace(one, options={**one.options, **chosen}, said=said))
    return found
