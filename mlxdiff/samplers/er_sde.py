"""ER-SDE-Solver-3: the extended reverse SDE, with x_0 as a Taylor polynomial of the latest outputs.

With x / alpha as the sample and phi the noise scale function, the step from sigma s to t is

    x_t = r x_s + (1 - r) x_0 + (t - s + I phi(t)) D + ((t - s)^2 / 2 + J phi(t)) E
          + sqrt(t^2 - s^2 r^2) noise,   r = phi(t) / phi(s)

D and E are the first and second divided differences of x_0 in sigma. I is the integral of
1 / phi from t to s, J that of (sigma - s) / phi. phi(sigma) = sigma (e^(sigma^0.3) + 10), the
authors' choice ("SDE 5"). The noise is independent in each step.

Source: Cui et al. 2023 (arXiv 2309.06169), section 4 and appendix A.8; the authors' code takes 100
rectangles for the integrals, here Gauss' rule makes them exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.euler import grid
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import SIGMA_SPACINGS, SPACED, Grid, Sampler, Scheduler, ve_terms

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def _phi(sigma: float) -> float:
    return sigma * (math.exp(sigma**0.3) + 10.0)


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        terms = ve_terms(arguments, sigmas[i])
        there = sigmas[i + 1]
        if there == 0.0:
            yield Row(timestep=timestep, **terms, scale=0.0, weights=(1.0,))
            continue
        order = min(i - start + 1, 3)
        ratio = _phi(there) / _phi(sigmas[i])
        spread = there * there - (sigmas[i] * ratio) ** 2
        yield Row(
            timestep=timestep,
            **terms,
            scale=ratio,
            weights=_weights(sigmas[i - order + 1 : i + 1][::-1], there),
            noise=math.sqrt(max(spread, 0.0)),
            draws=True,
        )


def _weights(nodes: list[float], there: float) -> tuple[float, ...]:
    """Return the weights of the latest x_0, at `nodes`, latest first."""
    here = nodes[0]
    value = 1.0 - _phi(there) / _phi(here)
    if len(set(nodes)) < 2:
        return (value,)
    step = there - here
    slope = (step + _integral(there, here, 0) * _phi(there)) / (here - nodes[1])
    if len(set(nodes)) < 3:
        return value + slope, -slope
    # E = 2 (D - D before) / (here - two before)
    curve = step * step / 2 + _integral(there, here, 1) * _phi(there)
    curve *= 2 / (here - nodes[2])
    new, old = curve / (here - nodes[1]), curve / (nodes[1] - nodes[2])
    return value + slope + new, -slope - new - old, old


def _integral(low: float, high: float, power: int) -> float:
    """Integrate (sigma - high)**power / phi(sigma) from low to high, in log(sigma)."""
    middle, half = math.log(high * low) / 2, math.log(high / low) / 2
    total = 0.0
    for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
        sigma = math.exp(middle + half * node)
        total += weight * (sigma - high) ** power * sigma / _phi(sigma)
    return half * total


ER_SDE = Scheduler(
    reference=None,
    defaults={**SPACED, **SIGMA_SPACINGS},
    grid=grid,
    rows=_rows,
    takes_timesteps=True,
    takes_levels=True,
)

SAMPLERS = (Sampler("er-sde", "ER SDE", ER_SDE),)
