"""Names of the files of a command: filled in, checked, numbered where they exist."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxdiff.batch.jobs import Job
from mlxdiff.errors import UsageError
from mlxdiff.machine.temporary import FILES, remove_leftovers
from mlxdiff.pictures.formats import ENDINGS
from mlxdiff.pictures.names import Template, numbered
from mlxdiff.pictures.videos import ANIMATED
from mlxdiff.run.options import CommandOptions

if TYPE_CHECKING:
    from mlxdiff.run.drawing import Run

Values = dict[str, int | str]
"""Values for the name of a file, see ``pictures.names``."""


class Names:
    """The file of each picture of all jobs.

    A name may hold what is known only with the run: the model, the number of steps. Until then it
    holds placeholders, so that two pictures of one name are refused at once.

    Args:
        options: of the command line.
        jobs: all of them, in order.
        numbers: number default names where such files exist.
    Attributes:
        paths, values: of each picture, and what is filled in.
        is_numbered: a name that exists gets a number.
        is_checked: the names of all jobs were checked.
    Raises: UsageError where the names cannot be used.
    """

    def __init__(self, options: CommandOptions, jobs: Sequence[Job], numbers: bool) -> None:
        self.options, self.jobs = options, jobs
        # Only names that nobody chose are numbered where they exist.
        self.is_numbered = numbers and options.output is None and not options.force
        # Pictures of one prompt differ by their seed, whether they are one job or several.
        seeds = [seed for job in jobs for seed in job.seeds]
        same_prompt = len({(job.line, job.labels) for job in jobs}) == 1
        self._is_one = same_prompt and len(set(seeds)) == len(seeds)
        default = "mlxdiff-{seed}" if self._is_one else "mlxdiff-{seed}-{index}"
        drawn = [job.options.get("motion_adapter") is not None for job in jobs]
        # A model may let a picture move. What it does is known when it is open (`cli.output`).
        moving = any(drawn) or any(job.options.get("image") is not None for job in jobs)
        endings = (*ENDINGS, *(one for one in ANIMATED if moving and one not in ENDINGS))
        default += ".gif" if all(drawn) else ".png"
        self.template = Template(options.output or default, "--output", endings=endings)
        self.values: list[Values] = []
        self.paths: list[Path] = []
        self._fill("model", 0)
        self.is_checked = False

    def _fill(self, model: str, steps: int) -> None:
        """Name a file for each picture. Raises: UsageError if two have the same name."""
        self.values = [_values(job, i, model, steps) for job in self.jobs for i in range(job.count)]
        self.paths = [self.template.fill(**one) for one in self.values]
        if len({str(path).casefold() for path in self.paths}) < len(self.paths):
            raise UsageError(
                f"{self.template} gives {len(self.paths)} pictures the same name; "
                "put {index} into it" + (" or {seed}" if self._is_one else "")
            )

    def check(self, run: Run, job: Job) -> None:
        """Name the files of a job, make their folders, and see that they can be written.

        The first time all jobs are named and checked, as if their runs had the same model and
        number of steps.
        Raises: UsageError.
        """
        facts = run.model_name, run.steps
        if not self.is_checked:
            self.is_checked = True
            self._fill(*facts)
            self._prepare(range(len(self.paths)))
            return
        places = range(job.first, job.first + job.count)
        for picture, index in enumerate(places):
            values = _values(job, picture, *facts)
            if values != self.values[index]:
                self.values[index], self.paths[index] = values, self.template.fill(**values)
                self._prepare([index])

    def files(self, index: int, frames: int | None) -> list[Path]:
        """The files of a picture, or of a video of so many frames: one, or one for each frame."""
        if frames is None or "frame" not in self.template.fields:
            return [self.paths[index]]
        values = self.values[index]
        return [self.template.fill(**{**values, "frame": frame}) for frame in range(frames)]

    def check_video(self, index: int, frames: int) -> None:
        """See that the files of a video can be written. Raises: UsageError."""
        from mlxdiff.pictures.image import check_writable
        from mlxdiff.pictures.videos import require_writer

        files = self.files(index, frames)
        if "frame" not in self.template.fields:
            require_writer(self.paths[index])
        for path in files[1:]:
            check_writable(path, self.options.force or self.options.resume, tuple(ENDINGS))

    def _prepare(self, indices: Sequence[int]) -> None:
        """Make folders, and see that files can be written. Raises: UsageError."""
        from mlxdiff.pictures.formats import ending, require_writer
        from mlxdiff.pictures.image import check_writable, require_right_to_write

        for folder in dict.fromkeys(self.paths[index].parent for index in indices):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder, FILES)
            require_right_to_write(folder)
        replaces = self.options.force or self.options.resume
        for i in indices:
            require_writer(ending(self.paths[i]))
            if self.is_numbered:
                self.paths[i] = next(one for one in numbered(self.paths[i]) if not exists(one))
            check_writable(self.paths[i], overwrite=replaces, endings=self.template.endings)


def _values(job: Job, picture: int, model: str, steps: int) -> Values:
    """The values for the name of a picture of a job."""
    image = job.options.get("image")
    return {
        "seed": job.seeds[picture],
        "index": job.first + picture,
        "step": steps,
        "frame": 0,
        "prompt": job.options.get("prompt") or "",
        "model": model,
        "image": Path(image).stem if isinstance(image, str) else "none",
        "date": time.strftime("%Y-%m-%d"),
    }


def exists(path: Path) -> bool:
    """Return True for a file, a folder and a link, also one that leads nowhere."""
    return path.exists() or path.is_symlink()
