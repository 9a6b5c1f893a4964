"""DPM-Solver++ (3M) SDE: the reverse SDE with x_0 as a parabola through the latest three outputs.

With H = 2h the step from sigma s to t, in lambda, without the scale of x, is

    x_t = e^-H x_s + (1 - e^-H) x_0 + phi_2 D1 - phi_3 D2 + t sqrt(1 - e^-2h) noise
    phi_2 = (e^-H - 1) / H + 1,   phi_3 = phi_2 / H - 1/2

D1 and D2 are the slope and the second difference of x_0. The noise is the increment of a Brownian
motion.

Source: Lu et al. 2022 (arXiv 2211.01095), as k-diffusion has it in sample_dpmpp_3m_sde. diffusers'
third order (dpm_solver.py) has a wrong sign here, so it is no reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.dpm_solver import log_ratio
from mlxdiff.samplers.euler import grid
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import SIGMA_SPACINGS, SPACED, Grid, Sampler, Scheduler, ve_terms


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        terms = ve_terms(arguments, sigmas[i])
        if sigmas[i + 1] == 0.0:
            yield Row(timestep=timestep, **terms, scale=0.0, weights=(1.0,))
            continue
        order = min(i - start + 1, 3)
        h = [log_ratio(sigmas[j], sigmas[j + 1]) for j in range(i, i - order, -1)]
        yield Row(
            timestep=timestep,
            **terms,
            scale=math.exp(-2 * h[0]),
            weights=_weights(h),
            noise=sigmas[i + 1] * math.sqrt(-math.expm1(-2 * h[0])),
            draws=True,
            between=(sigmas[i], sigmas[i + 1]),
        )


def _weights(h: list[float]) -> tuple[float, ...]:
    """Return the weights of the latest x_0. `h`: this step in lambda and those before it."""
    double = 2 * h[0]
    value = -math.expm1(-double)
    if len(h) == 1:
        return (value,)
    slope = math.expm1(-double) / double + 1
    ratio = h[0] / h[1]
    if len(h) == 2:
        return value + slope * ratio, -slope * ratio
    curve = slope / double - 0.5
    # With d10 and d11 the latest divided differences and q = h1 / (h1 + h2):
    # D1 = d10 + q (d10 - d11), D2 = (d10 - d11) h0 / (h1 + h2).
    bend = (slope * h[1] - curve * h[0]) / (h[1] + h[2])
    d10, d11 = (slope + bend) * ratio, -bend * h[0] / h[2]
    return value + d10, d11 - d10, -d11


DPMPP_3M_SDE = Scheduler(
    reference=None,
    defaults={**SPACED, **SIGMA_SPACINGS},
    grid=grid,
    rows=_rows,
    takes_timesteps=True,
    takes_levels=True,
    brownian=True,
)

SAMPLERS = (
    Sampler(
        "dpmpp-3m-sde",
        "DPM++ 3M SDE",
        DPMPP_3M_SDE,
        also=("k_dpmpp_3m_sde", "dpmpp_3m_sde_gpu"),
    ),
)
