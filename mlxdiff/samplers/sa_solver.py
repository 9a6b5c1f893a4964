"""SA-Solver: stochastic Adams, a multistep predictor and a corrector of the reverse SDE.

With c = 1 + tau^2 the predictor's step from s to t, in lambda, is

    x_t = (sigma_t / sigma_s) e^(-tau^2 h) x_s
          + alpha_t c * integral of e^(c (l - lambda_t)) P(l) dl
          + sigma_t sqrt(1 - e^(-2 tau^2 h)) noise

P is the polynomial through the latest x_0. tau is 1 from timestep 200 to 800, and else 0, where the
step is that of the ODE. At the predicted point the corrector repeats the step with the new output
in P and with the same noise. This adds no evaluation. At order 2 both have an added term of third
order, as the authors give it for few steps.

Source: Xue et al. 2023 (arXiv 2309.05019), algorithm 1. Equal to diffusers' SASolverScheduler.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.ddim import level
from mlxdiff.samplers.dpm_solver import grid as solver_grid
from mlxdiff.samplers.dpm_solver import log_ratio
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import (
    SIGMA_SPACINGS,
    THRESHOLDING,
    TRAINING,
    Grid,
    Sampler,
    Scheduler,
    vp_terms,
)

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_STOCHASTIC = (200, 800)  # timesteps with tau 1


def _grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    return solver_grid(arguments, steps, custom, repeat_last=True)


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas, times, count = grid.levels(), grid.timesteps.tolist(), len(grid.timesteps)
    final = arguments.lower_order_final
    known = grid.schedule.alphas_cumprod.tolist()
    predicted: tuple[float, ...] = ()
    for i, timestep in grid.evaluations(start):
        correction: tuple[float, ...] = ()
        if i > start:  # what the new output changes in the step that led here
            order = min(arguments.corrector_order, i - start + 1)
            order = min(order, count - i + 2) if final else order
            corrected = _weights(sigmas, i - 1, order, _tau(times[i - 1]), corrector=True)
            correction = _difference(corrected, (0.0, *predicted))
        order = min(arguments.predictor_order, i - start + 1)
        order = min(order, count - i) if final else order
        tau = _tau(timestep)
        alpha, sigma = sch.alpha_sigma(sigmas[i])
        sigma_next = sch.alpha_sigma(sigmas[i + 1])[1]
        h = log_ratio(sigmas[i], sigmas[i + 1])
        predicted = _weights(sigmas, i, order, tau, corrector=False)
        yield Row(
            timestep=timestep,
            **vp_terms(arguments, alpha, sigma)
            # By which the class adds noise: the level of the whole timestep.
            | {"level": level(known[int(timestep)])},
            anchor_data=correction,
            scale=math.exp(-tau * h) * sigma_next / sigma,
            weights=predicted,
            noise=sigma_next * math.sqrt(-math.expm1(-2 * tau * h)),
            draws=True,
        )


def _tau(timestep: float) -> float:
    """Return tau at a timestep; it is 0 or 1, so this is its square too."""
    low, high = _STOCHASTIC
    return 1.0 if low <= timestep <= high else 0.0


def _weights(
    sigmas: Sequence[float], i: int, order: int, tau: float, *, corrector: bool
) -> tuple[float, ...]:
    """Return the weights of the latest x_0 in the step from level i to the next.

    Args:
        order: number of outputs in the polynomial.
        corrector: the latest output is the one at the end of the step.
    """
    alpha = sch.alpha_sigma(sigmas[i + 1])[0]
    h = log_ratio(sigmas[i], sigmas[i + 1])
    if h == 0.0:
        return (0.0,) * order
    first = i + 1 if corrector else i
    nodes = [log_ratio(sigmas[i + 1], sigmas[first - k]) for k in range(order)]
    if len(set(nodes)) < order:  # equal sigmas carry no slope
        nodes = nodes[:1]
    c = 1.0 + tau
    found = [c * alpha * _integral(nodes, k, h, c) for k in range(len(nodes))]
    if len(nodes) == 2:
        # h^2 / 2 minus the same integral with the exponential: the added term
        more = h * h / 2 - (h * c - 1 + math.exp(-c * h)) / (c * c)
        more *= c * alpha / (h if corrector else nodes[0] - nodes[1])
        found = [found[0] + more, found[1] - more]
    return tuple(found)


def _integral(nodes: Sequence[float], which: int, h: float, c: float) -> float:
    """Integrate e^(c u) P(u) over -h to 0; P is 1 at nodes[which] and 0 at the other nodes."""
    total = 0.0
    for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
        u = (node - 1.0) * h / 2
        value = math.prod(
            (u - other) / (nodes[which] - other) for k, other in enumerate(nodes) if k != which
        )
        total += weight * math.exp(c * u) * value
    return total * h / 2


def _difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
    return tuple(x - y for x, y in itertools.zip_longest(a, b, fillvalue=0.0))


SA_SOLVER = Scheduler(
    reference="SASolverScheduler",
    defaults={
        **TRAINING,
        **THRESHOLDING,
        **SIGMA_SPACINGS,
        "predictor_order": 2,
        "corrector_order": 2,
        "tau_func": None,
        "algorithm_type": "data_prediction",
        "lower_order_final": True,
        "use_flow_sigmas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
    },
    choices={
        "predictor_order": (1, 2, 3, 4),
        "corrector_order": (1, 2, 3, 4),
        "tau_func": (None,),
        "algorithm_type": ("data_prediction",),
    },
    grid=_grid,
    rows=_rows,
    takes_levels=True,
)

SAMPLERS = (Sampler("sa-solver", "SA Solver", SA_SOLVER, {"algorithm_type": "data_prediction"}),)
