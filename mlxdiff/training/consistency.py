"""Latent consistency distillation: learn where the teacher's guided ODE ends (Luo et al. 2023).

The teacher goes one step, from a timestep of a coarse grid to the one before, with guidance. The
student must predict the same x_0 from both ends of that step:

    f(x, t) = c_skip(t) x + c_out(t) x_0(x, t),    c_skip = d^2 / (s^2 + d^2),
    c_out = s / sqrt(s^2 + d^2),    s = SCALING t,    d = SIGMA_DATA

f(x, 0) is x itself, so x_0 spreads from the clean end to the noisy one. The prediction at the far
end gets the gradient, the one at the near end is that of the averaged student.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxdiff.errors import UsageError, argument
from mlxdiff.training.data import Batch, Text
from mlxdiff.training.loop import Arrays, latents
from mlxdiff.training.options import DistillOptions
from mlxdiff.training.process import Draws, Process

SCALING, SIGMA_DATA = 10.0, 0.5
"""diffusers' LCMScheduler has the same: ``timestep_scaling``, ``sigma_data``."""


class Student(Protocol):
    """A network that is distilled, and its teacher."""

    def predict(
        self,
        parameters: Arrays,
        batch: Batch,
        noisy: mx.array,
        timesteps: mx.array,
        scales: np.ndarray | None = None,
    ) -> mx.array:
        """Run the student. ``scales``: the guidance scale of each example, (B,)."""
        ...

    def teach(self, batch: Batch, noisy: mx.array, timesteps: mx.array) -> mx.array:
        """Run the teacher, without guidance."""
        ...


def boundary(timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return c_skip and c_out at timesteps (B,), each (B, 1, 1, 1) float32."""
    s = SCALING * timesteps.astype(np.float64).reshape(-1, 1, 1, 1)
    total = s**2 + SIGMA_DATA**2
    return (SIGMA_DATA**2 / total).astype(np.float32), (s / np.sqrt(total)).astype(np.float32)


def grid(timesteps: int, count: int) -> np.ndarray:
    """Return the timesteps of the teacher, rising, (count,): those of diffusers' LCMScheduler."""
    return np.arange(1, count + 1) * (timesteps // count) - 1


@dataclass(frozen=True)
class Consistency:
    """The objective of latent consistency distillation: ``loop.Objective``.

    Args:
        student: what is distilled.
        process: of the teacher.
        options: guidance scales, solver, loss.
        scales: the lowest and the highest guidance scale.
        empty: the empty caption (B = 1): what guidance compares with.
    """

    student: Student
    process: Process
    options: DistillOptions
    scales: tuple[float, float]
    empty: Text

    @staticmethod
    def check(process: Process, options: DistillOptions) -> None:
        """Raise UsageError for options that the process does not allow."""
        total, count = len(process), options.solver_steps
        if 2 * count > total:
            raise UsageError(
                f"{argument('solver_steps')} is {count}; this model has {total} timesteps: take "
                f"at most {total // 2}"
            )
        if options.solver == "dpm-solver" and process.alphas_cumprod[-1] == 0:
            raise UsageError(
                f"{argument('solver', 'dpm-solver')} has no step from pure noise, where this "
                f"model begins (zero terminal SNR); take {argument('solver', 'ddim')}"
            )

    def identity(self) -> dict[str, Any]:
        """See ``loop.Objective``."""
        o = self.options
        return {
            "guidance": list(self.scales),
            "solver": o.solver,
            "solver_steps": o.solver_steps,
            "huber": o.huber,
        }

    def errors(self, parameters: Arrays, target: Arrays, batch: Batch, drawn: Draws) -> mx.array:
        """See ``loop.Objective``."""
        total, count = len(self.process), self.options.solver_steps
        far = grid(total, count)[drawn.timesteps.astype(np.int64) * count // total]
        near = np.maximum(far - total // count, 0)
        low, high = self.scales
        scales = np.float32(low) + np.float32(high - low) * drawn.uniform
        noisy = mx.array(self.process.noisy(latents(batch, drawn), drawn.noise, far))
        before = mx.stop_gradient(self.solve(batch, noisy, far, near, scales))
        goal = mx.stop_gradient(self._end(target, batch, before, near, scales))
        return loss(self._end(parameters, batch, noisy, far, scales), goal, self.options.huber)

    def _end(
        self, parameters: Arrays, batch: Batch, x: mx.array, timesteps: np.ndarray, scales: Any
    ) -> mx.array:
        """f(x, t): where the student says that the ODE ends."""
        output = self.student.predict(parameters, batch, x, mx.array(timesteps), scales)
        clean, _ = split(self.process, x, output.astype(mx.float32), timesteps)
        skip, out = boundary(timesteps)
        return mx.array(skip) * x + mx.array(out) * clean

    def solve(
        self, batch: Batch, x: mx.array, far: np.ndarray, near: np.ndarray, scales: np.ndarray
    ) -> mx.array:
        """Return the teacher's x at timesteps ``near``, from its x at ``far``; both (B,)."""
        clean, noise = self._guided(batch, x, far, scales)
        if self.options.solver == "ddim":
            signal, sigma = map(mx.array, self.process.factors(near))
            return signal * clean + sigma * noise
        # DPM-Solver++ 2S (Lu et al. 2022, algorithm 1), to the timestep nearest to the middle.
        level = half_log_snr(self.process)
        middle = np.array(
            [
                low + int(np.abs(level[low : high + 1] - (level[low] + level[high]) / 2).argmin())
                for low, high in zip(near.tolist(), far.tolist(), strict=True)
            ]
        )
        middle = np.clip(middle, np.minimum(near + 1, far - 1), far - 1)
        between = self._exponential(x, clean, far, middle)
        again, _ = self._guided(batch, between, middle, scales)
        share = (level[middle] - level[far]) / (level[near] - level[far])
        weight = mx.array((0.5 / share).astype(np.float32).reshape(-1, 1, 1, 1))
        return self._exponential(x, (1 - weight) * clean + weight * again, far, near)

    def _exponential(
        self, x: mx.array, clean: mx.array, far: np.ndarray, near: np.ndarray
    ) -> mx.array:
        """Go from ``far`` to ``near`` with a constant x_0."""
        signal, sigma = self.process.factors(far)
        to_signal, to_sigma = self.process.factors(near)
        ratio = to_sigma / sigma
        return mx.array(ratio) * x + mx.array(to_signal - ratio * signal) * clean

    def _guided(
        self, batch: Batch, x: mx.array, timesteps: np.ndarray, scales: np.ndarray
    ) -> tuple[mx.array, mx.array]:
        """Return the teacher's x_0 and noise, with guidance."""
        times = mx.array(timesteps)
        with_text = self.student.teach(batch, x, times).astype(mx.float32)
        without = self.student.teach(uncaptioned(batch, self.empty), x, times).astype(mx.float32)
        scale = mx.array(scales.reshape(-1, 1, 1, 1))
        return split(self.process, x, without + scale * (with_text - without), timesteps)


def split(
    process: Process, x: mx.array, output: mx.array, timesteps: np.ndarray
) -> tuple[mx.array, mx.array]:
    """Return x_0 and noise that a network's output says of x at timesteps (B,)."""
    signal, sigma = map(mx.array, process.factors(timesteps))
    if process.prediction == "epsilon":
        return (x - sigma * output) / signal, output
    if process.prediction == "sample":
        return output, (x - signal * output) / sigma
    return signal * x - sigma * output, sigma * x + signal * output


def loss(found: mx.array, goal: mx.array, huber: float | None) -> mx.array:
    """Return the error of each example, (B,): squared, or pseudo-Huber sqrt(e^2 + c^2) - c."""
    squared = mx.square(found - goal)
    if huber is not None:
        squared = mx.sqrt(squared + huber**2) - huber
    return squared.mean(axis=(1, 2, 3))


def half_log_snr(process: Process) -> np.ndarray:
    """Return log(signal / noise) at all timesteps, (T,) float64: DPM-Solver's time."""
    a = process.alphas_cumprod.astype(np.float64)
    with np.errstate(divide="ignore"):
        found: np.ndarray = 0.5 * np.log(a / (1 - a))
    return found


def uncaptioned(batch: Batch, empty: Text) -> Batch:
    """Return a batch with the empty caption in all rows."""
    count = len(batch.mean)
    pooled = None if empty.pooled is None else np.repeat(empty.pooled, count, 0)
    return replace(batch, text=Text(np.repeat(empty.states, count, 0), pooled))


__all__ = ["Consistency", "Student", "boundary", "grid", "loss", "split"]
