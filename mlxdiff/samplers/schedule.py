"""Noise schedules: the noise levels of the training, and the noise levels of a run.

`NoiseSchedule` holds the training side: betas (Ho et al. 2020), their products and Karras' sigma
for every training timestep. The functions below choose the timesteps and sigmas of a run. All
arrays have the same float32 and float64 roundings as in diffusers: a timestep is a rounded number,
so a difference of one bit can change it.

Two sigmas never share a name here: `sigma_karras` = sqrt((1 - a) / a) grows to about 14.6 in Stable
Diffusion and is what diffusers' `scheduler.sigmas` holds; `sigma` = sqrt(1 - a) is the standard
deviation of the noise in x_t. With `alpha` = sqrt(a), sigma_karras = sigma / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers.arguments import SchedulerArguments

_F32 = np.float32


@dataclass(frozen=True)
class Levels:
    """Noise levels of a run that no argument of a scheduler class describes.

    Attributes:
        times: training timesteps, not always whole: (n,) float64, falling.
        sigmas: Karras' sigma of each, without the final one: (n,) float64.
    """

    times: np.ndarray
    sigmas: np.ndarray

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of the training timesteps 0 .. T-1.

    Attributes:
        alphas_cumprod: a_t, the product of (1 - beta) up to t: (T,) float32, falling from nearly 1.
        sigmas_karras: sqrt((1 - a_t) / a_t): (T,) float32, rising.
    """

    alphas_cumprod: np.ndarray
    sigmas_karras: np.ndarray

    @classmethod
    def from_arguments(
        cls, arguments: SchedulerArguments, *, keep_finite: bool = False
    ) -> NoiseSchedule:
        """Return the schedule that `arguments` describe.

        Args:
            keep_finite: with zero terminal SNR the last a_t is 0 and its sigma_karras infinite. The
                classes that work in sigmas replace it by 2**-24 (sigma_karras 4096).
        """
        betas = _betas(arguments)
        zero_snr = arguments.get("rescale_betas_zero_snr", False)
        if zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        alphas_cumprod = _cumprod(_F32(1) - betas)
        if zero_snr and keep_finite:
            alphas_cumprod[-1] = 2.0**-24
        with np.errstate(divide="ignore"):
            sigmas_karras = np.sqrt((_F32(1) - alphas_cumprod) / alphas_cumprod)
        return cls(alphas_cumprod, sigmas_karras)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def at(self, times: Sequence[float]) -> Levels:
        """Return the levels at training timesteps, with sigma linear in the timestep."""
        known = self.sigmas_karras
        return Levels(np.array(times, np.float64), np.interp(times, np.arange(len(known)), known))


def alpha_sigma(sigma_karras: float) -> tuple[float, float]:
    """Return (alpha, sigma) of the variance-preserving process: alpha**2 + sigma**2 = 1."""
    alpha = 1.0 / math.sqrt(sigma_karras * sigma_karras + 1.0)
    return alpha, sigma_karras * alpha


# --- betas ----------------------------------------------------------------------------------------


def _betas(arguments: SchedulerArguments) -> np.ndarray:
    """Return beta_t of `arguments`, (T,) float32."""
    count, kind = arguments.num_train_timesteps, arguments.beta_schedule
    start, end = arguments.beta_start, arguments.beta_end
    if arguments.trained_betas is not None:
        betas = np.asarray(arguments.trained_betas, _F32)
        if betas.shape != (count,):
            raise ConfigError(
                f"scheduler_config.json: trained_betas holds {betas.size} numbers, "
                f"num_train_timesteps says {count}"
            )
        return betas
    if kind == "linear":
        return linspace(start, end, count)
    if kind == "scaled_linear":
        return linspace(start**0.5, end**0.5, count) ** 2
    if kind == "sigmoid":
        sigmoid = _F32(1) / (_F32(1) + np.exp(-linspace(-6, 6, count)))
        return sigmoid * _F32(end - start) + _F32(start)
    alpha_bar = _ALPHA_BAR[kind]
    ends = [alpha_bar(i / count) for i in range(count + 1)]
    return np.array([min(1.0 - after / before, 0.999) for before, after in pairwise(ends)], _F32)


def _laplace(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


# a(t) for t in [0, 1], of the schedules that it defines.
# squaredcos_cap_v2 is the cosine schedule of Nichol and Dhariwal 2021, equation 17.
_ALPHA_BAR: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda t: math.exp(t * -12.0),
    "laplace": _laplace,
}


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Rescale betas so that the last timestep is pure noise (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(_cumprod(_F32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    squares = root * root
    return _F32(1) - np.concatenate([squares[:1], squares[1:] / squares[:-1]])


def linspace(start: float, end: float, count: int) -> np.ndarray:
    """Return torch.linspace: a float32 step from the nearer end, then one rounding to float32."""
    if count == 1:
        return np.array([start], _F32)
    first, last = _F32(start), _F32(end)
    step = float((last - first) / _F32(count - 1))
    i = np.arange(count)
    return np.where(
        i < count // 2, float(first) + step * i, float(last) - step * (count - 1 - i)
    ).astype(_F32)


def _cumprod(values: np.ndarray) -> np.ndarray:
    """Return torch.cumprod of the CPU: double-precision products, each rounded to float32."""
    return np.cumprod(values.astype(np.float64)).astype(_F32)


# (highest, lowest, steps) -> falling sigmas, float64
SigmaSpacing = Callable[[float, float, int], np.ndarray]

# --- timesteps of a run ---------------------------------------------------------------------------


def spaced(arguments: SchedulerArguments, steps: int) -> np.ndarray:
    """Return `steps` of the training timesteps, falling, float64 (linspace: not yet rounded).

    Source: table 2 of Lin et al. 2023 (leading, trailing, linspace).
    """
    count = arguments.num_train_timesteps
    if arguments.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, steps)[::-1]
    if arguments.timestep_spacing == "leading":
        return (np.arange(steps) * (count // steps))[::-1] + float(arguments.steps_offset)
    return _trailing(count, count / steps)


def _trailing(highest: int, stride: float) -> np.ndarray:
    """Return highest - 1, then down by `stride`, rounded, to 0 at the lowest; float64.

    Where the reference's sum of strides rounds to just above 0 (for example 1000 timesteps in 61
    steps), it takes one step more, at timestep -1. This step is left out here.
    """
    times = np.arange(highest, 0, -stride).round() - 1
    return times[times >= 0]


def whole(times: np.ndarray, arguments: SchedulerArguments) -> np.ndarray:
    """Round timesteps to int64, for the classes that look up alphas_cumprod at them.

    Raises: UsageError if steps_offset moves one beyond the last (the reference: IndexError).
    """
    rounded, count = times.round().astype(np.int64), arguments.num_train_timesteps
    if rounded.max() >= count:
        raise UsageError(
            f"steps is {len(times)}: with steps_offset {arguments.steps_offset} the run would "
            f"begin at timestep {rounded.max()} of 0 to {count - 1}; take fewer steps"
        )
    return rounded


def spaced_between(
    arguments: SchedulerArguments, steps: int, last: int | None = None
) -> np.ndarray:
    """Return timesteps as `spaced`, for solvers that step between n + 1 and omit the lowest; int64.

    Args:
        last: one more than the highest timestep, where lambda_min_clipped lowers it.
    """
    count = arguments.num_train_timesteps
    last = count if last is None else last
    spacing = arguments.get("timestep_spacing", "linspace")
    if spacing == "linspace":
        times = np.linspace(0, last - 1, steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        times = (np.arange(steps + 1) * (last // (steps + 1)))[::-1][:-1] + arguments.steps_offset
    else:
        times = _trailing(last, count / steps)
    return times.astype(np.int64)


def karras(highest: float, lowest: float, steps: int) -> np.ndarray:
    """Return sigmas even in sigma**(1/7), float64 (Karras et al. 2022, equation 5, rho = 7)."""
    high, low = highest ** (1 / 7.0), lowest ** (1 / 7.0)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** 7.0


def exponential(highest: float, lowest: float, steps: int) -> np.ndarray:
    """Return sigmas even in their logarithm, float64."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))


def lu(log_highest: float, log_lowest: float, steps: int) -> np.ndarray:
    """Return sigmas even in lambda = -log(sigma_karras), from the logarithms of both ends."""
    return np.exp(log_highest + np.linspace(0, 1, steps) * (log_lowest - log_highest))


def beta(highest: float, lowest: float, steps: int) -> np.ndarray:
    """Return sigmas at quantiles of the Beta(0.6, 0.6) distribution (Lee et al. 2024); float64."""
    quantiles = [beta_quantile(q) for q in (1 - np.linspace(0, 1, steps)).tolist()]
    return np.array([lowest + quantile * (highest - lowest) for quantile in quantiles])


_SPACINGS: dict[str, SigmaSpacing] = {
    "use_karras_sigmas": karras,
    "use_lu_lambdas": lu,
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,
}


def sigma_spacing(arguments: SchedulerArguments) -> SigmaSpacing | None:
    """Return the spacing of sigmas that the arguments ask for, or None if timesteps are spaced."""
    chosen = [key for key in _SPACINGS if arguments.get(key)]
    if len(chosen) > 1 and chosen != ["use_karras_sigmas", "use_lu_lambdas"]:
        raise ConfigError(f"scheduler_config.json: only one of {' and '.join(chosen)} can be true")
    return _SPACINGS[chosen[0]] if chosen else None


def sigma_range(
    arguments: SchedulerArguments, highest: float, lowest: float
) -> tuple[float, float]:
    """Return the sigmas at the ends of a spacing: the run's, unless the file writes others."""
    high, low = arguments.sigma_max, arguments.sigma_min
    return (highest if high is None else high), (lowest if low is None else low)


def beta_quantile(q: float, shape: float = 0.6) -> float:
    """Return the q-quantile of the symmetric Beta(shape, shape) distribution, to about 1e-15.

    Up to x = 1/2 the distribution function is x**s / B times the hypergeometric series of
    2F1(s, 1 - s; s + 1; x) / s, which converges like 2**-n there. Newton's method inverts it; it
    begins at the inverse of the first term. The upper half is the mirror image.
    """
    if q > 0.5:
        return 1.0 - beta_quantile(1.0 - q, shape)
    if q <= 0.0:
        return 0.0
    complete = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    x: float = min((q * shape * complete) ** (1 / shape), 0.5)
    for _ in range(20):
        term, total, n = 1.0, 1.0 / shape, 0
        while abs(term) > 1e-18:
            term *= (1 - shape + n) / (n + 1) * x
            n += 1
            total += term / (shape + n)
        excess = x**shape * total / complete - q
        density = (x * (1 - x)) ** (shape - 1) / complete
        step = excess / density
        x = min(max(x - step, x / 4), 0.5)
        if abs(step) <= 1e-16 * x:
            break
    return x


def timestep_of(sigmas: np.ndarray, schedule_sigmas: np.ndarray) -> np.ndarray:
    """Return the (fractional) training timestep of each sigma, linear in log sigma; float64.

    Args:
        sigmas: Karras sigmas, (n,) float64.
        schedule_sigmas: NoiseSchedule.sigmas_karras, (T,) float32 rising.
    """
    logs = np.log(schedule_sigmas)
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, log_sigma, side="right") - 1, 0, len(logs) - 2)
    # The difference is rounded to float32 first, as in the reference.
    width = (logs[low] - logs[low + 1]).astype(np.float64)
    weight = np.clip((logs[low].astype(np.float64) - log_sigma) / width, 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def check_steps(steps: int, arguments: SchedulerArguments) -> None:
    """Raise UsageError unless a run of `steps` steps is possible."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"steps must be a whole number of at least 1, not {steps!r}")
    if steps > arguments.num_train_timesteps:
        raise UsageError(
            f"steps is {steps}; the model was trained on {arguments.num_train_timesteps} timesteps"
        )
