"""Train anything that can be trained: gradients, updates, averages, checkpoints, a log.

Every random number of a step follows from seed and step, and the state of a run holds all else. So
a run that was killed and goes on gives the same numbers as one that was not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxdiff.errors import UsageError, argument
from mlxdiff.training import optimizers, state
from mlxdiff.training.data import Batch, Data, Text
from mlxdiff.training.log import Log
from mlxdiff.training.options import DEFAULT_RATES, TrainOptions
from mlxdiff.training.process import Draws, Process, draw
from mlxdiff.training.state import State

Arrays = dict[str, mx.array]
_KEPT_KINDS = (
    "lora",
    "distilled lora",
    "embedding",
)  # small: their results at every saved step are kept


class Task(Protocol):
    """Something that is trained.

    Attributes:
        kind: "lora", "embedding", "controlnet", "unconditional", "finetune", "distilled lora" or
            "distilled model".
    """

    @property
    def kind(self) -> str: ...

    def parameters(self) -> Arrays:
        """Return what training begins with: float32 arrays by name."""
        ...

    def predict(
        self, parameters: Arrays, batch: Batch, noisy: mx.array, timesteps: mx.array
    ) -> mx.array:
        """Run the network with these parameters.

        Args:
            noisy: (B, h, w, C) float32.
            timesteps: (B,) int32.
        Returns: (B, h, w, C) float32.
        """
        ...

    def save(
        self, parameters: Mapping[str, np.ndarray], path: Path, facts: Mapping[str, Any]
    ) -> list[Path]:
        """Write what people use; return the files. ``path`` has no ending."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what must be the same when a run goes on."""
        ...


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        steps: updates in all.
        loss: mean of the last tenth of all steps.
        seconds: that this process trained.
        peak: the most bytes that MLX held at once.
        files: what was written.
    """

    steps: int
    loss: float
    seconds: float
    peak: int
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Ranks:
    """Processes that train together, each with its own part of every batch.

    Attributes:
        group: of ``mx.distributed``; None: this process is alone.
    """

    group: Any = None

    @classmethod
    def launched(cls) -> Ranks:
        """Return the processes that ``mlx.launch`` started together with this one."""
        return cls(mx.distributed.init() if "MLX_RANK" in os.environ else None)

    @property
    def size(self) -> int:
        """The number of processes."""
        return 1 if self.group is None else int(self.group.size())

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return 0 if self.group is None else int(self.group.rank())

    def mean(self, arrays: list[mx.array]) -> list[mx.array]:
        """Return the means of arrays over all processes, in one exchange."""
        if self.size == 1:
            return arrays
        flat = mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays])
        flat = mx.distributed.all_sum(flat, group=self.group) / self.size
        ends = np.cumsum([array.size for array in arrays]).tolist()
        parts = mx.split(flat, ends[:-1])
        return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


class Objective(Protocol):
    """What training makes small."""

    def errors(self, parameters: Arrays, target: Arrays, batch: Batch, drawn: Draws) -> mx.array:
        """Return the error of each example, (B,) float32.

        Args:
            parameters: those that get the gradient.
            target: their averages, or the same without a gradient where there are none.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Return what must be the same when a run goes on."""
        ...


@dataclass(frozen=True)
class Denoising:
    """The squared error of the prediction (Ho et al. 2020)."""

    task: Task
    process: Process

    def errors(self, parameters: Arrays, target: Arrays, batch: Batch, drawn: Draws) -> mx.array:
        """See ``Objective``."""
        clean = latents(batch, drawn)
        noisy = mx.array(self.process.noisy(clean, drawn.noise, drawn.timesteps))
        prediction = self.task.predict(parameters, batch, noisy, mx.array(drawn.timesteps))
        return losses(self.process, prediction, clean, drawn.noise, drawn.timesteps)

    def identity(self) -> dict[str, Any]:
        """See ``Objective``."""
        return {}


def latents(batch: Batch, drawn: Draws) -> np.ndarray:
    """Return the latents of a batch, drawn from their distribution: (B, h, w, C) float32."""
    return batch.mean if batch.std is None else batch.mean + batch.std * drawn.encoding


def losses(
    process: Process,
    prediction: mx.array,
    clean: np.ndarray,
    noise: np.ndarray,
    timesteps: np.ndarray,
) -> mx.array:
    """Return the mean squared error of each example, (B,), in float32."""
    target = mx.array(process.target(clean, noise, timesteps))
    return mx.square(prediction.astype(mx.float32) - target).mean(axis=(1, 2, 3))


class Trainer:
    """One run, step by step. ``train`` is the whole of it.

    Args:
        task, data, process: what is trained, on what, with what noise.
        options: how.
        ranks: processes that train together.
        objective: what to make small; None: ``Denoising``.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        process: Process,
        options: TrainOptions,
        ranks: Ranks | None = None,
        objective: Objective | None = None,
    ) -> None:
        process.check_weighting(options.min_snr_gamma, options.debias)
        self.task, self.data, self.process, self.options = task, data, process, options
        self.ranks = Ranks() if ranks is None else ranks
        self.objective = Denoising(task, process) if objective is None else objective
        rate = options.learning_rate
        self.rate = DEFAULT_RATES[options.optimizer] if rate is None else rate
        parameters = task.parameters()
        self.optimizer = optimizers.make(options.optimizer, parameters, options.weight_decay)
        average = dict(parameters) if options.ema else {}
        self.state = State(0, parameters, self.optimizer.state, average)
        self._gradient = mx.value_and_grad(self._loss)
        # Small numbers vanish in float16; the loss is multiplied by this, the gradients divided.
        self._scale = 2.0**12 if options.dtype == "float16" else 1.0

    def identity(self) -> dict[str, Any]:
        """Return what must be the same when the run goes on."""
        o = self.options
        decisive = (
            *("batch", "accumulate", "optimizer", "weight_decay", "rate_schedule", "warmup"),
            *("clip", "ema", "seed", "min_snr_gamma", "debias", "offset_noise", "caption_dropout"),
        )
        own = {name: getattr(o, name) for name in decisive}
        if o.rate_schedule != "constant":
            own["steps"] = o.steps
        return {
            "kind": self.task.kind,
            **self.task.identity(),
            **self.objective.identity(),
            "pictures": self.data.digest,
            "learning_rate": self.rate,
            "processes": self.ranks.size,
            **own,
        }

    def resume(self, found: State) -> None:
        """Go on from a state."""
        missing = set(self.state.parameters) ^ set(found.parameters)
        if missing:
            raise UsageError(
                f"the saved state has other parameters ({min(missing)}); train into another folder"
            )
        self.state = found
        self.optimizer.state = found.optimizer

    def batch(self, index: int) -> tuple[Batch, Draws]:
        """Return this process's part of a batch, and its random numbers."""
        o, size, ranks = self.options, self.options.batch, self.ranks
        whole = self.data.batch(index, size * ranks.size, o.seed)
        shape = whole.mean.shape
        drawn = draw(
            o.seed,
            index,
            (shape[0], shape[1], shape[2], shape[3]),
            len(self.process),
            drop=o.caption_dropout,
            offset=o.offset_noise,
        )
        if o.caption_dropout:
            whole = without_captions(whole, self.data, drawn.dropped)
        if ranks.size == 1:
            return whole, drawn
        count = len(whole.mean) // ranks.size
        if count * ranks.size != len(whole.mean):
            raise UsageError(
                f"a batch has {len(whole.mean)} pictures, which {ranks.size} processes cannot "
                f"share; give more pictures of each size, or a smaller {argument('batch')}"
            )
        rows = slice(ranks.rank * count, (ranks.rank + 1) * count)
        return _rows(whole, rows), _rows(drawn, rows)

    def _loss(self, parameters: Arrays, batch: Batch, drawn: Draws) -> mx.array:
        o = self.options
        weights = self.process.weights(drawn.timesteps, o.min_snr_gamma, o.debias) * batch.weights
        target = self.state.average or self.state.parameters
        error = self.objective.errors(parameters, target, batch, drawn)
        return self._scale * (error * mx.array(weights.astype(np.float32))).mean()

    def gradients(self, step: int) -> tuple[float, Arrays, float]:
        """Return loss, gradients and their norm for a step, counted from 0."""
        o, parameters = self.options, self.state.parameters
        names, total, sums = list(parameters), mx.array(0.0), None
        for micro in range(o.accumulate):
            batch, drawn = self.batch(step * o.accumulate + micro)
            loss, found = self._gradient(parameters, batch, drawn)
            parts = [found[name].astype(mx.float32) for name in names]
            sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
            total = total + loss
            mx.eval(total, sums)
            del found, parts
        assert sums is not None
        factor = 1 / (o.accumulate * self._scale)
        total, *means = self.ranks.mean([total, *sums])
        gradients = {name: g * factor for name, g in zip(names, means, strict=True)}
        size = optimizers.norm(gradients)
        if o.clip:
            gradients = optimizers.clipped(gradients, size, o.clip)
        return float(total) * factor, gradients, float(size)

    def step(self) -> dict[str, float]:
        """Make one update; return the numbers of the log.

        Raises: UsageError if the loss is no number; the state is that before the step.
        """
        o, before = self.options, self.state
        rate = optimizers.rate_at(before.step, self.rate, o.rate_schedule, o.warmup, o.steps)
        loss, gradients, size = self.gradients(before.step)
        if not math.isfinite(loss) or not math.isfinite(size):
            raise UsageError(self._failed(before.step + 1, loss))
        parameters = self.optimizer.update(before.parameters, gradients, rate)
        average = before.average
        if o.ema:
            decay = min(o.ema, (1 + before.step) / (10 + before.step))
            average = {
                name: value + (1 - decay) * (parameters[name] - value)
                for name, value in average.items()
            }
        mx.eval(parameters, average, self.optimizer.state)
        self.state = State(before.step + 1, parameters, self.optimizer.state, average)
        return {"step": before.step + 1, "loss": loss, "rate": rate, "gradient": size}

    def _failed(self, step: int, loss: float) -> str:
        what = "loss" if not math.isfinite(loss) else "gradient"
        lower = [f"{argument('learning_rate')} (now {self.rate:g})"]
        if self.options.dtype in ("float16", "bfloat16"):
            lower.append(f"or compute in float32 ({argument('dtype', 'float32')})")
        if not self.options.clip:
            lower.append(f"or limit the gradients ({argument('clip', 1)})")
        return f"step {step}: the {what} is not a number any more; lower {', '.join(lower)}"

    def result(self) -> dict[str, np.ndarray]:
        """Return what was trained: the averages, if there are any."""
        found = self.state.average or self.state.parameters
        return {name: np.array(value, np.float32) for name, value in found.items()}


def train(
    task: Task,
    data: Data,
    process: Process,
    options: TrainOptions,
    folder: Path,
    result: Path,
    *,
    facts: Mapping[str, Any] | None = None,
    validate: Callable[[dict[str, np.ndarray], int], None] | None = None,
    progress: Callable[[Mapping[str, float]], None] = lambda line: None,
    ranks: Ranks | None = None,
    objective: Objective | None = None,
) -> Report:
    """Train, from the beginning or from the state in the folder.

    Args:
        task, data, process: what is trained, on what, with what noise.
        options: how.
        folder: of the run; it is made. It gets the state, a log and a plot.
        result: where what was trained is written, without ending.
        facts: about the run, for the metadata of the result.
        validate: draws pictures with the parameters of a step.
        progress: called after each step with the line of the log.
        ranks: processes that train together; None: those of ``mlx.launch``.
        objective: what to make small; None: ``Denoising``.
    Raises: UsageError, CheckpointError; OSError if the disk fails. The last state is whole then.
    """
    ranks = Ranks.launched() if ranks is None else ranks
    trainer = Trainer(task, data, process, options, ranks, objective)
    writes = trainer.ranks.rank == 0
    folder.mkdir(parents=True, exist_ok=True)
    identity = trainer.identity()
    found = state.read(folder, identity) if options.resume else None
    if found is not None:
        trainer.resume(found)
    log = Log(folder, trainer.state.step) if writes else None
    start, saved = time.perf_counter(), trainer.state.step
    mx.reset_peak_memory()
    told = {"kind": task.kind, **(facts or {})}

    def save() -> None:
        nonlocal saved
        if writes:
            state.write(trainer.state, folder, identity)
        saved = trainer.state.step

    try:
        while trainer.state.step < options.steps:
            began = time.perf_counter()
            line = trainer.step()
            step = trainer.state.step
            line["seconds"] = round(time.perf_counter() - began, 4)
            line["memory"] = mx.get_peak_memory()
            if log is not None:
                log.add(line)
            progress(line)
            if step % options.save_every == 0 or step == options.steps:
                save()
                if writes and task.kind in _KEPT_KINDS and step < options.steps:
                    task.save(trainer.result(), folder / f"step-{step:06}", {**told, "steps": step})
            if validate is not None and writes and step % (options.validate_every or step + 1) == 0:
                validate(trainer.result(), step)
    except UsageError as error:
        place = f"; step {saved} is saved in {folder}" if saved else ""
        raise UsageError(f"{error}{place}") from None
    except KeyboardInterrupt:
        save()
        raise
    files: list[Path] = []
    loss = math.nan
    if log is not None:
        files = task.save(trainer.result(), result, {**told, "steps": options.steps})
        files.append(log.plot(f"{folder.name}: loss"))
        last = [line["loss"] for line in log.lines[-max(1, len(log.lines) // 10) :]]
        loss = float(np.mean(last)) if last else math.nan
    seconds = time.perf_counter() - start
    return Report(trainer.state.step, loss, seconds, mx.get_peak_memory(), tuple(files))


def without_captions(batch: Batch, data: Data, dropped: np.ndarray) -> Batch:
    """Return a batch with the empty caption in these rows, (B,) bool."""
    if batch.text is not None and data.empty is not None:
        states = np.where(dropped[:, None, None], data.empty.states, batch.text.states)
        pooled = batch.text.pooled
        if pooled is not None and data.empty.pooled is not None:
            pooled = np.where(dropped[:, None], data.empty.pooled, pooled)
        return replace(batch, text=Text(states, pooled))
    if batch.tokens is not None and data.empty_tokens is not None:
        empty = data.empty_tokens
        tokens = {
            name: np.where(dropped[:, None], empty[name], ids) for name, ids in batch.tokens.items()
        }
        return replace(batch, tokens=tokens)
    return batch


def _rows(whole: Any, rows: slice) -> Any:
    """Some rows of all arrays of a dataclass."""

    def part(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value[rows]
        if isinstance(value, dict):
            return {name: part(one) for name, one in value.items()}
        return _rows(value, rows) if isinstance(value, Text) else value

    return replace(whole, **{name: part(value) for name, value in vars(whole).items()})
