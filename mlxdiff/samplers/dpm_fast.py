"""DPM-Solver-fast: as few evaluations as asked for, in steps of third order, even in lambda.

n evaluations make n // 3 + 1 steps between the run's highest and lowest sigma. All have third order
(three evaluations) but for the last ones, which use up the rest: of orders 2 and 1 if 3 divides n,
else one of order n mod 3. There is no step to sigma 0, so a trace of noise remains.

Source: Lu et al. 2022 (arXiv 2206.00927), section 3.4 and appendix, as k-diffusion has it in
sample_dpm_fast, without fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import SPACED, Grid, Sampler, Scheduler, ve_terms


def _orders(evaluations: int) -> list[int]:
    count = evaluations // 3 + 1
    if evaluations % 3 == 0:
        return [3] * (count - 2) + [2, 1]
    return [3] * (count - 1) + [evaluations % 3]


def _grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    schedule = sch.NoiseSchedule.from_arguments(arguments, keep_finite=True)
    known = schedule.sigmas_karras
    high, low = sch.sigma_range(arguments, float(known[-1]), float(known[0]))
    orders = _orders(steps)
    ends = np.linspace(math.log(high), math.log(low), len(orders) + 1)
    logs = [
        ends[k] + (ends[k + 1] - ends[k]) * stage / order
        for k, order in enumerate(orders)
        for stage in range(order)
    ]
    sigmas = np.exp([*logs, ends[-1]])
    return Grid(
        schedule,
        sch.timestep_of(sigmas[:-1], known).astype(np.float32),
        sigmas.astype(np.float32),
        float(sigmas[0]),
        starts=tuple(np.cumsum([0, *orders])[:-1].tolist()),
    )


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas, count = grid.levels(), len(grid.timesteps)
    starts = [index for index in grid.starts if index >= start]
    for first, end in zip(starts, [*starts[1:], count], strict=True):
        for k, weights in enumerate(_stages(sigmas[first : end + 1])):
            yield Row(
                timestep=float(grid.timesteps[first + k]),
                **ve_terms(arguments, sigmas[first + k], noise=True),
                anchor_x=float(k == 0),
                anchor_last=float(k > 0),
                scale=1.0,
                weights=weights,
            )


def _stages(levels: list[float]) -> list[tuple[float, ...]]:
    """Return the weights of the noises, latest first, of each stage of a step.

    Args:
        levels: sigma of each evaluation, and of the end.
    """
    here, end = levels[0], levels[-1]
    h = math.log(here / end)
    whole = end - here  # -sigma' (e^h - 1)
    if len(levels) == 2:
        return [(whole,)]
    if len(levels) == 3:  # r = 1/2: all of the step with the noise at the middle
        return [(levels[1] - here,), (whole, 0.0)]
    # r1 = 1/3, r2 = 2/3
    part = 2 * h / 3
    inner = -levels[2] * 2 * (math.expm1(part) / part - 1)
    outer = -end * 1.5 * (math.expm1(h) / h - 1)
    return [
        (levels[1] - here,),
        (inner, levels[2] - here - inner),
        (outer, 0.0, whole - outer),
    ]


DPM_FAST = Scheduler(reference=None, defaults=SPACED, grid=_grid, rows=_rows)

SAMPLERS = (Sampler("dpm-fast", "DPM fast", DPM_FAST, also=("dpm_fast", "k_dpm_fast")),)
