"""DPM-Solver and DPM-Solver++: exponential integrators in lambda = log(alpha / sigma).

The probability-flow ODE is linear in x but for the network; its solution from s to t, in lambda, is

    x_t = (sigma_t / sigma_s) x_s + sigma_t * integral of e^l x_0(l) dl       (DPM-Solver++)
    x_t = (alpha_t / alpha_s) x_s - alpha_t * integral of e^-l noise(l) dl    (DPM-Solver)

The solver approximates only x_0(l) or noise(l), which the network predicts: by a constant (order 1,
which is DDIM), a line (order 2) or a parabola (order 3) through the latest outputs. Multistep
solvers take these outputs from earlier steps, singlestep solvers from inside the step.

Source: Lu et al. 2022, DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095). Equal to
diffusers' DPMSolverMultistepScheduler, whose third order takes half the second difference that the
parabola needs and so has order 2 (docs/samplers.md), DPMSolverSinglestepScheduler, and
EDMDPMSolverMultistepScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlxdiff.errors import ConfigError
from mlxdiff.samplers import edm
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import (
    SIGMA_SPACINGS,
    THRESHOLDING,
    TRAINING,
    Grid,
    Sampler,
    Scheduler,
    Terms,
    vp_terms,
)

Level = Callable[[float], tuple[float, float]]
"""Karras sigma -> (alpha, sigma) of the kept sample."""

_SHARED = {
    **TRAINING,
    **THRESHOLDING,
    **SIGMA_SPACINGS,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
    "use_dynamic_shifting": False,
}
_CHOICES = {
    "solver_order": (1, 2, 3),
    # The names after the first two belong to other classes; the reference reads them as midpoint.
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}


def grid(
    arguments: SchedulerArguments,
    steps: int,
    custom: sch.Levels | None,
    *,
    repeat_last: bool = False,
    round_karras: bool = True,
) -> Grid:
    """Return timesteps and sigmas of the solver classes (DPM-Solver, UniPC, DEIS).

    The timesteps are whole numbers. n steps run between n + 1 levels.

    Args:
        repeat_last: with final_sigmas_type sigma_min and a spacing of sigmas, end at the lowest
            sigma of the run rather than of the schedule.
        round_karras: round the timesteps of Karras and Lu spacings; others are cut off.
    """
    schedule = sch.NoiseSchedule.from_arguments(arguments, keep_finite=True)
    known = schedule.sigmas_karras
    highest, lowest = sch.sigma_range(arguments, float(known[-1]), float(known[0]))
    spacing = sch.sigma_spacing(arguments)
    if custom is not None:
        times, sigmas = custom.times.round(), custom.sigmas
    elif spacing is None:
        times = sch.spaced_between(arguments, steps, _highest_timestep(arguments, schedule))
        sigmas = np.interp(times, np.arange(len(known)), known)
    else:
        if spacing is sch.lu:
            logs = np.log(known)
            highest, lowest = float(logs[-1]), float(logs[0])
        sigmas = spacing(highest, lowest, steps)
        times = sch.timestep_of(sigmas, known)
        if spacing in (sch.karras, sch.lu) and round_karras:
            times = times.round()
    if arguments.get("final_sigmas_type", "sigma_min") == "zero":
        final = 0.0
    else:
        final = sigmas[-1] if repeat_last and spacing is not None else known[0]
    return Grid(schedule, times.astype(np.int64), np.append(sigmas, final).astype(np.float32))


def _highest_timestep(arguments: SchedulerArguments, schedule: sch.NoiseSchedule) -> int:
    """Return one more than the highest timestep with lambda >= lambda_min_clipped."""
    clip = arguments.get("lambda_min_clipped", -math.inf)
    alphas, sigmas = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)
    lambdas = np.log(alphas) - np.log(sigmas)
    return len(schedule) - int(np.searchsorted(lambdas[::-1], clip))


# --- coefficients ---------------------------------------------------------------------------------


def log_ratio(sigma_from: float, sigma_to: float) -> float:
    """Return the step in lambda between two Karras sigmas."""
    return math.log(sigma_from / sigma_to) if sigma_to > 0 else math.inf


def _phi(z: float, k: int) -> float:
    """Return the sum of z**n / (n + k)! over n >= 1.

    This is e**z without its first k + 1 terms, divided by z**k.
    """
    if z == -math.inf:
        return -1.0 / math.factorial(k)
    if abs(z) < 0.5:  # the closed form cancels there
        return sum(z**n / math.factorial(n + k) for n in range(1, 18))
    rest = math.expm1(z)
    for n in range(1, k):
        rest -= z**n / math.factorial(n)
    return rest / z**k - 1.0 / math.factorial(k)


@dataclass(frozen=True)
class _Step:
    """Coefficients of one step between two Karras sigmas, before they go to the single outputs.

    The step is x_t = x * x_s + (integral) + noise * fresh noise.

    Attributes:
        x, noise: coefficients of the sample and of fresh noise.
        value: coefficient of the constant in the integral.
        half, slope: coefficient of the line's rise over the step, approximate (midpoint) and exact.
        curve: coefficient of the parabola's second difference over the step.
    """

    x: float
    noise: float
    value: float
    half: float
    slope: float
    curve: float

    @classmethod
    def between(
        cls, algorithm: str, sigma_from: float, sigma_to: float, level: Level = sch.alpha_sigma
    ) -> _Step:
        alpha_s, sigma_s = level(sigma_from)
        alpha_t, sigma_t = level(sigma_to)
        h = log_ratio(sigma_from, sigma_to)
        stochastic, noise = algorithm.startswith("sde-"), 0.0
        if algorithm.endswith("++"):
            x, outer, z = sigma_t / sigma_s, alpha_t, -h
            if stochastic:  # the same integrals over twice the step
                x, z, noise = x * math.exp(-h), -2 * h, sigma_t * math.sqrt(-math.expm1(-2 * h))
        else:
            x, outer, z = alpha_t / alpha_s, sigma_t, h
            if stochastic:
                outer, noise = 2 * sigma_t, sigma_t * math.sqrt(math.expm1(2 * h))
        value, slope, curve = -outer * math.expm1(z), -outer * _phi(z, 1), -outer * _phi(z, 2)
        if stochastic:  # the reference's sign error; only `checkpoint` asks for order 3 here
            curve -= outer
        return cls(x, noise, value, value / 2, slope, curve)


def _weights_multistep(
    step: _Step, h: Sequence[float], order: int, solver_type: str
) -> tuple[float, ...]:
    """Return the weights of the latest outputs D0, D1, ...

    `h`: this step in lambda and the steps before it, latest first.
    """
    if order == 1 or h[1] == 0.0:  # no slope between equal sigmas (the reference: 0 / 0)
        return (step.value,)
    if order == 2 or h[2] == 0.0:
        # DPM-Solver++ 2M, midpoint, with the coefficients filled in:
        #   x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h0) (D0 + (h0 / (2 h1)) (D0 - D1))
        # value = alpha_t (1 - e^-h0), half = value / 2. The factor sigma_t / sigma_s is step.x.
        d10 = (step.slope if solver_type == "heun" else step.half) * h[0] / h[1]
        return step.value + d10, -d10
    # Of the divided differences D10 and D11 of the outputs:
    # D1 = D10 + r0 / (r0 + r1) (D10 - D11), D2 = (D10 - D11) / (r0 + r1).
    bend = (step.slope * h[1] + step.curve * h[0]) / (h[1] + h[2])
    d10, d11 = (step.slope + bend) * h[0] / h[1], -bend * h[0] / h[2]
    return step.value + d10, d11 - d10, -d11


def _weights_singlestep(
    step: _Step, h: Sequence[float], order: int, solver_type: str
) -> tuple[float, ...]:
    """Return the weights of the outputs inside a step, latest first.

    `h`: the length of the step in lambda, then the length of its part up to each later output,
    latest first.
    """
    if order == 1 or 0.0 in h[1:]:
        return (*[0.0] * (order - 1), step.value)
    if order == 2:
        d10 = (step.slope if solver_type == "heun" else step.half) * h[0] / h[1]
        return d10, step.value - d10
    if solver_type != "heun":
        d11 = step.slope * h[0] / h[1]
        return d11, 0.0, step.value - d11
    # D1 = (r0 D10 - r1 D11) / (r0 - r1), D2 = 2 (D11 - D10) / (r0 - r1)
    twice = 2 * step.curve * h[0]
    d10 = (step.slope * h[1] - twice) / (h[1] - h[2]) * h[0] / h[2]
    d11 = (twice - step.slope * h[2]) / (h[1] - h[2]) * h[0] / h[1]
    return d11, d10, step.value - d10 - d11


def second_order(sigmas: Sequence[float]) -> Iterator[tuple[float, tuple[float, ...]]]:
    """Yield the coefficients of DPM-Solver++ 2M between Karras sigmas: of x, of the latest x_0.

    It integrates the line exactly. The first step, and a step to sigma 0, are of first order.
    """
    for i in range(len(sigmas) - 1):
        order = 1 if i == 0 or sigmas[i + 1] == 0.0 else 2
        h = [log_ratio(sigmas[j], sigmas[j + 1]) for j in range(i, i - order, -1)]
        step = _Step.between("dpmsolver++", sigmas[i], sigmas[i + 1])
        yield step.x, _weights_multistep(step, h, order, "heun")


# --- rows -----------------------------------------------------------------------------------------


def _vp_terms(
    arguments: SchedulerArguments, sigma_karras: float, *, noise: bool = False
) -> dict[str, Any]:
    return vp_terms(arguments, *sch.alpha_sigma(sigma_karras), noise=noise)


@dataclass(frozen=True)
class _Process:
    """A noise process: its levels (alpha, sigma), and the `Row` fields of a level."""

    level: Level
    terms: Terms


_DDPM = _Process(sch.alpha_sigma, _vp_terms)
_EDM = _Process(edm.level, edm.terms)


def _rows(
    process: _Process,
    arguments: SchedulerArguments,
    grid: Grid,
    start: int,
    orders: Sequence[int],
    singlestep: bool,
) -> Iterator[Row]:
    """Yield the rows from grid index `start` on; row i has at most order `orders[i]`."""
    algorithm = arguments.algorithm_type
    if algorithm == "deis":
        algorithm = "dpmsolver++"
    by_noise, stochastic = not algorithm.endswith("++"), algorithm.startswith("sde-")
    if by_noise and arguments.final_sigmas_type == "zero":
        raise ConfigError(
            f"scheduler_config.json: algorithm_type {algorithm} predicts noise and has no step to "
            "sigma 0: it needs final_sigmas_type sigma_min"
        )
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        order = min(orders[i], i - start + 1)
        if singlestep:
            origin, weights = i - order + 1, _weights_singlestep
            h = [log_ratio(sigmas[origin], sigmas[j]) for j in range(i + 1, origin, -1)]
        else:
            origin, weights = i, _weights_multistep
            h = [log_ratio(sigmas[j], sigmas[j + 1]) for j in range(i, i - order, -1)]
        step = _Step.between(algorithm, sigmas[origin], sigmas[i + 1], process.level)
        yield Row(
            timestep=timestep,
            **process.terms(arguments, sigmas[i], noise=by_noise),
            anchor_x=float(origin == i),
            anchor_last=float(origin != i),
            scale=step.x,
            weights=weights(step, h, order, arguments.solver_type),
            noise=step.noise,
            draws=stochastic,
            between=(sigmas[i], sigmas[i + 1]) if stochastic and sigmas[i + 1] > 0.0 else (),
        )


def _multistep_rows(
    process: _Process, arguments: SchedulerArguments, grid: Grid, start: int, eta: float
) -> Iterator[Row]:
    algorithm = arguments.algorithm_type
    without = ("sde-dpmsolver", "sde-dpmsolver++") if process is _EDM else ("sde-dpmsolver",)
    if algorithm in without and arguments.solver_order == 3:
        raise ConfigError(f"scheduler_config.json: {algorithm} has no solver_order 3")
    count = len(grid.timesteps)
    orders = [arguments.solver_order] * count
    few = arguments.lower_order_final and count < 15
    if few and count > 1:
        orders[-2] = min(orders[-2], 2)
    if few or arguments.euler_at_final or arguments.final_sigmas_type == "zero":
        orders[-1] = 1
    return _rows(process, arguments, grid, start, orders, singlestep=False)


def _singlestep_rows(
    arguments: SchedulerArguments, grid: Grid, start: int, eta: float
) -> Iterator[Row]:
    count, order = len(grid.timesteps), arguments.solver_order
    to_zero = arguments.final_sigmas_type == "zero"
    orders = (list(range(1, order + 1)) * (count // order + 1))[:count]
    if count % order == 0 and (arguments.lower_order_final or to_zero):
        orders[-1] = 1
    return _rows(_DDPM, arguments, grid, start, orders, singlestep=True)


def _multistep_grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    return grid(
        arguments, steps, custom, round_karras=arguments.beta_schedule != "squaredcos_cap_v2"
    )


MULTISTEP = Scheduler(
    reference="DPMSolverMultistepScheduler",
    defaults={
        **_SHARED,
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    },
    choices={
        **_CHOICES,
        # DEIS's class writes "deis"; the reference reads it as dpmsolver++ here.
        "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"),
    },
    takes_levels=True,
    grid=_multistep_grid,
    rows=partial(_multistep_rows, _DDPM),
    takes_timesteps=True,
)

EDM = Scheduler(
    reference="EDMDPMSolverMultistepScheduler",
    defaults={
        **edm.DEFAULTS,
        **THRESHOLDING,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
    },
    choices={
        **_CHOICES,
        **edm.CHOICES,
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    },
    grid=edm.grid,
    rows=partial(_multistep_rows, _EDM),
)

SINGLESTEP = Scheduler(
    reference="DPMSolverSinglestepScheduler",
    defaults={**_SHARED, "lower_order_final": False},
    choices={**_CHOICES, "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "deis")},
    takes_levels=True,
    grid=grid,
    rows=_singlestep_rows,
    takes_timesteps=True,
)

SAMPLERS = (
    Sampler(
        "dpmpp-2m",
        "DPM++ 2M",
        MULTISTEP,
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
        also=("k_dpmpp_2m",),
        edm=EDM,
    ),
    Sampler(
        "res-multistep",
        "RES multistep",
        MULTISTEP,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "heun"},
        also=("res_multistep",),
    ),
    Sampler(
        "dpmpp-3m",
        "DPM++ 3M",
        MULTISTEP,
        {"algorithm_type": "dpmsolver++", "solver_order": 3},
        edm=EDM,
    ),
    Sampler(
        "dpmpp-2m-sde",
        "DPM++ 2M SDE",
        MULTISTEP,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        edm=EDM,
    ),
    Sampler(
        "dpm-2m",
        "DPM 2M",  # A1111's "DPM2" is another method
        MULTISTEP,
        {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"},
    ),
    Sampler(
        "dpmpp-2s", "DPM++ 2S", SINGLESTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}
    ),
)
