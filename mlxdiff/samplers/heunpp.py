"""Heun++: a step along the mean of up to three slopes, weighted by their noise levels.

A step looks two levels ahead by Euler steps. With d, d_2 and d_3 the slopes at its start, at its
end and one level further, and top the run's highest sigma, it follows

    (1 - w_2 - w_3) d + w_2 d_2 + w_3 d_3,   w_2 = sigma_2 / (3 top),   w_3 = sigma_3 / (3 top)

The step before the last looks one level ahead (w_2 = sigma_2 / (2 top)), the last one is Euler's.
The weights do not sum up Taylor's series, so the order is 1.

Source: sd-webui-samplers-scheduler (Carzit, MIT licence); there is no paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.euler import grid as sigma_grid
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import SIGMA_SPACINGS, SPACED, Grid, Sampler, Scheduler, ve_terms


def _grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    """Return the levels of all evaluations: each step's own and up to two ahead."""
    once = sigma_grid(arguments, steps, custom)
    indices = [index for step in _stages(len(once.timesteps)) for index in step]
    sigmas = once.levels()
    return Grid(
        once.schedule,
        once.timesteps[indices],
        np.array([*(sigmas[index] for index in indices), sigmas[-1]], np.float32),
        once.init_noise_sigma,
        starts=tuple(np.cumsum([0, *map(len, _stages(len(once.timesteps)))])[:-1].tolist()),
    )


def _stages(count: int) -> list[range]:
    """Return the levels that each of `count` steps evaluates."""
    return [range(k, min(k + 3, count)) for k in range(count)]


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas = grid.levels()
    top = sigmas[start]
    steps = [range(a, b) for a, b in pairwise((*grid.starts, len(grid.timesteps))) if a >= start]
    for number, stages in enumerate(steps):
        count = len(stages)
        here = sigmas[stages[0]]
        end = sigmas[steps[number + 1][0]] if number + 1 < len(steps) else sigmas[-1]
        shares = [sigmas[k] / (count * top) for k in stages[1:]]
        shares = [1.0 - sum(shares), *shares]
        for k, index in enumerate(stages):
            moves = [sigmas[a + 1] - sigmas[a] for a in stages[: k + 1]]
            if k == count - 1:
                moves = [(end - here) * share for share in shares]
            yield Row(
                timestep=float(grid.timesteps[index]),
                **ve_terms(arguments, sigmas[index], noise=True),
                anchor_x=float(k == 0),
                anchor_last=float(k > 0),
                scale=1.0,
                weights=tuple(moves[::-1]),
            )


HEUNPP = Scheduler(
    reference=None,
    defaults={**SPACED, **SIGMA_SPACINGS},
    grid=_grid,
    rows=_rows,
    takes_timesteps=True,
    takes_levels=True,
    evaluations_per_step=3,
)

SAMPLERS = (Sampler("heunpp2", "Heun++ 2", HEUNPP, also=("heun++2",)),)
