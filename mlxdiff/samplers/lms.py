"""Linear multistep: Adams-Bashforth of up to fourth order in Karras' sigma.

The slope of the ODE (euler.py) is taken as the polynomial through its last four values, and the
polynomial is integrated over the step.

Source: k-diffusion's sample_lms; Hairer, Norsett and Wanner, Solving Ordinary Differential
Equations I, chapter III.5 (variable steps). Equal to diffusers' LMSDiscreteScheduler; SciPy's
quadrature there is Gauss's two-point rule here, which is exact for cubics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mlxdiff.samplers.euler import grid as sigma_grid
from mlxdiff.samplers.euler import terms_at
from mlxdiff.samplers.family import SIGMA_SPACINGS, TRAINING, Family, Grid
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.settings import Settings

_ORDER = 4


def _grid(settings: Settings, steps: int, custom: Sequence[int] | None) -> Grid:
    if settings.use_karras_sigmas:  # this class alone ignores the file's sigma_min and sigma_max
        settings = settings.replace(sigma_min=None, sigma_max=None)
    return sigma_grid(settings, steps, custom)


def _rows(settings: Settings, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in list(enumerate(grid.timesteps.tolist()))[start:]:
        nodes = sigmas[max(i + 1 - _ORDER, 0) : i + 1][::-1]
        weights = [_integral(nodes, k, sigmas[i], sigmas[i + 1]) for k in range(len(nodes))]
        # Begun in the middle, the reference takes the full order's weights for the slopes it has.
        yield Row(
            timestep=timestep,
            **terms_at(settings, sigmas[i]),
            scale=1.0,
            weights=tuple(weights[: i - start + 1]),
        )


def _integral(nodes: Sequence[float], which: int, lower: float, upper: float) -> float:
    """The integral of the polynomial that is 1 at nodes[which], 0 at the others (three at most)."""
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    total = 0.0
    for tau in (middle - half / math.sqrt(3), middle + half / math.sqrt(3)):
        total += math.prod(
            (tau - node) / (nodes[which] - node) for k, node in enumerate(nodes) if k != which
        )
    return half * total


LMS = Family(
    name="LMSDiscreteScheduler",
    defaults={**TRAINING, **SIGMA_SPACINGS, "timestep_spacing": "linspace", "steps_offset": 0},
    grid=_grid,
    rows=_rows,
)
