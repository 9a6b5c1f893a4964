"""Euler, Euler ancestral and Heun: Runge-Kutta steps of the probability-flow ODE in Karras' sigma.

With x / alpha as the sample the ODE is dx / dsigma = (x - x_0(x, sigma)) / sigma = noise(x, sigma):
the slope is the predicted noise itself. Euler follows this slope over the whole step. Heun averages
it with the slope at the end. The ancestral step goes below the next level and adds fresh noise to
come back up.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without churn (Heun) and its first-order
part (Euler). The ancestral step is the posterior of Ho et al. 2020 in sigma, as in k-diffusion's
sample_euler_ancestral. Equal to diffusers' EulerDiscreteScheduler,
EulerAncestralDiscreteScheduler, HeunDiscreteScheduler and EDMEulerScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.samplers import edm
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import (
    CLIPPING,
    SIGMA_SPACINGS,
    SPACED,
    Grid,
    Sampler,
    Scheduler,
    Terms,
    ve_terms,
)


def grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    """Return timesteps (float32) and sigmas of the classes that step in sigma (Euler, Heun, LMS).

    It differs from dpm_solver.grid: the spacing gives n timesteps, fractional ones stay fractional,
    and a spacing of sigmas runs between the sigmas of those timesteps.
    """
    schedule = sch.NoiseSchedule.from_arguments(arguments, keep_finite=True)
    known = schedule.sigmas_karras
    times = sch.spaced(arguments, steps) if custom is None else custom.times
    times = times.astype(np.float32)
    if custom is not None:
        sigmas = custom.sigmas
    elif arguments.get("interpolation_type") == "log_linear":
        ends = np.log(known[[-1, 0]])
        sigmas = np.exp(sch.linspace(ends[0], ends[1], steps + 1)).astype(np.float64)
    else:
        sigmas = np.interp(times, np.arange(len(known)), known)
    spacing = sch.sigma_spacing(arguments)
    if spacing is not None and custom is None:
        highest, lowest = sch.sigma_range(arguments, float(sigmas[0]), float(sigmas[-1]))
        sigmas = spacing(highest, lowest, steps)
        times = sch.timestep_of(sigmas, known).astype(np.float32)
    final = known[0] if arguments.get("final_sigmas_type") == "sigma_min" else 0.0
    sigmas = np.append(sigmas, final).astype(np.float32)
    if (
        arguments.get("timestep_type") == "continuous"
        and arguments.prediction_type == "v_prediction"
    ):
        if custom is not None:
            raise UsageError("this schedule needs a model with discrete timesteps; leave it out")
        times = np.float32(0.25) * np.log(sigmas[:-1])
    top = sigmas.max()
    if arguments.timestep_spacing == "leading":  # as if x_0 had the variance 1, not 0
        top = np.sqrt(top * top + np.float32(1))
    return Grid(schedule, times, sigmas, float(top))


def _rows(
    terms: Terms, arguments: SchedulerArguments, grid: Grid, start: int, eta: float
) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        yield Row(
            timestep=timestep,
            **terms(arguments, sigmas[i], noise=True),
            scale=1.0,
            weights=(sigmas[i + 1] - sigmas[i],),
        )


def _ancestral_rows(
    arguments: SchedulerArguments, grid: Grid, start: int, eta: float
) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        here, there = sigmas[i], sigmas[i + 1]
        up = there / here * math.sqrt(max(here * here - there * there, 0.0))
        down = there * there / here  # sqrt(there**2 - up**2)
        yield Row(
            timestep=timestep,
            **ve_terms(arguments, here, noise=True),
            scale=1.0,
            weights=(down - here,),
            noise=up,
            draws=True,
        )


def _heun_grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    once = grid(arguments, steps, custom)
    times, sigmas = np.repeat(once.timesteps, 2)[1:], np.repeat(once.levels(), 2)[1:-1]
    return Grid(once.schedule, times, sigmas.astype(np.float32), once.init_noise_sigma)


def _heun_rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        terms = ve_terms(arguments, sigmas[i], noise=True)
        if (i - start) % 2 == 0:  # to the end of the step, along the slope at its start
            step = sigmas[i + 1] - sigmas[i]
            yield Row(timestep=timestep, **terms, scale=1.0, weights=(step,))
        else:  # again from its start, along the mean of both slopes
            half = (sigmas[i] - sigmas[i - 1]) / 2
            yield Row(
                timestep=timestep,
                **terms,
                anchor_x=0.0,
                anchor_last=1.0,
                scale=1.0,
                weights=(half, half),
            )


EULER = Scheduler(
    reference="EulerDiscreteScheduler",
    defaults={
        **SPACED,
        **SIGMA_SPACINGS,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    },
    takes_levels=True,
    grid=grid,
    rows=partial(_rows, ve_terms),
    takes_timesteps=True,
)

EDM = Scheduler(
    reference="EDMEulerScheduler",
    defaults=edm.DEFAULTS,
    choices=edm.CHOICES,
    grid=partial(edm.grid, double=True),
    rows=partial(_rows, edm.terms),
)

ANCESTRAL = Scheduler(
    reference="EulerAncestralDiscreteScheduler",
    defaults={**SPACED, "rescale_betas_zero_snr": False},
    choices={"prediction_type": ("epsilon", "v_prediction")},
    takes_levels=True,
    grid=grid,
    rows=_ancestral_rows,
)

HEUN = Scheduler(
    reference="HeunDiscreteScheduler",
    defaults={**SPACED, **SIGMA_SPACINGS, **CLIPPING, "beta_start": 0.00085, "beta_end": 0.012},
    choices={"beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "exp")},
    takes_levels=True,
    grid=_heun_grid,
    rows=_heun_rows,
    takes_timesteps=True,
    evaluations_per_step=2,
)

SAMPLERS = (
    Sampler("euler", "Euler", EULER, also=("k_euler",), edm=EDM),
    Sampler(
        "euler-a", "Euler a", ANCESTRAL, also=("euler_ancestral", "euler ancestral", "k_euler_a")
    ),
    Sampler("heun", "Heun", HEUN, also=("k_heun",)),
)
