"""DDIM and DDPM: steps that take the predicted x_0 to the noise level of an earlier timestep.

DDIM: x' = sqrt(a') x_0 + sqrt(1 - a' - s**2) predicted noise + s * fresh noise, with s = eta times
the standard deviation of the forward process's posterior. Eta 0 follows the ODE, eta 1 is ancestral
sampling. DDPM draws from the posterior q(x' | x, x_0) itself.

Source: Song et al. 2020 (arXiv 2010.02502), equations 12 and 16; Ho et al. 2020 (arXiv 2006.11239),
equations 6 and 7. Equal to diffusers' DDIMScheduler and DDPMScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import (
    CLIPPING,
    THRESHOLDING,
    TRAINING,
    Grid,
    Sampler,
    Scheduler,
    to_noise,
    vp_terms,
)


def grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    """Return whole timesteps, spaced as `timestep_spacing` says, and no sigmas."""
    times = sch.spaced(arguments, steps) if custom is None else custom.times
    return Grid(sch.NoiseSchedule.from_arguments(arguments), sch.whole(times, arguments))


def level(alphas_cumprod: float) -> tuple[float, float]:
    """Return (alpha, sigma) at a product of (1 - beta)."""
    return math.sqrt(alphas_cumprod), math.sqrt(1.0 - alphas_cumprod)


def _ddim_rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    known = grid.schedule.alphas_cumprod.tolist()
    final = 1.0 if arguments.set_alpha_to_one else known[0]
    times = grid.timesteps.tolist()
    stride = len(known) // len(times)
    for timestep in times[start:]:
        here = known[timestep]
        there = known[timestep - stride] if timestep >= stride else final
        fresh = eta * math.sqrt((1 - there) / (1 - here) * (1 - here / there))
        alpha, sigma = level(here)
        of_x, of_output = to_noise(arguments.prediction_type, alpha, sigma)
        direction = math.sqrt(max(1 - there - fresh * fresh, 0.0))
        yield Row(
            timestep=timestep,
            **vp_terms(arguments, alpha, sigma),
            scale=direction * of_x,
            output=direction * of_output,
            weights=(math.sqrt(there),),
            noise=fresh,
            draws=eta > 0,
        )


def _ddpm_rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    known = grid.schedule.alphas_cumprod.tolist()
    times = grid.timesteps.tolist()
    for i, timestep in grid.evaluations(start):
        here = known[times[i]]
        there = known[times[i + 1]] if i + 1 < len(times) else 1.0
        beta = 1 - here / there
        variance = max((1 - there) / (1 - here) * beta, 1e-20)
        if arguments.variance_type == "fixed_large":
            variance = beta
        alpha, sigma = level(here)
        yield Row(
            timestep=timestep,
            **vp_terms(arguments, alpha, sigma),
            scale=math.sqrt(here / there) * (1 - there) / (1 - here),
            weights=(math.sqrt(there) * beta / (1 - here),),
            noise=math.sqrt(variance) if timestep > 0 else 0.0,
            draws=timestep > 0,
        )


_SHARED = {
    **TRAINING,
    **THRESHOLDING,
    **CLIPPING,  # the classes' own clip_sample is True; see arguments.py
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_PIXELS = {"clip_sample": True}

DDIM = Scheduler(
    reference="DDIMScheduler",
    defaults={**_SHARED, "set_alpha_to_one": True},
    grid=grid,
    rows=_ddim_rows,
    has_eta=True,
    pixel_defaults=_PIXELS,
)

DDPM = Scheduler(
    reference="DDPMScheduler",
    defaults={**_SHARED, "variance_type": "fixed_small"},
    choices={
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"),
        # null, as other classes write it, is the reference's fixed_small.
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large"),
    },
    grid=grid,
    rows=_ddpm_rows,
    takes_timesteps=True,
    pixel_defaults=_PIXELS,
)

SAMPLERS = (
    Sampler("ddim", "DDIM", DDIM),
    Sampler("ddpm", "DDPM", DDPM),
)
