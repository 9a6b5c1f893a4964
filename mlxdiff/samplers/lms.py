"""Linear multistep: Adams-Bashforth of up to fourth order in Karras' sigma.

The method puts a polynomial through the last four slopes of the ODE (euler.py) and integrates it
over the step.

Source: k-diffusion's sample_lms; Hairer, Norsett and Wanner, Solving Ordinary Differential
Equations I, chapter III.5 (variable steps). Equal to diffusers' LMSDiscreteScheduler, which
integrates with SciPy's quadrature; here Gauss's two-point rule does, which is exact for cubics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.euler import grid as sigma_grid
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.schedule import Levels
from mlxdiff.samplers.scheduler import SIGMA_SPACINGS, SPACED, Grid, Sampler, Scheduler, ve_terms

_ORDER = 4


def _grid(arguments: SchedulerArguments, steps: int, custom: Levels | None) -> Grid:
    if arguments.use_karras_sigmas:  # this class alone ignores the file's sigma_min and sigma_max
        arguments = arguments.replace(sigma_min=None, sigma_max=None)
    return sigma_grid(arguments, steps, custom)


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        weights = adams_weights(sigmas[max(i + 1 - _ORDER, 0) : i + 1][::-1], sigmas[i + 1])
        # For a run that begins in the middle, the reference takes the full order's weights of the
        # slopes that exist.
        yield Row(
            timestep=timestep,
            **ve_terms(arguments, sigmas[i], noise=True),
            scale=1.0,
            weights=weights[: i - start + 1],
        )


def adams_weights(nodes: Sequence[float], end: float) -> tuple[float, ...]:
    """Return the weights of the slopes at `nodes`, latest first, for the step to `end`.

    Args:
        nodes: up to four levels, no two of them equal.
    """
    return tuple(_integral(nodes, k, nodes[0], end) for k in range(len(nodes)))


def _integral(nodes: Sequence[float], which: int, lower: float, upper: float) -> float:
    """Integrate the polynomial that is 1 at nodes[which], 0 at the others (three at most)."""
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    total = 0.0
    for tau in (middle - half / math.sqrt(3), middle + half / math.sqrt(3)):
        total += math.prod(
            (tau - node) / (nodes[which] - node) for k, node in enumerate(nodes) if k != which
        )
    return half * total


LMS = Scheduler(
    reference="LMSDiscreteScheduler",
    defaults={**SPACED, **SIGMA_SPACINGS},
    grid=_grid,
    takes_levels=True,
    rows=_rows,
)

SAMPLERS = (Sampler("lms", "LMS", LMS, also=("k_lms",)),)
