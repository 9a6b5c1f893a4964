"""LCM and TCD: samplers for models that were distilled to jump to the end of the ODE from anywhere.

A consistency model's answer is x_0 itself, whatever the noise level. LCM takes it, adds fresh noise
of the next level, and asks again. TCD's model is trained to answer for any earlier time s, so the
step goes to s = (1 - eta) t' and only noises up from there to t': eta 0 is deterministic, eta 1 is
LCM's way.

Both were distilled on a coarse grid of `original_inference_steps` timesteps and may only be asked
there, so the timesteps come from that grid, and timestep_spacing, which the classes accept, changes
nothing.

Source: Luo et al. 2023 (arXiv 2310.04378), algorithm 1; Zheng et al. 2024 (arXiv 2402.19159),
algorithm 1. Equal to diffusers' LCMScheduler and TCDScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.ddim import level
from mlxdiff.samplers.family import (
    CLIPPING,
    THRESHOLDING,
    TRAINING,
    Family,
    Grid,
    data_terms,
    to_noise,
)
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.settings import Settings

_SIGMA_DATA = 0.5  # of the boundary condition, as both were trained


def _grid(settings: Settings, steps: int, custom: Sequence[int] | None) -> Grid:
    schedule = sch.NoiseSchedule.from_settings(settings)
    if custom is not None:
        return Grid(schedule, np.asarray(custom, np.int64))
    return Grid(schedule, np.asarray(timesteps(settings, steps), np.int64))


def timesteps(settings: Settings, steps: int, strength: float = 1.0) -> list[int]:
    """The timesteps of a run, falling: `steps` of those that the model was distilled on.

    Args:
        strength: the share of these, from the clean end on, that may be used; LCM's way to start
            from a picture (every step is run, over a shorter way).
    Raises: UsageError where there are fewer than `steps`.
    """
    original = settings.original_inference_steps
    if original > settings.num_train_timesteps:
        raise ConfigError(
            f"scheduler_config.json: original_inference_steps is {original}, more than the "
            f"{settings.num_train_timesteps} training timesteps"
        )
    usable = int(original * strength)
    if steps > usable:
        of = f"the first {strength:g} of " if strength < 1.0 else ""
        way_out = " or a higher strength" if strength < 1.0 else ""
        raise UsageError(
            f"steps is {steps}; {of}the {original} timesteps that the model was distilled on "
            f"(original_inference_steps of scheduler_config.json) are {usable}: take at most as "
            f"many steps{way_out}"
        )
    trained = np.arange(1, usable + 1) * (settings.num_train_timesteps // original) - 1
    picked = np.floor(np.linspace(0, usable, steps, endpoint=False)).astype(np.int64)
    taken: list[int] = trained[::-1][picked].tolist()
    return taken


def _lcm_rows(settings: Settings, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    known = grid.schedule.alphas_cumprod.tolist()
    times = grid.timesteps.tolist()
    for i in range(start, len(times)):
        alpha, sigma = level(known[times[i]])
        # x_0 by the boundary condition: all of x at t = 0, all of the network's word elsewhere
        scaled = times[i] * settings.timestep_scaling
        size = scaled * scaled + _SIGMA_DATA * _SIGMA_DATA
        keep, take = _SIGMA_DATA * _SIGMA_DATA / size, scaled / math.sqrt(size)
        last = i + 1 == len(times)
        signal, noise = (1.0, 0.0) if last else level(known[times[i + 1]])
        yield Row(
            timestep=times[i],
            level=(alpha, sigma),
            **data_terms(settings, alpha, sigma),
            scale=signal * keep,
            weights=(signal * take,),
            noise=noise,
            draws=not last,
        )


def _tcd_rows(settings: Settings, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    known = grid.schedule.alphas_cumprod.tolist()
    times = grid.timesteps.tolist()
    for i in range(start, len(times)):
        last = i + 1 == len(times)
        following = 0 if last else times[i + 1]
        between = known[math.floor(np.float32(1 - eta) * np.float32(following))]
        alpha, sigma = level(known[times[i]])
        of_x, of_output = to_noise(settings.prediction_type, alpha, sigma)
        signal, direction = level(between)
        draws = eta > 0 and not last
        up = known[following] / between if draws else 1.0
        yield Row(
            timestep=times[i],
            level=(alpha, sigma),
            data=data_terms(settings, alpha, sigma)[
                "data"
            ],  # this class neither clips nor thresholds
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

LCM = Family("LCMScheduler", _DEFAULTS, _grid, _lcm_rows, takes_timesteps=True)
TCD = Family("TCDScheduler", _DEFAULTS, _grid, _tcd_rows, takes_timesteps=True, has_eta=True)
