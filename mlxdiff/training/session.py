"""What the commands of ``mlxdiff train`` have in common: from options to a finished run."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff._version import __version__
from mlxdiff.backends.mlx import MLXBackend
from mlxdiff.errors import UsageError, argument
from mlxdiff.loading import load
from mlxdiff.pipeline import Pipeline
from mlxdiff.store.folder import check_dest
from mlxdiff.training import log, state
from mlxdiff.training.data import Data
from mlxdiff.training.loop import Objective, Ranks, Report, Task, train
from mlxdiff.training.options import ModelOptions, TrainOptions
from mlxdiff.training.process import Process

logger = logging.getLogger("mlxdiff")


@dataclass(frozen=True)
class Session:
    """A run that is about to begin.

    Attributes:
        pipe: the model that training starts from; None: it starts from nothing.
        options: with every default filled in.
        result: where what was trained will be, without ending.
        folder: of the run: state, log, plot, cache.
    """

    pipe: Pipeline | None
    options: TrainOptions
    result: Path
    folder: Path

    def cache(self, asked: str | None) -> Path:
        """Return the folder of encoded pictures and captions. A dry run leaves nothing behind."""
        if self.options.dry_run:
            temporary = tempfile.mkdtemp(prefix="mlxdiff-")
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
            return Path(temporary)
        return self.folder / "cache" if asked is None else Path(asked)

    def facts(self, data: Data, **more: Any) -> dict[str, Any]:
        """Return what the metadata of a result say about how it was made."""
        o = self.options
        source = {} if self.pipe is None else self.pipe.model.source.provenance
        return {
            "mlxdiff": __version__,
            "base": source.get("source", ""),
            "pictures": data.sources,
            "batch": o.batch * o.accumulate,
            "learning_rate": "" if o.learning_rate is None else o.learning_rate,
            "optimizer": o.optimizer,
            "seed": o.seed,
            "min_snr_gamma": "" if o.min_snr_gamma is None else o.min_snr_gamma,
            **more,
        }

    def train(
        self,
        task: Task,
        data: Data,
        process: Process,
        *,
        facts: Mapping[str, Any],
        open_result: Callable[[list[Path]], Pipeline] | None = None,
        progress: Callable[[Mapping[str, float]], None] = lambda line: None,
        objective: Objective | None = None,
        drawing: Mapping[str, Any] | None = None,
    ) -> Report:
        """Train.

        Args:
            facts: as ``facts`` returns them.
            open_result: opens a pipeline with written results, for validation pictures.
            progress, objective: see ``loop.train``.
            drawing: how validation pictures are drawn, where not as usual.
        """
        validate = None
        o = self.options
        if o.validate_every is not None:
            if open_result is None or not o.validation_prompts:
                raise UsageError(
                    "--validate-every needs --validation-prompt: what to draw to see how it goes"
                )
            validate = Validation(task, o, self.folder, open_result, drawing or {}).draw
        return train(
            task,
            data,
            process,
            o,
            self.folder,
            self.result,
            facts=facts,
            validate=validate,
            progress=progress,
            objective=objective,
        )


@dataclass(frozen=True)
class Validation:
    """Draws the same pictures again and again, to see how training goes."""

    task: Task
    options: TrainOptions
    folder: Path
    open_result: Callable[[list[Path]], Pipeline]
    drawing: Mapping[str, Any]

    def draw(self, parameters: dict[str, np.ndarray], step: int) -> None:
        """Draw with the parameters of a step: ``validation/step-000100-1.png``, ..."""
        o, target = self.options, self.folder / "validation"
        target.mkdir(exist_ok=True)
        prompts = o.validation_prompts or ()
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".validation-") as temporary:
            files = self.task.save(parameters, Path(temporary) / "result", {"steps": step})
            pipe = self.open_result(files)
            for index, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
                asked = {"seed": o.seed + index, "steps": o.validation_steps, **self.drawing}
                found = pipe.generate(prompt, **asked)
                found.images[0].save(target / f"step-{step:06}-{index + 1}.png")


def begin(
    source: Path,
    model: ModelOptions | None,
    options: TrainOptions,
    suffix: str,
    ending: str = "",
    **loading: Any,
) -> Session:
    """Open the model, check the machine, and find the places of the result and of the run.

    Args:
        source: folder of pictures, after which the result is named.
        model: the model to start from; None: from nothing.
        options: of training.
        suffix: of the result's name: what is trained.
        ending: of the result; "": it is a folder.
        loading: other arguments of ``mlxdiff.load``.
    Raises: UsageError, and the errors of ``mlxdiff.load``.
    """
    if not source.is_dir():
        raise UsageError(f"{source}: there is no such folder; give a folder of pictures")
    name = options.output or f"{source.resolve().name}-{suffix}{ending}"
    if not name.endswith(ending):
        raise UsageError(f"output is {name!r}; expected a name that ends in {ending}")
    result = Path(name.removesuffix(ending))
    folder = result.with_name(f"{result.name}-training")
    _check_new(Path(name), folder, options)
    if not ending:
        check_dest(result, force=True)
    gpu = MLXBackend.has_gpu()
    dtype = options.dtype
    if dtype in (None, "auto"):
        dtype = "float16" if gpu else "float32"
    if dtype != "float32" and not gpu:
        raise UsageError(
            f"dtype is {dtype!r}: on a CPU, training computes in float32, which is faster there; "
            f"leave {argument('dtype')} out"
        )
    pipe = None
    if model is not None:
        pipe = load(
            model=model.model,
            quantize=model.quantize,
            backend="mlx" if gpu else "auto",
            low_memory=True,
            **loading,
        )
    return Session(pipe, replace(options, dtype=dtype), result, folder)


def _check_new(result: Path, folder: Path, options: TrainOptions) -> None:
    """Check that a run may be written there; with --force, forget the one that is there."""
    if options.resume and options.force:
        raise UsageError(f"{argument('resume')} and {argument('force')} are both given; give one")
    run = [path for path in (folder / state.FILE, folder / log.FILE) if os.path.lexists(path)]
    there = run + [path for path in (result,) if os.path.lexists(path)]
    if not there or options.resume or options.dry_run:
        return
    if not options.force:
        raise UsageError(
            f"{there[0]} already exists; go on with {argument('resume')}, replace it with "
            f"{argument('force')}, or give another {argument('output')}"
        )
    for path in run:
        path.unlink()


class Encoding:
    """Says how far the pictures are encoded, now and then.

    Args:
        say: shows a line.
        every: seconds from one line to the next.
    """

    def __init__(self, say: Callable[[str], None], every: float = 2.0) -> None:
        self._say, self._every, self._last = say, every, time.perf_counter()

    def __call__(self, done: int, total: int, name: str) -> None:
        now = time.perf_counter()
        if now - self._last >= self._every:
            self._last = now
            self._say(f"encoding pictures and captions, {done} of {total}: {name}")


class Progress:
    """Says how a run goes: loss, rate, memory, time left.

    Args:
        steps: of the run.
        say: shows a line.
        every: seconds from one line to the next.
    """

    def __init__(self, steps: int, say: Callable[[str], None], every: float = 2.0) -> None:
        self._steps, self._say, self._every = steps, say, every
        self._first: int | None = None
        self._mean, self._start, self._last = 0.0, time.perf_counter(), 0.0

    def __call__(self, line: Mapping[str, float]) -> None:
        step, now = int(line["step"]), time.perf_counter()
        if self._first is None:
            self._first, self._mean = step - 1, line["loss"]
        self._mean += 0.05 * (line["loss"] - self._mean)
        if now - self._last < self._every and step < self._steps:
            return
        self._last = now
        each = (now - self._start) / (step - self._first)
        self._say(
            f"step {step} of {self._steps}, loss {self._mean:.4f}, rate {line['rate']:.2g}, "
            f"{line['memory'] / 1e9:.2f} GB, {each:.2f} s a step, "
            f"{_duration(each * (self._steps - step))} left"
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


__all__ = ["Encoding", "Progress", "Ranks", "Session", "Validation", "begin"]
