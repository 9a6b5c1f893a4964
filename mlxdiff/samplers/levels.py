"""Schedules that give the noise levels themselves, whatever the scheduler class.

Sources: "Align Your Steps" (Sabour et al. 2024, arXiv 2404.14507), whose appendix also has the
KL-optimal levels; GITS (gits.py); the rest has no paper and is what programs agree on: sgm-uniform
and ddim-uniform as Stability's generative-models and latent-diffusion space timesteps, simple as
k-diffusion's users take every so many-th level, bong-tangent as in stable-diffusion.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.samplers import gits
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.schedule import (
    Levels,
    NoiseSchedule,
    SigmaSpacing,
    beta,
    exponential,
    karras,
    timestep_of,
)

_Maker = Callable[[SchedulerArguments, int, str | None], Levels]

# Timesteps for ten steps, optimised for a model family (Sabour et al. 2024, "Align Your Steps", and
# its web page).
AYS = {
    "sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}


def _known(arguments: SchedulerArguments) -> NoiseSchedule:
    return NoiseSchedule.from_arguments(arguments, keep_finite=True)


def _of_sigmas(arguments: SchedulerArguments, sigmas: Sequence[float] | np.ndarray) -> Levels:
    values = np.array(sigmas, np.float64)
    return Levels(timestep_of(values, _known(arguments).sigmas_karras), values)


def _check_trained(arguments: SchedulerArguments, schedule: str) -> None:
    if arguments.num_train_timesteps != 1000:
        raise UsageError(
            f"schedule {schedule} was made for 1000 training timesteps; "
            f"this model has {arguments.num_train_timesteps}: choose another schedule"
        )


def _ays(arguments: SchedulerArguments, steps: int, family: str | None) -> Levels:
    """Return the Align-Your-Steps levels of a model family: the ten published ones at ten steps.

    For another step count it interpolates as the authors do, between the sigmas of the ten
    timesteps and the lowest sigma of the schedule: even in their index, linear in the logarithm.
    """
    _check_trained(arguments, "ays")
    known = _known(arguments).sigmas_karras
    listed = [*AYS["sdxl" if (family or "").startswith("sdxl") else "sd"], 0]
    logs = np.log(known[listed].astype(np.float64))
    sigmas = np.exp(np.interp(np.linspace(0, 10, steps + 1)[:-1], np.arange(11), logs))
    times = [round(t) for t in timestep_of(sigmas, known).tolist()]
    if len(set(times)) < steps:
        raise UsageError(f"schedule ays has no {steps} different timesteps; take fewer steps")
    return _known(arguments).at(times)


def _sgm_uniform(arguments: SchedulerArguments, steps: int, family: str | None) -> Levels:
    """Return n of n + 1 even timesteps from the last one to 0, with log sigma linear in between."""
    known = _known(arguments)
    times = np.linspace(len(known) - 1, 0, steps + 1)[:-1]
    logs = np.log(known.sigmas_karras.astype(np.float64))
    return Levels(times, np.exp(np.interp(times, np.arange(len(known)), logs)))


def _simple(arguments: SchedulerArguments, steps: int, family: str | None) -> Levels:
    """Return every (T / n)-th timestep, from the last one down."""
    known = _known(arguments)
    stride = len(known) / steps
    return known.at([len(known) - 1 - int(k * stride) for k in range(steps)])


def _ddim_uniform(arguments: SchedulerArguments, steps: int, family: str | None) -> Levels:
    """Return the timesteps 1, 1 + s, 1 + 2 s, ... with s = T // n; often more of them than n."""
    known = _known(arguments)
    return known.at(range(1, len(known), max(len(known) // steps, 1))[::-1])


def _kl_optimal(arguments: SchedulerArguments, steps: int, family: str | None) -> Levels:
    """Return levels even in arctan(sigma) (Sabour et al. 2024, theorem 3.1)."""
    known = _known(arguments).sigmas_karras
    angles = np.linspace(math.atan(known[-1]), math.atan(known[0]), steps)
    return _of_sigmas(arguments, np.tan(angles))


def _bong_tangent(arguments: SchedulerArguments, steps: int, family: str | None) -> Levels:
    """Return levels along two arctangents, which meet half-way between the ends."""
    known = _known(arguments).sigmas_karras
    high, low = float(known[-1]), float(known[0])
    middle, points = low + (high - low) / 2, steps + 2
    slope, pivot = 0.2 / (points / 40), int(points * 0.6)

    def part(count: int, bend: int, start: float, end: float) -> np.ndarray:
        curve = np.arctan(-slope * (np.arange(count) - bend))
        if count < 2 or curve[0] == curve[-1]:
            return np.full(count, start)
        return end + (curve - curve[-1]) / (curve[0] - curve[-1]) * (start - end)

    falling = [*part(pivot, pivot, high, middle)[:-1], *part(points - pivot, 0, middle, low)]
    return _of_sigmas(arguments, falling[:steps])


def _gits(arguments: SchedulerArguments, steps: int, family: str | None) -> Levels:
    """Return the levels of GITS; above 20 steps by interpolation, even in their logarithm."""
    _check_trained(arguments, "gits")
    if steps in gits.RUNGS:
        return _of_sigmas(arguments, [gits.LADDER[rung] for rung in gits.RUNGS[steps]])
    if steps < min(gits.RUNGS):
        raise UsageError(f"schedule gits has no run of {steps} steps; take at least 2")
    longest = max(gits.RUNGS)
    logs = np.log([*(gits.LADDER[rung] for rung in gits.RUNGS[longest]), gits.LOWEST])
    places = np.linspace(0, longest, steps + 1)[:-1]
    return _of_sigmas(arguments, np.exp(np.interp(places, np.arange(longest + 1), logs)))


def _spaced(spacing: SigmaSpacing) -> _Maker:
    """Return the maker of sigmas between the model's ends, for classes without the argument."""

    def make(arguments: SchedulerArguments, steps: int, family: str | None) -> Levels:
        known = _known(arguments).sigmas_karras
        return _of_sigmas(arguments, spacing(float(known[-1]), float(known[0]), steps))

    return make


LEVELS: dict[str, _Maker] = {
    "karras": _spaced(karras),
    "exponential": _spaced(exponential),
    "beta": _spaced(beta),
    "ays": _ays,
    "sgm-uniform": _sgm_uniform,
    "simple": _simple,
    "ddim-uniform": _ddim_uniform,
    "kl-optimal": _kl_optimal,
    "bong-tangent": _bong_tangent,
    "gits": _gits,
}
"""Schedule id -> (arguments, steps, model family) -> its levels. The first three are for classes
that lack the argument."""


def given(arguments: SchedulerArguments, sigmas: Sequence[float]) -> Levels:
    """Return the levels that the user lists; a final 0 is left out, for the sampler adds its own.

    Raises: UsageError unless they fall and lie within the levels that the model was trained on.
    """
    values = list(sigmas[:-1] if len(sigmas) > 1 and sigmas[-1] == 0.0 else sigmas)
    known = _known(arguments).sigmas_karras
    falling = all(a > b for a, b in pairwise(values))
    if not values or not falling or values[-1] <= 0.0 or values[0] > 1.01 * float(known[-1]):
        raise UsageError(
            "sigmas must fall, from at most "
            f"{float(known[-1]):.4g} (the model's highest) to above 0; a 0 at the end may be there"
        )
    return _of_sigmas(arguments, values)
