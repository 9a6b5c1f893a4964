"""EDM: the parametrisation of Karras et al. 2022, with which Playground 2.5 and CosXL were trained.

The kept sample is x = x_0 + sigma * noise, at every sigma from sigma_max down to sigma_min. The
network sees the sample at unit variance and the noise level as a number near 0, and the output is a
part of x_0 only (table 1 of the paper; s is sigma_data, the standard deviation of x_0):

    input = x / sqrt(sigma^2 + s^2)              timestep = log(sigma) / 4
    x_0   = s^2 / (sigma^2 + s^2) x + sigma s / sqrt(sigma^2 + s^2) output

With prediction_type v_prediction the second term is subtracted.

Source: arXiv 2206.00364. Equal to diffusers' EDMEulerScheduler and EDMDPMSolverMultistepScheduler.
euler.py and dpm_solver.py hold the solvers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.scheduler import Grid, limited

DEFAULTS: dict[str, Any] = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
"""Arguments that the classes share."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "sigma_schedule": ("karras", "exponential"),
    "prediction_type": ("epsilon", "v_prediction"),
}


def level(sigma: float) -> tuple[float, float]:
    """Return (signal, noise) of the process at a sigma: the signal is not scaled."""
    return 1.0, sigma


def grid(
    arguments: SchedulerArguments,
    steps: int,
    custom: sch.Levels | None,
    *,
    double: bool = False,
) -> Grid:
    """Return timesteps (float32: log(sigma) / 4) and sigmas.

    Args:
        double: space the sigmas in float64, and end at the run's own last sigma where
            final_sigmas_type is sigma_min, as EDMEulerScheduler does. Else in float32, and end at
            sigma_min.
    Raises: ConfigError for impossible noise levels; UsageError for too few steps.
    """
    low, high, rho = arguments.sigma_min, arguments.sigma_max, arguments.rho
    _check(arguments)
    if arguments.sigma_schedule == "exponential":
        if steps < 2:
            raise UsageError("this model's exponential noise levels need at least 2 steps")
        # The reference computes the logarithms in float32 in both classes.
        sigmas = np.exp(sch.linspace(math.log(low), math.log(high), steps))[::-1]
    else:
        kind = np.float64 if double else np.float32
        ramp = np.linspace(0, 1, steps) if double else sch.linspace(0, 1, steps)
        first, last = high ** (1 / rho), low ** (1 / rho)
        sigmas = (kind(first) + ramp * kind(last - first)).astype(np.float64) ** rho
    sigmas = sigmas.astype(np.float32)
    final = 0.0
    if arguments.final_sigmas_type == "sigma_min":
        final = float(sigmas[-1]) if double else low
    numbered = np.empty(0, np.float32)
    return Grid(
        sch.NoiseSchedule(numbered, numbered),
        np.float32(0.25) * np.log(sigmas),
        np.append(sigmas, np.float32(final)),
        math.hypot(high, 1.0),
    )


def terms(arguments: SchedulerArguments, sigma: float, *, noise: bool = False) -> dict[str, Any]:
    """Return the `Row` fields that a sigma decides; the counterpart of scheduler.ve_terms.

    The row's data are x_0 or, with `noise`, the noise, which is the slope of the ODE in sigma.
    """
    data = arguments.sigma_data
    size = math.hypot(sigma, data)
    sign = -1.0 if arguments.prediction_type == "v_prediction" else 1.0
    x0 = (data / size) ** 2, sign * sigma * data / size
    slope = sigma / size**2, -x0[1] / sigma  # (x - x_0) / sigma
    fields = limited(arguments, x0, slope if noise else None, (1.0 / sigma, -1.0 / sigma))
    return {"input_scale": 1.0 / size, "level": level(sigma), **fields}


def _check(arguments: SchedulerArguments) -> None:
    """Raise ConfigError unless the noise levels fall from sigma_max to sigma_min above 0."""
    low, high = arguments.sigma_min, arguments.sigma_max
    if not 0.0 < low < high < math.inf:
        raise ConfigError(
            f"scheduler_config.json: sigma_min is {low:g} and sigma_max {high:g}; expected "
            "0 < sigma_min < sigma_max"
        )
    for key in ("sigma_data", "rho"):
        if not 0.0 < arguments[key] < math.inf:
            raise ConfigError(f"scheduler_config.json: {key} is {arguments[key]:g}; expected > 0")
