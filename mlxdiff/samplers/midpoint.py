"""Two-stage samplers that evaluate the network at a middle level and make the whole step with that.

The middle level lies half-way in log(sigma_karras) between both ends of the step. DPM2 takes the
noise that the network predicts there, as the midpoint rule does; DPM-Solver++ (2S) and its SDE take
x_0. An ancestral step goes below the next level and adds fresh noise to come back up. The SDE adds
noise at the middle level too, with the increments of one Brownian motion.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 2, and Lu et al. 2022 (arXiv 2206.00927 and
2211.01095), as k-diffusion joins them in sample_dpm_2, sample_dpm_2_ancestral,
sample_dpmpp_2s_ancestral and sample_dpmpp_sde. Equal to diffusers' KDPM2DiscreteScheduler,
KDPM2AncestralDiscreteScheduler and DPMSolverSDEScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.euler import grid as sigma_grid
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import (
    SIGMA_SPACINGS,
    SPACED,
    Grid,
    Sampler,
    Scheduler,
    ve_terms,
)

Middle = Callable[[float, float], float]
"""(sigma at the start, sigma at the end of a step) -> the middle level."""


def ancestral(here: float, there: float) -> tuple[float, float]:
    """Return (down, up): the level to step down to, and the noise that leads up from it.

    down**2 + up**2 = there**2, and the noise has the variance of Ho et al.'s posterior.
    """
    up = there / here * math.sqrt(max(here * here - there * there, 0.0))
    return there * there / here, up


def _between(here: float, there: float) -> float:
    return math.sqrt(here * there)


def _below(here: float, there: float) -> float:
    return math.sqrt(here * ancestral(here, there)[0])


def two_stage_grid(
    middle: Middle,
    ends: int,
    arguments: SchedulerArguments,
    steps: int,
    custom: sch.Levels | None,
    *,
    round_karras: bool = False,
    own_range: bool = False,
) -> Grid:
    """Return the grid of n steps with a middle level each, but for the last one, to sigma 0.

    Args:
        middle: gives the middle level of a step.
        ends: how often the final sigma stands in the reference's sigmas.
        round_karras: round the timesteps of Karras' spacing.
        own_range: ignore the file's sigma_min and sigma_max in Karras' spacing.
    """
    karras = arguments.use_karras_sigmas
    if own_range and karras:
        arguments = arguments.replace(sigma_min=None, sigma_max=None)
    once = sigma_grid(arguments, steps, custom)
    whole = once.timesteps.round() if round_karras and karras and custom is None else once.timesteps
    levels = once.levels()
    middles = np.array([middle(here, there) for here, there in pairwise(levels[:-1])])
    times = np.repeat(whole, 2)[:-1]
    times[1::2] = sch.timestep_of(middles, once.schedule.sigmas_karras)
    sigmas = [*np.repeat(levels[:-1], 2)[1:], *[levels[-1]] * ends]
    return Grid(
        once.schedule, times.astype(np.float32), np.array(sigmas, np.float32), once.init_noise_sigma
    )


def _rows(
    arguments: SchedulerArguments,
    grid: Grid,
    start: int,
    eta: float,
    *,
    noise: bool,
    middle: Middle,
    draws: bool = False,
    brownian: bool = False,
) -> Iterator[Row]:
    """Yield the rows from index `start` on, which begins a step.

    Args:
        noise: take the noise at the middle level, not x_0.
        middle: gives the middle level of a step.
        draws: make ancestral steps.
        brownian: the noise belongs to a Brownian motion, also at the middle level.
    """
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        here, there = sigmas[i - i % 2], sigmas[i - i % 2 + 1]
        if there == 0.0:  # the last step has one stage
            yield Row(
                timestep=timestep,
                **ve_terms(arguments, here, noise=noise),
                **_move(here, there, noise),
            )
            continue
        at = middle(here, there)
        first = i % 2 == 0
        end = at if first else there
        drawing = draws and (brownian or not first)
        target, up = ancestral(here, end) if drawing else (end, 0.0)
        yield Row(
            timestep=timestep,
            **ve_terms(arguments, here if first else at, noise=noise),
            **_move(here, target, noise),
            anchor_x=float(first),
            anchor_last=float(not first),
            noise=up,
            draws=drawing,
            between=_in_float32(here, there, first) if brownian and drawing else (),
        )


def _in_float32(here: float, there: float, first: bool) -> tuple[float, float]:
    """Return the sigmas of a step's noise as k-diffusion computes them: float32, by way of lambda.

    A Brownian motion over 1e-6 is 1e-3 large, so its numbers notice the last bit of a sigma.
    """
    start, end = -np.log(np.array([here, there], np.float32))
    if first:
        end = start + (end - start) * np.float32(0.5)
    return float(np.exp(-start)), float(np.exp(-end))


def _move(here: float, target: float, noise: bool) -> dict[str, Any]:
    """Return scale and weights of the step from `here` to `target`."""
    if noise:
        return {"scale": 1.0, "weights": (target - here,)}
    return {"scale": target / here, "weights": (1.0 - target / here,)}


_CHOICES = {"prediction_type": ("epsilon", "v_prediction")}
_DEFAULTS = {**SPACED, **SIGMA_SPACINGS, "beta_start": 0.00085, "beta_end": 0.012}

KDPM2 = Scheduler(
    reference="KDPM2DiscreteScheduler",
    defaults=_DEFAULTS,
    choices=_CHOICES,
    grid=partial(two_stage_grid, _between, 3, round_karras=True),
    rows=partial(_rows, noise=True, middle=_between),
    takes_levels=True,
    evaluations_per_step=2,
)

KDPM2_ANCESTRAL = Scheduler(
    reference="KDPM2AncestralDiscreteScheduler",
    defaults=_DEFAULTS,
    choices=_CHOICES,
    grid=partial(two_stage_grid, _below, 3, round_karras=True),
    rows=partial(_rows, noise=True, middle=_below, draws=True),
    takes_levels=True,
    evaluations_per_step=2,
)

ANCESTRAL_2S = Scheduler(
    reference=None,
    defaults={**SPACED, **SIGMA_SPACINGS},
    grid=partial(two_stage_grid, _below, 1),
    rows=partial(_rows, noise=False, middle=_below, draws=True),
    takes_timesteps=True,
    takes_levels=True,
    evaluations_per_step=2,
)

SDE = Scheduler(
    reference="DPMSolverSDEScheduler",
    defaults={**_DEFAULTS, "noise_sampler_seed": None},
    choices=_CHOICES,
    grid=partial(two_stage_grid, _between, 1, own_range=True),
    rows=partial(_rows, noise=False, middle=_between, draws=True, brownian=True),
    takes_levels=True,
    evaluations_per_step=2,
    brownian=True,
)

SAMPLERS = (
    Sampler("dpm2", "DPM2", KDPM2, also=("dpm_2", "k_dpm_2")),
    Sampler("dpm2-a", "DPM2 a", KDPM2_ANCESTRAL, also=("dpm_2_ancestral", "k_dpm_2_a")),
    Sampler("dpmpp-2s-a", "DPM++ 2S a", ANCESTRAL_2S, also=("dpmpp_2s_ancestral", "k_dpmpp_2s_a")),
    Sampler("dpmpp-sde", "DPM++ SDE", SDE, also=("k_dpmpp_sde", "dpmpp_sde_gpu")),
)
