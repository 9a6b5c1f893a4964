"""Draw the jobs of a command, one after the other; one that cannot be drawn does not stop the rest.

``mlx.launch -n 2 -- mlxdiff generate ...`` shares the pictures over two processes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxdiff.batch.jobs import Axis, Job, check_axes, expand, read_axis, share, singly
from mlxdiff.batch.lines import Line, read_lines, with_folders
from mlxdiff.batch.presets import config_folder, read_preset
from mlxdiff.batch.wildcards import Wildcards
from mlxdiff.cli import turntable
from mlxdiff.cli.options import given_to
from mlxdiff.cli.output import NotSaved, Output
from mlxdiff.errors import MlxdiffError, UsageError
from mlxdiff.run.options import CommandOptions, LoadOptions, RunOptions

Adapt = Callable[[Any, dict[str, Any]], dict[str, Any]]


def lines_of(prompt: str | None, prompt_file: str | None) -> list[Line]:
    """The lines to draw: those of a file, else the one of the command line.

    Args:
        prompt: of the command line, or of the picture that it names.
        prompt_file: - is standard input.
    """
    if prompt_file is None:
        return [Line({} if prompt is None else {"prompt": prompt})]
    where = "standard input" if prompt_file == "-" else prompt_file
    try:
        text = sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{prompt_file}: not a UTF-8 text file") from None
    if lines := read_lines(text, where):
        return lines
    raise UsageError(f"{prompt_file}: holds no prompt; expected one on each line")


def jobs_of(
    command: CommandOptions, options: Mapping[str, Any], lines: list[Line], seed: int
) -> tuple[list[Job], list[Axis]]:
    """The jobs of a command, and the axes that they vary over.

    Args:
        options: of loading and of runs, that the command line gives.
        seed: where none is given.
    Raises: UsageError.
    """
    axes = [read_axis(text) for text in command.vary_option]
    if command.turntable is not None:
        axes.append(turntable.axis(command.turntable, options))
    check_axes(axes)
    preset = {} if command.preset is None else read_preset(command.preset)
    words = None
    if command.wildcards:
        folder = command.wildcard_folder
        place = config_folder() / "wildcards" if folder is None else Path(folder).expanduser()
        words = Wildcards(place)
    elif command.wildcard_folder is not None:
        raise UsageError("--wildcard-folder needs --wildcards")
    lines = with_folders(lines, {**preset, **options})
    jobs = expand(options, seed, lines, axes, preset, words)
    if command.turntable is not None:
        turntable.check(command.turntable, jobs)
    if command.resume:
        seeded = any("seed" in one for one in (preset, options, *({axis.name} for axis in axes)))
        if not seeded and any("seed" not in line.options for line in lines if line.fault is None):
            raise UsageError("--resume needs --seed: a random seed gives other pictures")
        if command.force or command.no_metadata:
            other = "--force" if command.force else "--no-metadata"
            raise UsageError(f"--resume and {other} contradict each other; give one")
        jobs = singly(jobs)
    if all(job.fault is None and job.options.get("prompt") is None for job in jobs):
        if not any("model" in job.options for job in jobs):  # one's own may draw without
            raise UsageError(
                "no prompt is given; for example: "
                'mlxdiff generate "a red circle on a blue background"'
            )
    return jobs, axes


def draw(
    jobs: Sequence[Job],
    output: Output,
    processes: Any,
    report: Callable[[Any], None],
    adapted: Adapt,
    start: float,
) -> None:
    """Draw jobs.

    Args:
        jobs: all of them; this process draws its share.
        output: writes the pictures.
        processes: that draw together (``backends.processes.Processes``).
        report: called with a pipeline when its additions have changed.
        adapted: gives the options of a run that fit a pipeline.
        start: when the work began.
    Raises: MlxdiffError if there is one job and it fails; else UsageError in the end, if one has
        failed.
    """
    from mlxdiff.batch.models import Models

    models = Models()
    own = share(jobs, processes.rank, processes.count)
    for job in own:
        try:
            _draw_one(job, models, output, report, adapted, start)
        except NotSaved:
            raise
        except MlxdiffError as error:
            if len(jobs) == 1 or output.options.turntable is not None:
                raise
            output.note_failure(job, error)
        start = time.perf_counter()
    models.unload_all()


def _draw_one(
    job: Job,
    models: Any,
    output: Output,
    report: Callable[[Any], None],
    adapted: Adapt,
    start: float,
) -> None:
    if job.fault is not None:
        raise job.fault
    loading = given_to(LoadOptions, job.options)
    with output.reporter.fetching() as progress:
        pipe = models.get(loading, progress=progress)
    report(pipe)
    asked = adapted(pipe, given_to(RunOptions, job.options))
    run = pipe.stream(**asked, on_progress=output.reporter.on_progress)
    models.make_room(pipe, run.settings)
    output.check(run, job)
    if not output.options.resume or not output.is_there(run, job):
        output.draw(pipe, run, job, start)
