"""Measure the orders of accuracy of the ODE samplers, on data with a known probability flow.

    python benchmarks/sampler_orders.py    # prints slopes, draws docs/sampler_orders.png

The data are a Gaussian, or a mixture of two, on the line. Here the exact network is a formula. The
exact solution is one too: the flow of a one-dimensional density keeps every particle at its
quantile. Each sampler runs between two interior noise levels in n steps that are even in lambda =
log(alpha / sigma), without the step to zero noise, in double precision. The order is minus the
slope of log(error) over log(n). Multistep methods start with low order because they have no earlier
outputs. The exact solution corrects their first steps, so the slope is that of the method itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff import samplers
from mlxdiff.pictures import plot
from mlxdiff.samplers.dpm_fast import DPM_FAST
from mlxdiff.samplers.euler import HEUN
from mlxdiff.samplers.heunpp import HEUNPP
from mlxdiff.samplers.lcm import TCD
from mlxdiff.samplers.midpoint import KDPM2
from mlxdiff.samplers.plan import Plan
from mlxdiff.samplers.pndm import PNDM
from mlxdiff.samplers.schedule import NoiseSchedule
from mlxdiff.samplers.scheduler import Grid, Scheduler

LAMBDAS = (-1.5, 1.5)  # sigma_karras 4.5 to 0.22: the range that decides a picture
STEPS = (16, 24, 32, 48, 64, 96, 128)
PARTICLES = np.linspace(0.02, 0.98, 25)  # quantiles


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians on the line."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    def at(self, lam: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return weights, means, deviations of alpha * data + sigma * noise: (1, components)."""
        alpha, sigma = level(lam)
        spread = np.hypot(alpha * np.array(self.deviations), sigma)
        return np.array([self.weights]), alpha * np.array([self.means]), spread[None]

    def noise(self, x: np.ndarray, lam: float) -> np.ndarray:
        """Return the output of a perfect network, E[noise | x] = -sigma * score; (n,)."""
        weights, means, spread = self.at(lam)
        z = (x[:, None] - means) / spread
        density = weights / spread * np.exp(-0.5 * z * z)
        return level(lam)[1] * (density * z / spread).sum(1) / density.sum(1)

    def quantile(self, shares: np.ndarray, lam: float) -> np.ndarray:
        """Return the quantiles of the particles, which are the exact flow; by bisection."""
        weights, means, spread = self.at(lam)
        low, high = np.full(len(shares), -20.0), np.full(len(shares), 20.0)
        erf = np.vectorize(math.erf)
        for _ in range(70):
            middle = (low + high) / 2
            cumulative = (1 + erf((middle[:, None] - means) / spread / 2**0.5)) / 2
            below = (weights * cumulative).sum(1) < shares
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


GAUSSIAN = Mixture((1.0,), (0.7,), (1.5,))
TWO = Mixture((0.4, 0.6), (-0.9, 0.8), (0.45, 0.35))


@dataclass(frozen=True)
class Method:
    """A sampler under test: label, id, order, extra arguments, warm-up rows."""

    label: str
    sampler: str
    promised: int
    arguments: tuple[tuple[str, Any], ...] = ()
    warm_up: int = 0


METHODS = (
    Method("ddim", "ddim", 1),
    Method("tcd, eta 0", "tcd", 1),
    Method("euler", "euler", 1),
    Method("heun", "heun", 2),
    Method("dpmpp-2s", "dpmpp-2s", 2),
    Method("dpmpp-2m", "dpmpp-2m", 2, warm_up=1),
    Method("dpmpp-2m, heun", "dpmpp-2m", 2, (("solver_type", "heun"),), 1),
    Method("dpm-2m", "dpm-2m", 2, warm_up=1),
    Method("dpmpp-3m", "dpmpp-3m", 2, warm_up=2),
    Method("pndm", "pndm", 2, (("skip_prk_steps", True),), 4),
    Method("deis", "deis", 2, warm_up=1),
    Method("deis, order 3", "deis", 3, (("solver_order", 3),), 2),
    Method("unipc", "unipc", 3, warm_up=2),
    Method("unipc, order 3", "unipc", 4, (("solver_order", 3),), 3),
    Method("lms", "lms", 4, warm_up=3),
    Method("res-multistep", "res-multistep", 2, warm_up=1),
    Method("dpm2", "dpm2", 2),
    Method("dpm-fast", "dpm-fast", 3),
    Method("ipndm", "ipndm", 2, warm_up=3),
    Method("ipndm-v", "ipndm-v", 4, warm_up=3),
    Method("heunpp2", "heunpp2", 1),
    Method("sa-solver, tau 0", "sa-solver", 2, warm_up=2),
    Method("euler-cfg++", "euler-cfg++", 1),
    Method("dpmpp-2m-cfg++", "dpmpp-2m-cfg++", 2, warm_up=1),
)
# First order by its arguments; it has no id of its own.
FIRST_ORDER = Method("dpmpp, order 1", "dpmpp-2m", 1, (("solver_order", 1),))


def level(lam: float) -> tuple[float, float]:
    """Return (alpha, sigma) at lambda."""
    return 1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam))


def plan(method: Method, steps: int) -> tuple[Plan, np.ndarray]:
    """Return the method's rows for `steps` steps, even in lambda, and lambda at each level."""
    sampler = samplers.SAMPLERS[method.sampler]
    scheduler = sampler.scheduler
    fixed = {**sampler.arguments, **dict(method.arguments)}
    for key, value in (("lower_order_final", False), ("final_sigmas_type", "sigma_min")):
        if key in scheduler.defaults:
            fixed[key] = value
    arguments = scheduler.read({}, fixed)
    lambdas = np.linspace(*LAMBDAS, steps + 1)
    grid = _grid(scheduler, lambdas)
    if scheduler is PNDM:  # the second timestep occurs twice
        times = np.concatenate([grid.timesteps[:2], grid.timesteps[1:]])
        grid = Grid(grid.schedule, times)
    rows = tuple(scheduler.rows(arguments, grid, 0, 0.0))
    return Plan(method.sampler, "even in lambda", rows, 1.0), lambdas


def _grid(scheduler: Scheduler, lambdas: np.ndarray) -> Grid:
    """Return the levels, as their own training schedule and as sigmas."""
    steps = len(lambdas) - 1
    if scheduler is DPM_FAST:  # three evaluations in each step, also even in lambda
        lambdas = np.linspace(*LAMBDAS, 3 * steps + 1)
    schedule = NoiseSchedule(1 / (1 + np.exp(-2 * lambdas[::-1])), np.exp(-lambdas[::-1]))
    times = np.arange(len(lambdas) - 1, 0, -1)
    sigmas = np.exp(-lambdas)
    starts: tuple[int, ...] = ()
    if scheduler is DPM_FAST:
        starts = tuple(range(0, 3 * steps, 3))
    if scheduler is KDPM2:  # a middle level in every step, which its rows work out
        times, sigmas = np.repeat(times, 2), np.repeat(sigmas, 2)[1:]
    if scheduler is HEUNPP:
        ahead = [range(k, min(k + 3, steps)) for k in range(steps)]
        indices = [k for stages in ahead for k in stages]
        starts = tuple(np.cumsum([0, *map(len, ahead)])[:-1].tolist())
        times, sigmas = times[indices], np.append(sigmas[indices], sigmas[-1])
    if scheduler is HEUN:
        times, sigmas = np.repeat(times, 2)[1:], np.repeat(sigmas, 2)[1:-1]
        # unlike a run to zero noise, the last step is corrected too
        times, sigmas = np.append(times, 0), np.append(sigmas, [sigmas[-1], sigmas[-1]])
    if scheduler is TCD:
        times = np.append(times, 0)  # its last row is the identity at the lowest timestep
    return Grid(schedule, times, sigmas, starts=starts)


def error(method: Method, data: Mixture, steps: int) -> float:
    """Return the root-mean-square distance from the exact flow at the last level."""
    run, lambdas = plan(method, steps)
    levels = [math.log(row.level[0] / row.level[1]) for row in run.rows]
    exponential = run.rows[0].input_scale == 1.0  # keeps x itself; the others keep x / alpha
    x, state = data.quantile(PARTICLES, lambdas[0]), run.start()
    x = x if exponential else x / level(lambdas[0])[0]
    for i, lam in enumerate(levels):
        output = data.noise(run.scale_model_input(x, state), lam)
        x, state = run.step(x, output, state, noise=lambda: 0.0)  # sa-solver draws for nothing
        if i < method.warm_up:
            x = data.quantile(PARTICLES, levels[i + 1])
            x = x if exponential else x / level(levels[i + 1])[0]
    x = x if exponential else x * level(lambdas[-1])[0]
    return float(np.sqrt(np.mean((x - data.quantile(PARTICLES, lambdas[-1])) ** 2)))


def slope(errors: Sequence[float], steps: Sequence[int]) -> float:
    """Return minus the least-squares slope of log(error) over log(n)."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def main() -> None:
    results = {method: [error(method, TWO, n) for n in STEPS] for method in METHODS}
    print(f"{'sampler':16} promised  measured (Gaussian)   error at n = {STEPS[0]}, {STEPS[-1]}")
    for method, errors in results.items():
        single = [error(method, GAUSSIAN, n) for n in STEPS]
        print(
            f"{method.label:16} {method.promised:8} {slope(errors[2:], STEPS[2:]):9.2f} "
            f"{slope(single[2:], STEPS[2:]):9.2f}     {errors[0]:.1e}, {errors[-1]:.1e}"
        )
    lines = {
        f"{method.label}: {slope(errors[2:], STEPS[2:]):.2f}": list(zip(STEPS, errors, strict=True))
        for method, errors in results.items()
    }
    picture = plot.curves(
        lines,
        "error over steps even in lambda, on a Gaussian mixture: sampler and measured order",
        width=820,
        height=560,
        logarithmic=True,
        colours={name: method.promised - 1 for name, method in zip(lines, results, strict=True)},
    )
    target = Path(__file__).resolve().parent.parent / "docs" / "sampler_orders.png"
    picture.save(target, optimize=True)
    print(target)


if __name__ == "__main__":
    main()
