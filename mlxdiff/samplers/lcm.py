"""LCM and TCD: samplers for models that were distilled to jump along the ODE in one evaluation.

A consistency model predicts x_0 itself at every noise level. LCM takes this x_0, adds fresh noise
of the next level, and evaluates the network again. TCD's model predicts any earlier time s. Its
step goes to s = (1 - eta) t' and adds noise from there up to t': eta 0 is deterministic, eta 1 is
LCM.

Both were distilled on a coarse grid of `original_inference_steps` timesteps and are valid only on
it. The timesteps of a run come from that grid. timestep_spacing, which the classes accept, changes
nothing.

Source: Luo et al. 2023 (arXiv 2310.04378), algorithm 1; Zheng et al. 2024 (arXiv 2402.19159),
algorithm 1. Equal to diffusers' LCMScheduler and TCDScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.ddim import level
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

_SIGMA_DATA = 0.5  # of the boundary condition that both were trained with


def _grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    schedule = sch.NoiseSchedule.from_arguments(arguments)
    if custom is not None:
        return Grid(schedule, custom.times.astype(np.int64))
    return Grid(schedule, np.asarray(timesteps(arguments, steps), np.int64))


def timesteps(arguments: SchedulerArguments, steps: int, strength: float = 1.0) -> list[int]:
    """Return `steps` of the timesteps that the model was distilled on, falling.

    Args:
        strength: the share of these timesteps, from the clean end on, that the run may use. LCM
            starts from a picture in this way: it runs every step, over a smaller range.
    Raises: UsageError if fewer than `steps` are left.
    """
    original = arguments.original_inference_steps
    if original > arguments.num_train_timesteps:
        raise ConfigError(
            f"scheduler_config.json: original_inference_steps is {original}, more than the "
            f"{arguments.num_train_timesteps} training timesteps"
        )
    usable = int(original * strength)
    if steps > usable:
        of = f"the first {strength:g} of " if strength < 1.0 else ""
        way_out = " or a higher strength" if strength < 1.0 else ""
        raise UsageError(
            f"steps is {steps}; {of}the {original} timesteps that the model was distilled on "
            f"(original_inference_steps of scheduler_config.json) are {usable}: take at most "
            f"{usable} steps{way_out}"
        )
    trained = np.arange(1, usable + 1) * (arguments.num_train_timesteps // original) - 1
    picked = np.floor(np.linspace(0, usable, steps, endpoint=False)).astype(np.int64)
    taken: list[int] = trained[::-1][picked].tolist()
    return taken


def _lcm_rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    known = grid.schedule.alphas_cumprod.tolist()
    times = grid.timesteps.tolist()
    for i, timestep in grid.evaluations(start):
        alpha, sigma = level(known[times[i]])
        # x_0 by the boundary condition: all of x at t = 0, almost all of the output elsewhere
        scaled = timestep * arguments.timestep_scaling
        size = scaled * scaled + _SIGMA_DATA * _SIGMA_DATA
        keep, take = _SIGMA_DATA * _SIGMA_DATA / size, scaled / math.sqrt(size)
        last = i + 1 == len(times)
        signal, noise = (1.0, 0.0) if last else level(known[times[i + 1]])
        yield Row(
            timestep=timestep,
            **vp_terms(arguments, alpha, sigma),
            scale=signal * keep,
            weights=(signal * take,),
            noise=noise,
            draws=not last,
        )


def _tcd_rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    known = grid.schedule.alphas_cumprod.tolist()
    times = grid.timesteps.tolist()
    # The class takes these arguments and neither clips nor thresholds.
    unlimited = arguments.replace(clip_sample=False, thresholding=False)
    for i, timestep in grid.evaluations(start):
        last = i + 1 == len(times)
        following = 0 if last else times[i + 1]
        between = known[math.floor(np.float32(1 - eta) * np.float32(following))]
        alpha, sigma = level(known[times[i]])
        of_x, of_output = to_noise(arguments.prediction_type, alpha, sigma)
        signal, direction = level(between)
        draws = eta > 0 and not last
        up = known[following] / between if draws else 1.0
        yield Row(
            timestep=timestep,
            **vp_terms(unlimited, alpha, sigma),
            scale=math.sqrt(up) * direction * of_x,
            output=math.sqrt(up) * direction * of_output,
            weights=(math.sqrt(up) * signal,),
            noise=math.sqrt(1 - up),
            draws=draws,
        )


_DEFAULTS = {
    **TRAINING,
    **THRESHOLDING,
    **CLIPPING,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "timestep_spacing": "leading",
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}

LCM = Scheduler(
    reference="LCMScheduler",
    defaults=_DEFAULTS,
    grid=_grid,
    rows=_lcm_rows,
    takes_timesteps=True,
    distilled_timesteps=timesteps,
)

TCD = Scheduler(
    reference="TCDScheduler",
    defaults=_DEFAULTS,
    grid=_grid,
    rows=_tcd_rows,
    takes_timesteps=True,
    has_eta=True,
)

SAMPLERS = (
    Sampler("lcm", "LCM", LCM),
    Sampler("tcd", "TCD", TCD),
)
