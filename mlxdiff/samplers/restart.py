"""Restart: Heun's steps, and from a low noise level back up by fresh noise and down again.

The run has fewer steps of its own. Where it has come down to about sigma 0.1, noise takes it
back to about sigma 2, and steps in Karras' spacing lead down again: once from 20 steps on (9
steps), twice from 36 on (a quarter of the steps each time). Below 20 steps it is heun. The noise
contracts the errors that the steps have made so far.

Source: Xu et al. 2023 (arXiv 2306.14878), algorithm 1; the levels and the numbers of steps are
those that AUTOMATIC1111's web UI takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.euler import grid as sigma_grid
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import SIGMA_SPACINGS, SPACED, Grid, Sampler, Scheduler, ve_terms

_LOW, _HIGH = 0.1, 2.0


def _restarts(steps: int) -> tuple[int, int]:
    """Return the steps of a restart, and the number of restarts, in a run of `steps` steps."""
    if steps < 20:
        return 0, 0
    return (9, 1) if steps < 36 else (steps // 4, 2)


def _walk(sigmas: list[float], inner: int, times: int) -> list[tuple[float, float]]:
    """Return the steps (from, to), with those of the restarts in their place."""
    steps = list(pairwise(sigmas))
    if times == 0:
        return steps
    low = min(range(1, len(sigmas)), key=lambda k: abs(sigmas[k] - _LOW))
    high = min(range(len(sigmas)), key=lambda k: abs(sigmas[k] - _HIGH))
    if high >= low or sigmas[low] == 0.0:
        return steps
    again = sch.karras(sigmas[high], sigmas[low], inner + 1).tolist()
    return [*steps[:low], *list(pairwise(again)) * times, *steps[low:]]


def _grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    """Return the levels of all evaluations; the final 0 stands at the end."""
    inner, times = _restarts(steps) if custom is None else (0, 0)
    once = sigma_grid(arguments, steps - inner * times, custom)
    walk = _walk(once.levels(), inner, times)
    sigmas: list[float] = []
    starts = []
    for here, there in walk:
        starts.append(len(sigmas))
        sigmas += [here] if there == 0.0 else [here, there]
    known = dict(zip(once.levels(), once.timesteps.tolist(), strict=False))
    between = sch.timestep_of(np.array(sigmas), once.schedule.sigmas_karras).tolist()
    timesteps = [known.get(sigma, time) for sigma, time in zip(sigmas, between, strict=True)]
    return Grid(
        once.schedule,
        np.array(timesteps, np.float32),
        np.array([*sigmas, 0.0], np.float32),
        once.init_noise_sigma,
        starts=tuple(starts),
    )


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas, count = grid.levels(), len(grid.timesteps)
    starts = {index for index in grid.starts if index >= start}
    for i, timestep in grid.evaluations(start):
        terms = ve_terms(arguments, sigmas[i], noise=True)
        there = sigmas[i + 1]
        if i in starts:
            yield Row(timestep=timestep, **terms, scale=1.0, weights=(there - sigmas[i],))
            continue
        half = (sigmas[i] - sigmas[i - 1]) / 2
        back = i + 1 < count and there > sigmas[i]
        yield Row(
            timestep=timestep,
            **terms,
            anchor_x=0.0,
            anchor_last=1.0,
            scale=1.0,
            weights=(half, half),
            noise=math.sqrt(there * there - sigmas[i] * sigmas[i]) if back else 0.0,
            draws=back,
        )


RESTART = Scheduler(
    reference=None,
    defaults={**SPACED, **SIGMA_SPACINGS},
    grid=_grid,
    rows=_rows,
    takes_timesteps=True,
    takes_levels=True,
    evaluations_per_step=2,
)

SAMPLERS = (Sampler("restart", "Restart", RESTART),)
