"""Definitions in a sampler's file: schedulers (data and two functions each) and samplers' ids.

A `Scheduler` is one scheduler class of diffusers, or one of our own. A `Sampler` is an id that the
user types: a scheduler and the arguments that the id fixes. docs/extending.md shows a whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxdiff.errors import ConfigError
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.plan import Limit, Row
from mlxdiff.samplers.schedule import Levels, NoiseSchedule, alpha_sigma

# Arguments that nearly every scheduler class shares, with their usual defaults.
TRAINING = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
SPACED = {**TRAINING, "timestep_spacing": "linspace", "steps_offset": 0}
SIGMA_SPACINGS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIPPING = {"clip_sample": False, "clip_sample_range": 1.0}


Terms = Callable[..., dict[str, Any]]
"""(arguments, sigma_karras, noise=...) -> the `Row` fields that a noise level decides."""


@dataclass(frozen=True)
class Grid:
    """The timesteps and noise levels of a run.

    Attributes:
        schedule: the noise schedule of the training; empty for EDM's process, which has no
            numbered timesteps.
        timesteps: the reference's `scheduler.timesteps`: int64 or float32, falling.
        sigmas: the reference's `scheduler.sigmas`, the final one included, float32; None where the
            class has none.
        init_noise_sigma: the scale of the initial noise.
        starts: index of the first evaluation of each step; (): every step has as many.
    """

    schedule: NoiseSchedule
    timesteps: np.ndarray
    sigmas: np.ndarray | None = None
    init_noise_sigma: float = 1.0
    starts: tuple[int, ...] = ()

    def levels(self) -> list[float]:
        """Return the sigmas as Python floats, for coefficients."""
        assert self.sigmas is not None
        return [float(sigma) for sigma in self.sigmas]

    def steps(self, each: int) -> tuple[int, ...]:
        """Return the index of the first evaluation of each step of `each` evaluations."""
        return self.starts or tuple(range(0, len(self.timesteps), each))

    def evaluations(self, start: int) -> list[tuple[int, float]]:
        """Return (index, timestep) of each evaluation from index `start` on, as Python numbers."""
        return list(enumerate(self.timesteps.tolist()))[start:]


@dataclass(frozen=True)
class Scheduler:
    """One scheduler class.

    Attributes:
        reference: the class of diffusers that it equals, or None where diffusers has none.
        defaults: its arguments and their defaults. A schedule exists for the scheduler if
            `defaults` holds the argument that the schedule sets.
        grid: (arguments, steps, custom levels or None) -> Grid.
        rows: (arguments, grid, start, eta) -> the rows from grid index `start` to the end. The
            start matters: multistep methods begin with low order wherever they begin.
        choices: values of an argument, where they are not the usual ones.
        takes_timesteps: True if set_timesteps accepts a list of timesteps.
        takes_levels: True if its grid takes any noise levels.
        evaluations_per_step: timesteps that one step takes (diffusers' `order`). A strength counts
            in whole steps.
        brownian: True if its noise is that of a Brownian motion unless the user says otherwise.
        has_eta: True if its step takes eta, the share of fresh noise.
        pixel_defaults: defaults that differ where the model draws pixels (see arguments.py).
        distilled_timesteps: (arguments, steps, strength) -> the timesteps of a run that begins at a
            picture, where set_timesteps takes the strength itself; else None.
    """

    reference: str | None
    defaults: Mapping[str, Any]
    grid: Callable[[SchedulerArguments, int, Levels | None], Grid]
    rows: Callable[[SchedulerArguments, Grid, int, float], Iterable[Row]]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    takes_timesteps: bool = False
    takes_levels: bool = False
    evaluations_per_step: int = 1
    brownian: bool = False
    has_eta: bool = False
    pixel_defaults: Mapping[str, Any] = field(default_factory=dict)
    distilled_timesteps: Callable[[SchedulerArguments, int, float], list[int]] | None = None

    def read(
        self,
        config: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        *,
        pixels: bool = False,
    ) -> SchedulerArguments:
        """Read a scheduler_config.json as this class does.

        Args:
            config: the JSON object.
            overrides: arguments that do not come from the file.
            pixels: True if the model draws pixels.
        Raises: ConfigError for an unknown key, a wrong type or a value that is not implemented.
        """
        defaults = {**self.defaults, **self.pixel_defaults} if pixels else self.defaults
        reader = self.reference or "mlxdiff"
        return SchedulerArguments(config, reader, defaults, overrides, self.choices)


@dataclass(frozen=True)
class Sampler:
    """A sampler that the user can name.

    Attributes:
        id: its id, for `--sampler`.
        a1111: its name in AUTOMATIC1111's web UI, or the name that fits there.
        scheduler: the scheduler behind it.
        arguments: arguments of the scheduler that the id fixes, whatever the file says.
        also: names that other programs give it, beside A1111's and the class of diffusers.
        edm: the scheduler for models with EDM's parametrisation; None: the id has none.
    """

    id: str
    a1111: str
    scheduler: Scheduler
    arguments: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    edm: Scheduler | None = None


# --- what a row is made of ------------------------------------------------------------------------


def to_x0(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Return the coefficients of x and of the output that give x_0.

    Args:
        prediction: what the output is: epsilon, v_prediction or sample.
        alpha, sigma: the level: x = alpha * x_0 + sigma * noise.
    """
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return alpha, -sigma
    if alpha == 0.0:
        raise ConfigError(
            "prediction_type epsilon says nothing about x_0 at zero signal: with "
            "rescale_betas_zero_snr this needs v_prediction, or schedule leading"
        )
    return 1.0 / alpha, -sigma / alpha


def to_noise(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Return the coefficients of x and of the output that give the noise; else as `to_x0`."""
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return sigma, alpha
    return 1.0 / sigma, -alpha / sigma


def vp_terms(
    arguments: SchedulerArguments, alpha: float, sigma: float, *, noise: bool = False
) -> dict[str, Any]:
    """Return the `Row` fields that a level decides, for a sampler that keeps x itself.

    x = alpha * x_0 + sigma * noise, "variance preserving". The row's data are x_0 or, with `noise`,
    the noise.
    """
    return {"level": (alpha, sigma), **_data(arguments, alpha, sigma, 1.0, noise)}


def ve_terms(
    arguments: SchedulerArguments, sigma_karras: float, *, noise: bool = False
) -> dict[str, Any]:
    """Return the `Row` fields that a level decides, for a sampler that keeps x / alpha.

    x / alpha = x_0 + sigma_karras * noise, "variance exploding". The row's data are x_0 or, with
    `noise`, the noise, which is the slope of the ODE in sigma_karras (euler.py).
    """
    alpha, sigma = alpha_sigma(sigma_karras)
    return {
        "input_scale": alpha,
        "level": (1.0, sigma_karras),
        **_data(arguments, alpha, sigma, alpha, noise),
    }


def _data(
    arguments: SchedulerArguments, alpha: float, sigma: float, x_scale: float, noise: bool
) -> dict[str, Any]:
    """Return the `Row` fields that turn the output into x_0 or into the noise, within the limit.

    `x_scale` turns the kept sample into x.
    """

    def kept(of_x: float, of_output: float) -> tuple[float, float]:
        return of_x * x_scale, of_output

    prediction = arguments.prediction_type
    slope = kept(*to_noise(prediction, alpha, sigma)) if noise else None
    # Next to no signal: the noise that the network predicts says nothing of x_0.
    hidden = prediction == "epsilon" and alpha < 1e-3
    if hidden and slope is not None and _limit(arguments) is None:
        return {"data": slope}
    x0 = kept(*to_x0(prediction, alpha, sigma))
    fields = limited(arguments, x0, slope, (x_scale / sigma, -alpha / sigma))
    return fields if not hidden else {**fields, "x0": (1.0, 0.0)}


def limited(
    arguments: SchedulerArguments,
    x0: tuple[float, float],
    slope: tuple[float, float] | None,
    slope_of_x0: tuple[float, float],
) -> dict[str, Any]:
    """Return the `Row` fields data, x0 and, where the arguments bound x_0, limit and after_limit.

    Args:
        x0: coefficients of the sample and of the output that give x_0.
        slope: those that give the noise, if the row's data are the noise; else None.
        slope_of_x0: coefficients of the sample and of x_0 that give the noise.
    """
    bound = _limit(arguments)
    if bound is None:
        return {"data": x0 if slope is None else slope, "x0": x0}
    after = (0.0, 1.0) if slope is None else slope_of_x0
    return {"data": x0, "x0": x0, "limit": bound, "after_limit": after}


def _limit(arguments: SchedulerArguments) -> Limit | None:
    """Return the bound on x_0 that the arguments ask for; thresholding comes before clipping."""
    if arguments.get("thresholding"):
        return Limit(arguments.sample_max_value, arguments.dynamic_thresholding_ratio)
    if arguments.get("clip_sample"):
        return Limit(arguments.clip_sample_range)
    return None
