"""DEIS: the exponential integrator with polynomials in log(sigma_karras), in closed form.

In rho = sigma_karras the ODE is d(x / alpha) / d rho = noise(x, rho), as in euler.py. DEIS replaces
the noise by the polynomial in log(rho) through its latest values. The integral of this polynomial
over rho is elementary.

Source: Zhang and Chen 2022 (arXiv 2204.13902), equation 15 with the log-rho polynomials of appendix
B. Equal to diffusers' DEISMultistepScheduler, which ends at the lowest sigma, not at zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.dpm_solver import grid as solver_grid
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


def _grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    return solver_grid(arguments, steps, custom, repeat_last=True)


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas, count = grid.levels(), len(grid.timesteps)
    few = arguments.lower_order_final and count < 15
    for i, timestep in grid.evaluations(start):
        order = min(arguments.solver_order, i - start + 1)
        if few:
            order = min(order, count - i)
        nodes = sigmas[i - order + 1 : i + 1][::-1]
        if len(set(nodes)) < order:  # equal sigmas carry no slope (the reference: 0 / 0)
            nodes = nodes[:1]
        (alpha, sigma), (alpha_next, _) = sch.alpha_sigma(sigmas[i]), sch.alpha_sigma(sigmas[i + 1])
        yield Row(
            timestep=timestep,
            **vp_terms(arguments, alpha, sigma, noise=True),
            scale=alpha_next / alpha,
            weights=tuple(
                alpha_next * _integral(nodes, k, sigmas[i], sigmas[i + 1])
                for k in range(len(nodes))
            ),
        )


def _integral(nodes: Sequence[float], which: int, lower: float, upper: float) -> float:
    """Integrate over rho the polynomial in log(rho) that is 1 at nodes[which], 0 at the others.

    With u = log(rho / nodes[which]) it is the product of (u - d) / -d over the other nodes' d, and
    the integrals of rho**0 u**n are rho (u**n - n u**(n-1) + ...).
    """
    node = nodes[which]
    offsets = [math.log(other / node) for k, other in enumerate(nodes) if k != which]

    def primitive(rho: float) -> float:
        u = math.log(rho / node)
        moments = (1.0, u - 1.0, u * u - 2.0 * u + 2.0)  # of 1, u and u**2, over rho
        if not offsets:
            return rho * moments[0]
        if len(offsets) == 1:
            return rho * (moments[1] - offsets[0] * moments[0]) / -offsets[0]
        d, e = offsets
        return rho * (moments[2] - (d + e) * moments[1] + d * e * moments[0]) / (d * e)

    return primitive(upper) - primitive(lower)


DEIS = Scheduler(
    reference="DEISMultistepScheduler",
    defaults={
        **TRAINING,
        **THRESHOLDING,
        **SIGMA_SPACINGS,
        "solver_order": 2,
        "lower_order_final": True,
        "use_flow_sigmas": False,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "use_dynamic_shifting": False,
    },
    choices={"solver_order": (1, 2, 3)},
    grid=_grid,
    takes_levels=True,
    rows=_rows,
)

SAMPLERS = (Sampler("deis", "DEIS", DEIS),)
