"""CFG++: steps to the guided x_0 whose noise comes from the prediction without the prompt.

With x_0 guided, d the noise that the network predicts for the negative prompt and u the x_0 of
that prediction, all with x / alpha as the sample:

    euler-cfg++:      x' = x_0 + sigma' d
    euler-a-cfg++:    x' = x_0 + down d + up noise                    (as euler-a)
    dpmpp-2m-cfg++:   x' = x_0 + e^-h (x - u) + (1 - e^-h) (h / (2 h_before)) (u - u_before)

Without guidance they are euler, euler-a and dpmpp-2m. They need lower scales than the usual ones:
the paper's lambda, 0 to 1, is a guidance scale of 1 to 2 or 3 here.

Source: Chung et al. 2024 (arXiv 2406.08070), algorithms 1 and 2 and the authors' CFGpp repository.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.dpm_solver import log_ratio
from mlxdiff.samplers.euler import grid
from mlxdiff.samplers.midpoint import ancestral
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import SIGMA_SPACINGS, SPACED, Grid, Sampler, Scheduler, ve_terms


def _row(
    arguments: SchedulerArguments,
    timestep: float,
    sigma: float,
    shrink: float,
    before: float = 0.0,
    noise: float = 0.0,
    draws: bool = False,
) -> Row:
    """Return the row of x' = x_0 + shrink (x - u) + before (u - u_before) + noise."""
    terms = ve_terms(arguments, sigma)
    of_x, of_output = terms["x0"]
    weights = (before - shrink, -before) if before else (-shrink,)
    return Row(
        timestep=timestep,
        **terms,
        scale=of_x + shrink,
        output=of_output,
        weights=weights,
        noise=noise,
        draws=draws,
        unconditional=True,
    )


def _euler_rows(
    arguments: SchedulerArguments, grid: Grid, start: int, eta: float, *, draws: bool
) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        down, up = ancestral(sigmas[i], sigmas[i + 1]) if draws else (sigmas[i + 1], 0.0)
        yield _row(arguments, timestep, sigmas[i], down / sigmas[i], noise=up, draws=draws)


def _multistep_rows(
    arguments: SchedulerArguments, grid: Grid, start: int, eta: float
) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        shrink, before = sigmas[i + 1] / sigmas[i], 0.0
        if i > start and sigmas[i + 1] > 0.0 and sigmas[i] < sigmas[i - 1]:
            h = log_ratio(sigmas[i], sigmas[i + 1])
            before = -math.expm1(-h) * h / (2 * log_ratio(sigmas[i - 1], sigmas[i]))
        yield _row(arguments, timestep, sigmas[i], shrink, before)


def _scheduler(
    rows: Callable[[SchedulerArguments, Grid, int, float], Iterable[Row]],
) -> Scheduler:
    return Scheduler(
        reference=None,
        defaults={**SPACED, **SIGMA_SPACINGS},
        grid=grid,
        rows=rows,
        takes_timesteps=True,
        takes_levels=True,
    )


SAMPLERS = (
    Sampler(
        "euler-cfg++",
        "Euler CFG++",
        _scheduler(partial(_euler_rows, draws=False)),
        also=("euler_cfg_pp",),
    ),
    Sampler(
        "euler-a-cfg++",
        "Euler a CFG++",
        _scheduler(partial(_euler_rows, draws=True)),
        also=("euler_ancestral_cfg_pp", "euler_a_cfg_pp"),
    ),
    Sampler(
        "dpmpp-2m-cfg++",
        "DPM++ 2M CFG++",
        _scheduler(_multistep_rows),
        also=("dpmpp_2m_cfg_pp",),
    ),
)
