"""What a sampler's file hands in: one scheduler class of diffusers, as data and two functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxdiff.errors import ConfigError
from mlxdiff.samplers.plan import Limit, Row
from mlxdiff.samplers.schedule import NoiseSchedule
from mlxdiff.samplers.settings import Settings

# Arguments that nearly every scheduler class shares, with their usual defaults.
TRAINING = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
SIGMA_SPACINGS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIPPING = {"clip_sample": False, "clip_sample_range": 1.0}


@dataclass(frozen=True)
class Grid:
    """The timesteps and noise levels of a run.

    Attributes:
        schedule: the training side.
        timesteps: the reference's `scheduler.timesteps`: int64 or float32, falling.
        sigmas: the reference's `scheduler.sigmas`, the final one included, float32; None where the
            class has none.
        init_noise_sigma: the scale of the initial noise.
    """

    schedule: NoiseSchedule
    timesteps: np.ndarray
    sigmas: np.ndarray | None = None
    init_noise_sigma: float = 1.0

    def levels(self) -> list[float]:
        """The sigmas as Python floats, for coefficients."""
        assert self.sigmas is not None
        return self.sigmas.tolist()


@dataclass(frozen=True)
class Family:
    """One scheduler class of diffusers.

    Attributes:
        name: the class.
        defaults: its arguments and their defaults; a schedule whose argument stands here exists.
        grid: (settings, steps, custom timesteps or None) -> Grid.
        rows: (settings, grid, start, eta) -> the rows from grid index `start` to the end. The start
            matters: multistep methods begin with low order wherever they begin.
        choices: values of an argument, where they are not the usual ones.
        takes_timesteps: whether its set_timesteps accepts a list of timesteps.
        order: entries of `timesteps` per step, as diffusers' pipelines count strength.
        has_eta: whether its step takes eta, the share of fresh noise.
        pixel_defaults: defaults that differ where the model draws pixels (see settings.py).
    """

    name: str
    defaults: Mapping[str, Any]
    grid: Callable[[Settings, int, Sequence[int] | None], Grid]
    rows: Callable[[Settings, Grid, int, float], Iterable[Row]]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    takes_timesteps: bool = False
    order: int = 1
    has_eta: bool = False
    pixel_defaults: Mapping[str, Any] = field(default_factory=dict)


def limit(settings: Settings) -> Limit | None:
    """The bound on x_0 that the settings ask for, if any; thresholding comes before clipping."""
    if settings.get("thresholding"):
        return Limit(settings.sample_max_value, settings.dynamic_thresholding_ratio)
    if settings.get("clip_sample"):
        return Limit(settings.clip_sample_range)
    return None


def to_x0(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Coefficients (of x, of the output) that give x_0, where x = alpha * x_0 + sigma * noise."""
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
    """Coefficients (of x, of the output) that give the noise in x = alpha * x_0 + sigma * noise."""
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return sigma, alpha
    return 1.0 / sigma, -alpha / sigma


def data_terms(
    settings: Settings, alpha: float, sigma: float, *, noise: bool = False, ve: bool = False
) -> dict[str, Any]:
    """The `Row` fields that turn the output into x_0 (with `noise`: into the noise), limited.

    Args:
        alpha, sigma: of the variance-preserving process.
        ve: the sample is kept as x / alpha = x_0 + sigma_karras * noise ("variance exploding").
    """
    bound, x_scale = limit(settings), alpha if ve else 1.0
    convert = to_noise if noise and bound is None else to_x0
    of_x, of_output = convert(settings.prediction_type, alpha, sigma)
    terms: dict[str, Any] = {"data": (of_x * x_scale, of_output)}
    if bound is not None:
        terms["limit"] = bound
        terms["after_limit"] = (x_scale / sigma, -alpha / sigma) if noise else (0.0, 1.0)
    return terms
