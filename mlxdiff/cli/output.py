"""Output of a command: files, a report, previews, progress.

A picture that is finished is not lost: it is written before the next group is drawn, and whatever
fails afterwards (a signal, a closed terminal, a full disk) comes second.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from mlxdiff.batch.jobs import Axis, Job
from mlxdiff.cli.names import Names, exists
from mlxdiff.cli.preview import Preview
from mlxdiff.cli.progress import Bar, Events, Reporter
from mlxdiff.cli.streams import tell
from mlxdiff.errors import MlxdiffError, UsageError
from mlxdiff.machine.stopping import uninterrupted
from mlxdiff.pictures.formats import ENDINGS, ending
from mlxdiff.pictures.names import numbered
from mlxdiff.run.options import CommandOptions

logger = logging.getLogger("mlxdiff")

if TYPE_CHECKING:
    from mlxdiff.pictures.metadata import Metadata
    from mlxdiff.run.drawing import Picture, Run, Step


class NotSaved(UsageError):
    """A picture that cannot be written where it was asked for: nothing more is drawn."""


class Output:
    """Writes and reports the pictures of all jobs of a command.

    As a context manager it says, where something fails, how many pictures are saved.

    Args:
        options: of the command line.
        quiet: show no progress.
        jobs: all of them, in order.
        numbers_names: number default names where such files exist.
    Raises: UsageError where the names of the files cannot be used.
    """

    def __init__(
        self, options: CommandOptions, quiet: bool, jobs: Sequence[Job], numbers_names: bool = True
    ) -> None:
        self.options, self.jobs = options, jobs
        self.names = Names(options, jobs, numbers_names)
        self.files: dict[int, Path] = {}  # of finished pictures, by their index
        self.saved = self.skipped = self.failed = 0
        self.lost_report: OSError | None = None  # why standard output takes no more
        self.preview: Preview | None = None
        self.reporter = self._reporter(quiet)
        if options.quality is not None and ending(self.names.template.text) in (".png", ".gif"):
            logger.warning("quality has no effect: PNG keeps every pixel, GIF 256 colors of them")
        if options.preview or options.preview_file is not None:
            every = 1 if options.preview_every is None else options.preview_every
            self.preview = Preview(options.preview_file, every, options.force)
        elif options.preview_every is not None:
            raise UsageError("--preview-every needs --preview or --preview-file")

    def _reporter(self, quiet: bool) -> Reporter:
        form = self.options.show_progress
        if form == "json" and not self.options.as_json:
            raise UsageError("--progress json writes JSON to standard output; give --json, too")
        if form == "json":
            return Events(self.say)
        return Reporter() if quiet or form == "none" else Bar(len(self.names.paths))

    def __enter__(self) -> Output:
        self.reporter.event("begin", pictures=len(self.names.paths))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            if len(self.names.paths) > 1:
                tell(f"{self._count()}.")
        elif self.lost_report is not None:
            if isinstance(self.lost_report, BrokenPipeError):
                raise self.lost_report  # its reader has gone, as of `| head`: end quietly
            why = self.lost_report.strerror or self.lost_report
            raise UsageError(f"standard output: cannot be written ({why}); {self._count()}")

    def _count(self) -> str:
        return f"{self.saved} of {len(self.names.paths)} pictures are saved"

    def check(self, run: Run, job: Job) -> None:
        """See that the files of a job can be written, the first time those of all jobs.

        Raises: NotSaved the first time, later UsageError.
        """
        if self.names.is_checked:
            self._check(run, job)
            return
        try:
            self._check(run, job)
            if self.preview is not None:
                self.preview.check(self.names.paths, self.names.values)
        except UsageError as error:
            raise NotSaved(str(error)) from None

    def _check(self, run: Run, job: Job) -> None:
        self.names.check(run, job)
        frames = run.settings.frames
        if frames is None and ending(self.names.paths[job.first]) not in ENDINGS:
            raise UsageError(
                f"{self.names.paths[job.first]}: this job draws a picture; choose a name that ends "
                f"in {', '.join(ENDINGS)}"
            )
        if frames is not None:
            if self.options.grid is not None:
                raise UsageError("--grid: a sheet shows pictures, and this draws a video")
            for index in range(job.first, job.first + job.count):
                self.names.check_video(index, frames)

    def is_there(self, run: Run, job: Job) -> bool:
        """Return True if the picture of a job is there already, and report it.

        Args:
            run, job: of one picture.
        Raises: UsageError if there is another picture.
        """
        from mlxdiff.batch.resume import is_there

        path = self.names.paths[job.first]
        if not is_there(path, _described(run.metadata[0], job)):
            return False
        self.skipped += 1
        self.files[job.first] = path
        self.reporter.event("skipped", path=str(path), index=job.first)
        return True

    def draw(self, pipe: Any, run: Run, job: Job, start: float) -> None:
        """Draw the pictures of a job, write and report them.

        Args:
            pipe, run: the Pipeline, and the run of the job.
            start: when the work on it began.
        Raises: NotSaved where a picture cannot be written.
        """
        before = job.first
        written = 0

        def on_step(step: Step) -> None:
            if self.preview is not None:
                self._show(pipe, step, before + step.picture)
            self.reporter.advance(step, before + step.picture)

        try:
            for picture in run.pictures(on_step):
                self.reporter.finish()
                with uninterrupted():
                    written += 1  # even if it fails: it is then where the error says
                    path = self._save(picture, job)
                self._report(run, picture, path, time.perf_counter() - start)
                start = time.perf_counter()
        except BaseException as error:
            self.reporter.finish()
            if self.preview is not None:
                self._end_preview(keep=isinstance(error, KeyboardInterrupt))
            with contextlib.suppress(Exception):  # the first error counts
                for picture in run.rescue():
                    if picture.index >= written:
                        path = self._save(picture, job)
                        self._report(run, picture, path, time.perf_counter() - start)
            raise
        if self.preview is not None:
            self.preview.done()

    def note_failure(self, job: Job, error: MlxdiffError) -> None:
        """Say that a job of several could not be drawn, and count it."""
        self.failed += 1
        tell(f"Not drawn: {job.name}: {error}")
        self.reporter.event("failed", place=job.name, message=str(error))

    def draw_grid(self, axes: Sequence[Axis]) -> None:
        """Write the contact sheet of all pictures. Raises: UsageError."""
        from mlxdiff.batch import grid
        from mlxdiff.pictures.image import write_bytes

        assert self.options.grid is not None
        path = Path(self.options.grid).expanduser()
        places = grid.layout(self.jobs, axes)
        data = grid.draw(places, self.files, ending(path), self.options.quality)
        if data is not None:
            write_bytes(data, path, overwrite=self.options.force or self.options.resume)
            tell(f"The sheet is {path}")
            self.reporter.event("grid", path=str(path))

    def _show(self, pipe: Any, step: Step, index: int) -> None:
        """Show a preview. One that cannot be written is no reason to stop."""
        assert self.preview is not None
        try:
            self.preview.show(pipe, step, self.names.paths[index], index)
        except (OSError, UsageError) as error:
            self.preview = None
            tell(f"Note: no more previews: {error}")

    def _end_preview(self, keep: bool) -> None:
        """Keep the last preview of an interrupted run, and say where; delete it otherwise."""
        assert self.preview is not None
        with contextlib.suppress(OSError, UsageError):
            if not keep:
                self.preview.done()
            elif (kept := self.preview.keep()) is not None:
                tell(f"The last preview is in {kept}")

    def _save(self, picture: Picture, job: Job) -> Path:
        """Write a picture; if that fails, write it into the temporary folder.

        Returns: its file.
        Raises: NotSaved if it is not where it was asked for.
        """
        from mlxdiff.pictures.image import write_bytes

        index = job.first + picture.index
        path = self.names.paths[index]
        text = None if self.options.no_metadata else _described(picture.metadata, job)
        files = self.names.files(index, len(picture.frames) or None)
        encoded = picture.encoded(files, text, self.options.quality)
        if len(files) > 1:
            for file, data in zip(files, encoded, strict=True):
                self._write_frame(file, data)
            self.saved += 1
            self.files[index] = path
            return path
        (data,) = encoded
        for one in numbered(path) if self.names.is_numbered else (path,):
            try:
                write_bytes(data, one, overwrite=self.options.force)
            except UsageError as error:
                if self.names.is_numbered and exists(one):  # made by another process just now
                    continue
                place = self._rescued(data, path)
                where = "it is lost" if place is None else f"the picture is in {place}"
                raise NotSaved(f"{error}; {where}") from error
            self.saved += 1
            self.files[index] = one
            return one
        raise AssertionError("there is always another number")

    def _write_frame(self, path: Path, data: bytes) -> None:
        """Write a frame of a video. Raises: NotSaved."""
        from mlxdiff.pictures.image import write_bytes

        try:
            write_bytes(data, path, overwrite=self.options.force)
        except UsageError as error:
            place = self._rescued(data, path)
            where = "it is lost" if place is None else f"the frame is in {place}"
            raise NotSaved(f"{error}; {where}") from error

    def _rescued(self, data: bytes, path: Path) -> Path | None:
        """Write a picture into the temporary folder. Return its file, or None if that fails too."""
        from mlxdiff.pictures.image import write_bytes

        with contextlib.suppress(OSError, UsageError):
            folder = Path(tempfile.gettempdir())
            place = next(one for one in numbered(folder / path.name) if not exists(one))
            write_bytes(data, place)
            self.saved += 1
            return place
        return None

    def _report(self, run: Run, picture: Picture, path: Path, seconds: float) -> None:
        """Print a line for a picture. If that fails, go on drawing; ``__exit__`` says so."""
        line = f"{path}  seed {picture.seed}  {seconds:.1f} s{_scores(picture)}"
        if isinstance(self.reporter, Events):
            self.reporter.event("picture", **record(run, picture, path, seconds))
        elif self.options.as_json:
            self.say(json.dumps(record(run, picture, path, seconds)))
        else:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line on stdout. If that fails, go on drawing; ``__exit__`` says so."""
        if self.lost_report is None:
            try:
                click.echo(line)
            except OSError as error:
                self.lost_report = error


def _described(metadata: Metadata, job: Job) -> Metadata:
    """Metadata of a picture, with what its job says beside them."""
    return replace(metadata, extra={**metadata.extra, **job.said})


def record(run: Run, picture: Picture, path: Path, seconds: float) -> dict[str, Any]:
    """Return what --json says of a picture. Seconds by stage are its own; what the pictures of a
    prompt share counts for the first."""
    s, metadata = run.settings, picture.metadata
    stages = {k: round(v, 4) for k, v in picture.timings.items() if k != "steps"}
    return {
        "path": str(path),
        "seed": picture.seed,
        "width": picture.image.width,
        "height": picture.image.height,
        "steps": s.steps,
        "guidance": s.guidance,
        "sampler": s.sampler,
        "schedule": s.schedule,
        **metadata.extra,
        "seconds": stages | {"total": round(seconds, 4)},
        "peak_memory_bytes": picture.peak_memory,
    }


def _scores(picture: Picture) -> str:
    """The score of a picture, and of those that it was chosen from."""
    extra = picture.metadata.extra
    if "score" not in extra:
        return ""
    all_of_them = ", ".join(f"{seed}: {points:.2f}" for seed, points in extra.get("scores", ()))
    best = f", the best of {extra['best_of']} ({all_of_them})" if all_of_them else ""
    return f"  score {extra['score']:.2f}{best}"
