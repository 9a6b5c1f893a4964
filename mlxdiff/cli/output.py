"""What becomes of the pictures of a command: files, a report, previews, progress."""

from __future__ import annotations

import json
import string
import sys
import time
from pathlib import Path
from typing import Any

import click

from mlxdiff.cli.preview import Preview
from mlxdiff.errors import UsageError
from mlxdiff.run.options import CommandOptions


class Output:
    """Writes and reports the pictures of all prompts of a command.

    Args:
        options: of the command line.
        quiet: show no progress.
        prompts: how many there are.
        seeds: of the pictures of each prompt.
    Raises: UsageError where the names of the files cannot be used.
    """

    def __init__(
        self, options: CommandOptions, quiet: bool, prompts: int, seeds: list[int]
    ) -> None:
        self.options, self.quiet, self.seeds = options, quiet, seeds
        self.paths = make_paths(options.output, prompts, seeds)
        self.preview: Preview | None = None
        if options.preview or options.preview_file is not None:
            every = 1 if options.preview_every is None else options.preview_every
            self.preview = Preview(options.preview_file, every, options.force)
        elif options.preview_every is not None:
            raise UsageError("--preview-every needs --preview or --preview-file")

    def check(self) -> None:
        """Make the folders. Raises: UsageError where a file cannot be written."""
        from mlxdiff.pictures.image import check_writable

        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_writable(path, overwrite=self.options.force)
        if self.preview is not None:
            self.preview.check(self.paths, self.seeds)

    def draw(self, pipe: Any, run: Any, prompt: int, start: float) -> None:
        """Draw the pictures of one prompt, write and report them.

        Args:
            pipe, run: the Pipeline, and what it has prepared.
            prompt: which one, from 0.
            start: when the work on it began.
        """
        before = prompt * len(self.seeds)
        paths = self.paths[before : before + len(self.seeds)]
        bar = StepBar(self.quiet)

        def on_step(step: Any) -> None:
            if self.preview is not None:
                self.preview.show(pipe, step, paths[step.picture], before + step.picture)
            bar.advance(step)

        try:
            result = pipe.draw(run, on_step)
        except KeyboardInterrupt:
            if self.preview is not None and (kept := self.preview.keep()) is not None:
                click.echo(f"\nThe last preview is in {kept}", err=True)
            raise
        finally:
            bar.finish()
        for picture, path in enumerate(paths):
            self._write(result, picture, path, start)
        if self.preview is not None:
            self.preview.done()

    def _write(self, result: Any, picture: int, path: Path, start: float) -> None:
        from mlxdiff.pictures.image import save_png

        metadata = result.metadata[picture]
        text = {} if self.options.no_metadata else metadata.chunks()
        save_png(result.images[picture], path, text, overwrite=self.options.force)
        seconds = time.perf_counter() - start
        if self.options.as_json:
            click.echo(json.dumps(record(result, picture, path, seconds)))
        else:
            click.echo(f"{path}  seed {metadata.seed}  {seconds:.1f} s")


class StepBar:
    """A progress bar on stderr for each picture; nothing where quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None

    def advance(self, step: Any) -> None:
        """Show that a step is done."""
        if self.quiet:
            return
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

    def finish(self) -> None:
        """End the bar of a picture, if there is one."""
        if self.bar is not None:
            self.bar.render_finish()
            self.bar = None


def make_paths(template: str | None, prompts: int, seeds: list[int]) -> list[Path]:
    """One file for each picture. Raises: UsageError."""
    if template is None:
        template = "mlxdiff-{seed}.png" if prompts == 1 else "mlxdiff-{seed}-{index}.png"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise UsageError(f"--output {template!r}: {error}; write {{{{ for a brace") from None
    if fields - {"seed", "index"}:
        raise UsageError(f"--output {template!r}: only {{seed}} and {{index}} are filled in")
    if not template.lower().endswith(".png"):
        raise UsageError(f"--output {template!r}: pictures are written as PNG; end it in .png")
    paths = [
        Path(template.format(seed=seed, index=prompt * len(seeds) + i)).expanduser()
        for prompt in range(prompts)
        for i, seed in enumerate(seeds)
    ]
    if len(set(paths)) < len(paths):
        raise UsageError(
            f"--output {template!r} gives {len(paths)} pictures the same name; "
            "put {index} into it" + (" or {seed}" if prompts == 1 else "")
        )
    return paths


def record(result: Any, picture: int, path: Path, seconds: float) -> dict[str, Any]:
    """What --json says of a picture. Seconds by stage are those of the whole run of its prompt."""
    s, metadata = result.settings, result.metadata[picture]
    stages = {k: round(v, 4) for k, v in result.timings.items() if k != "steps"}
    return {
        "path": str(path),
        "seed": metadata.seed,
        "width": result.images[picture].width,
        "height": result.images[picture].height,
        "steps": s.steps,
        "guidance": s.guidance,
        "sampler": s.sampler,
        "schedule": s.schedule,
        **metadata.extra,
        "seconds": stages | {"total": round(seconds, 4)},
        "peak_memory_bytes": result.peak_memory,
    }
