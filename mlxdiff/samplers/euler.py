"""Euler, Euler ancestral and Heun: Runge-Kutta steps of the probability-flow ODE in Karras' sigma.

With x / alpha as the sample the ODE is dx / dsigma = (x - x_0(x, sigma)) / sigma = noise(x, sigma):
the slope is the predicted noise itself. Euler follows it over the whole step; Heun averages it with
the slope at the end; the ancestral step goes lower than it must and adds fresh noise to come back
up.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without churn (Heun) and its first-order
part (Euler); the ancestral step is Ho et al. 2020's posterior in sigma, as k-diffusion's
sample_euler_ancestral has it. Equal to diffusers' EulerDiscreteScheduler,
EulerAncestralDiscreteScheduler and HeunDiscreteScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.family import CLIPPING, SIGMA_SPACINGS, TRAINING, Family, Grid, data_terms
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.settings import Settings


def grid(settings: Settings, steps: int, custom: Sequence[int] | None) -> Grid:
    """Timesteps (float32) and sigmas of the classes that step in sigma (Euler, Heun, LMS).

    Other than the solvers' (dpm_solver.grid): n timesteps from the spacing itself, fractional ones
    kept, and the spacings of sigmas run between the sigmas of those timesteps.
    """
    schedule = sch.NoiseSchedule.from_settings(settings, keep_finite=True)
    known = schedule.sigmas_karras
    times = sch.spaced(settings, steps) if custom is None else np.asarray(custom)
    times = times.astype(np.float32)
    if settings.get("interpolation_type") == "log_linear":
        ends = np.log(known[[-1, 0]])
        sigmas = np.exp(sch.linspace(ends[0], ends[1], steps + 1)).astype(np.float64)
    else:
        sigmas = np.interp(times, np.arange(len(known)), known)
    spacing = sch.sigma_spacing(settings)
    if spacing is not None:
        highest, lowest = sch.sigma_range(settings, float(sigmas[0]), float(sigmas[-1]))
        sigmas = spacing(highest, lowest, steps)
        times = sch.timestep_of(sigmas, known).astype(np.float32)
    final = known[0] if settings.get("final_sigmas_type") == "sigma_min" else 0.0
    sigmas = np.append(sigmas, final).astype(np.float32)
    if settings.get("timestep_type") == "continuous" and settings.prediction_type == "v_prediction":
        if custom is not None:
            raise UsageError("schedule ays needs a model with discrete timesteps")
        times = np.float32(0.25) * np.log(sigmas[:-1])
    top = sigmas.max()
    if settings.timestep_spacing == "leading":  # as if x_0 had the variance 1, not 0
        top = np.sqrt(top * top + np.float32(1))
    return Grid(schedule, times, sigmas, float(top))


def terms_at(settings: Settings, sigma_karras: float) -> dict[str, Any]:
    """The `Row` fields that a sigma decides: network input, slope, noise level."""
    alpha, sigma = sch.alpha_sigma(sigma_karras)
    return {
        "input_scale": alpha,
        "level": (1.0, sigma_karras),
        **data_terms(settings, alpha, sigma, noise=True, ve=True),
    }


def _euler_rows(settings: Settings, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in list(enumerate(grid.timesteps.tolist()))[start:]:
        yield Row(
            timestep=timestep,
            **terms_at(settings, sigmas[i]),
            scale=1.0,
            weights=(sigmas[i + 1] - sigmas[i],),
        )


def _ancestral_rows(settings: Settings, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in list(enumerate(grid.timesteps.tolist()))[start:]:
        here, there = sigmas[i], sigmas[i + 1]
        up = there / here * math.sqrt(max(here * here - there * there, 0.0))
        down = there * there / here  # sqrt(there**2 - up**2)
        yield Row(
            timestep=timestep,
            **terms_at(settings, here),
            scale=1.0,
            weights=(down - here,),
            noise=up,
            draws=True,
        )


def _heun_grid(settings: Settings, steps: int, custom: Sequence[int] | None) -> Grid:
    once = grid(settings, steps, custom)
    times, sigmas = np.repeat(once.timesteps, 2)[1:], np.repeat(once.levels(), 2)[1:-1]
    return Grid(once.schedule, times, sigmas.astype(np.float32), once.init_noise_sigma)


def _heun_rows(settings: Settings, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in list(enumerate(grid.timesteps.tolist()))[start:]:
        terms = terms_at(settings, sigmas[i])
        if (i - start) % 2 == 0:  # to the end of the step, by the slope at its start
            step = sigmas[i + 1] - sigmas[i]
            yield Row(timestep=timestep, **terms, scale=1.0, weights=(step,))
        else:  # again from its start, by the mean of both slopes
            half = (sigmas[i] - sigmas[i - 1]) / 2
            yield Row(
                timestep=timestep,
                **terms,
                anchor_x=0.0,
                anchor_last=1.0,
                scale=1.0,
                weights=(half, half),
            )


_SPACED = {**TRAINING, "timestep_spacing": "linspace", "steps_offset": 0}

EULER = Family(
    name="EulerDiscreteScheduler",
    defaults={
        **_SPACED,
        **SIGMA_SPACINGS,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    },
    grid=grid,
    rows=_euler_rows,
    takes_timesteps=True,
)

ANCESTRAL = Family(
    name="EulerAncestralDiscreteScheduler",
    defaults={**_SPACED, "rescale_betas_zero_snr": False},
    choices={"prediction_type": ("epsilon", "v_prediction")},
    grid=grid,
    rows=_ancestral_rows,
)

HEUN = Family(
    name="HeunDiscreteScheduler",
    defaults={**_SPACED, **SIGMA_SPACINGS, **CLIPPING, "beta_start": 0.00085, "beta_end": 0.012},
    choices={"beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "exp")},
    grid=_heun_grid,
    rows=_heun_rows,
    takes_timesteps=True,
    order=2,
)
