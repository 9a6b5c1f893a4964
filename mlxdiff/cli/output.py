"""Output of a command: files, a report, previews, progress.

A picture that is finished is not lost: it is written before the next group is drawn, and whatever
fails afterwards (a signal, a closed terminal, a full disk) comes second.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from mlxdiff.cli.preview import Preview
from mlxdiff.cli.streams import tell
from mlxdiff.errors import UsageError
from mlxdiff.machine.stopping import uninterrupted
from mlxdiff.machine.temporary import FILES, remove_leftovers
from mlxdiff.pictures.names import Template, numbered
from mlxdiff.run.options import CommandOptions

if TYPE_CHECKING:
    from mlxdiff.run.drawing import Picture, Run, Step


class Output:
    """Writes and reports the pictures of all prompts of a command.

    As a context manager it says, where something fails, how many pictures are saved.

    Args:
        options: of the command line.
        quiet: show no progress.
        prompts: the prompts, in order.
        seeds: of the pictures of each prompt.
    Raises: UsageError where the names of the files cannot be used.
    """

    def __init__(
        self, options: CommandOptions, quiet: bool, prompts: Sequence[str | None], seeds: list[int]
    ) -> None:
        self.options, self.quiet, self.seeds = options, quiet, seeds
        self.prompts = [prompt or "" for prompt in prompts]
        # Only names that nobody chose are numbered where they exist.
        self.is_numbered = options.output is None and not options.force
        several = "mlxdiff-{seed}-{index}.png" if len(prompts) > 1 else "mlxdiff-{seed}.png"
        self.template = Template(options.output or several, "--output")
        self.paths = self._name("model", 0)
        self.saved = 0
        self.lost_report: OSError | None = None  # why standard output takes no more
        self.preview: Preview | None = None
        if options.preview or options.preview_file is not None:
            every = 1 if options.preview_every is None else options.preview_every
            self.preview = Preview(options.preview_file, every, options.force)
        elif options.preview_every is not None:
            raise UsageError("--preview-every needs --preview or --preview-file")

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            if len(self.paths) > 1:
                tell(f"{self._count()}.")
        elif self.lost_report is not None:
            if isinstance(self.lost_report, BrokenPipeError):
                raise self.lost_report  # its reader has gone, as of `| head`: end quietly
            why = self.lost_report.strerror or self.lost_report
            raise UsageError(f"standard output: cannot be written ({why}); {self._count()}")

    def _count(self) -> str:
        return f"{self.saved} of {len(self.paths)} pictures are saved"

    def _name(self, model: str, steps: int) -> list[Path]:
        """Name a file for each picture. Raises: UsageError if two have the same name."""
        date = time.strftime("%Y-%m-%d")
        self.values: list[dict[str, int | str]] = [
            {
                "seed": seed,
                "index": number * len(self.seeds) + i,
                "step": steps,
                "frame": 0,
                "prompt": prompt,
                "model": model,
                "date": date,
            }
            for number, prompt in enumerate(self.prompts)
            for i, seed in enumerate(self.seeds)
        ]
        paths = [self.template.fill(**values) for values in self.values]
        if len({str(path).casefold() for path in paths}) < len(paths):
            raise UsageError(
                f"{self.template} gives {len(paths)} pictures the same name; "
                "put {index} into it" + (" or {seed}" if len(self.prompts) == 1 else "")
            )
        return paths

    def check(self, run: Run) -> None:
        """Make the folders, before anything is drawn.

        Args:
            run: of the first prompt.
        Raises: UsageError where a file cannot be written.
        """
        from mlxdiff.pictures.image import check_writable, require_right_to_write

        self.paths = self._name(run.model_name, run.steps)
        for folder in dict.fromkeys(path.parent for path in self.paths):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder, FILES)
            require_right_to_write(folder)
        for i, path in enumerate(self.paths):
            if self.is_numbered:
                self.paths[i] = next(one for one in numbered(path) if not _exists(one))
            check_writable(self.paths[i], overwrite=self.options.force)
        if self.preview is not None:
            self.preview.check(self.paths, self.values)

    def draw(self, pipe: Any, run: Run, prompt: int, start: float) -> None:
        """Draw the pictures of one prompt, write and report them.

        Args:
            pipe, run: the Pipeline, and the run of the prompt.
            prompt: which one, from 0.
            start: when the work on it began.
        """
        before = prompt * len(self.seeds)
        bar = StepBar(self.quiet)
        written = 0

        def on_step(step: Step) -> None:
            if self.preview is not None:
                self._show(pipe, step, before + step.picture)
            bar.advance(step)

        try:
            for picture in run.pictures(on_step):
                bar.finish()
                with uninterrupted():
                    written += 1  # even if it fails: it is then where the error says
                    path = self._save(picture, before + picture.index)
                self._report(run, picture, path, time.perf_counter() - start)
                start = time.perf_counter()
        except BaseException as error:
            bar.finish()
            if self.preview is not None:
                self._end_preview(keep=isinstance(error, KeyboardInterrupt))
            with contextlib.suppress(Exception):  # the first error counts
                for picture in run.rescue():
                    if picture.index >= written:
                        path = self._save(picture, before + picture.index)
                        self._report(run, picture, path, time.perf_counter() - start)
            raise
        if self.preview is not None:
            self.preview.done()

    def _show(self, pipe: Any, step: Step, index: int) -> None:
        """Show a preview. One that cannot be written is no reason to stop."""
        assert self.preview is not None
        try:
            self.preview.show(pipe, step, self.paths[index], index)
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

    def _save(self, picture: Picture, index: int) -> Path:
        """Write a picture; if that fails, write it into the temporary folder.

        Returns: its file.
        Raises: UsageError if it is not where it was asked for.
        """
        from mlxdiff.pictures.image import png_bytes, write_bytes

        text = {} if self.options.no_metadata else picture.metadata.chunks()
        data, path = png_bytes(picture.image, text), self.paths[index]
        for one in numbered(path) if self.is_numbered else (path,):
            try:
                write_bytes(data, one, overwrite=self.options.force)
            except UsageError as error:
                if self.is_numbered and _exists(one):  # made by another process just now
                    continue
                place = self._rescued(data, path)
                where = "it is lost" if place is None else f"the picture is in {place}"
                raise UsageError(f"{error}; {where}") from error
            self.saved += 1
            return one
        raise AssertionError("there is always another number")

    def _rescued(self, data: bytes, path: Path) -> Path | None:
        """Write a picture into the temporary folder. Return its file, or None if that fails too."""
        from mlxdiff.pictures.image import write_bytes

        with contextlib.suppress(OSError, UsageError):
            folder = Path(tempfile.gettempdir())
            place = next(one for one in numbered(folder / path.name) if not _exists(one))
            write_bytes(data, place)
            self.saved += 1
            return place
        return None

    def _report(self, run: Run, picture: Picture, path: Path, seconds: float) -> None:
        """Print a line for a picture. If that fails, go on drawing; ``__exit__`` says so."""
        line = f"{path}  seed {picture.seed}  {seconds:.1f} s"
        if self.options.as_json:
            line = json.dumps(record(run, picture, path, seconds))
        if self.lost_report is None:
            try:
                click.echo(line)
            except OSError as error:
                self.lost_report = error


class StepBar:
    """A progress bar on stderr for each picture; nothing where quiet, or where stderr is gone."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None

    def advance(self, step: Step) -> None:
        """Show that a step is done."""
        if self.quiet:
            return
        try:
            if self.bar is None or step.index == 0:
                self.finish()
                self.bar = click.progressbar(
                    length=step.total,
                    label=f"seed {step.seed}",
                    item_show_func=lambda s: f"{s:.2f} s/step" if s is not None else None,
                    file=sys.stderr,
                )
            self.bar.update(1, step.seconds)
            if step.index + 1 == step.total:
                self.finish()  # what comes next may print a line: the decoder is read
        except (OSError, ValueError):
            self.quiet, self.bar = True, None

    def finish(self) -> None:
        """End the bar of a picture, if there is one."""
        bar, self.bar = self.bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.render_finish()


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


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()
