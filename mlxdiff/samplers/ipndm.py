"""iPNDM: Adams-Bashforth of up to fourth order in Karras' sigma, on the ODE's slopes (euler.py).

`ipndm` takes the weights of equal steps, whatever the steps are, so its order is 2 where steps
shrink by a fixed share. `ipndm-v` takes those of the true steps. The first steps have lower orders;
the last one, to sigma 0, is x_0 itself.

Source: Zhang and Chen 2022 (arXiv 2204.13902), which takes it from PNDM (Liu et al. 2022). The
weights of true steps are those of lms.py; diff-sampler (zju-pi), which other programs follow, has a
misplaced bracket in its third and fourth order, so pictures of theirs differ (docs/samplers.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.euler import grid
from mlxdiff.samplers.lms import adams_weights
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.pndm import ADAMS
from mlxdiff.samplers.scheduler import SIGMA_SPACINGS, SPACED, Grid, Sampler, Scheduler, ve_terms


def _rows(
    arguments: SchedulerArguments, grid: Grid, start: int, eta: float, *, true_steps: bool
) -> Iterator[Row]:
    sigmas = grid.levels()
    for i, timestep in grid.evaluations(start):
        order = min(i - start + 1, len(ADAMS)) if sigmas[i + 1] > 0.0 else 1
        step = sigmas[i + 1] - sigmas[i]
        if true_steps:
            weights = adams_weights(sigmas[i - order + 1 : i + 1][::-1], sigmas[i + 1])
        else:
            weights = tuple(step * weight for weight in ADAMS[order - 1])
        yield Row(
            timestep=timestep,
            **ve_terms(arguments, sigmas[i], noise=True),
            scale=1.0,
            weights=weights,
        )


def _scheduler(true_steps: bool) -> Scheduler:
    return Scheduler(
        reference=None,
        defaults={**SPACED, **SIGMA_SPACINGS},
        grid=grid,
        rows=partial(_rows, true_steps=true_steps),
        takes_timesteps=True,
        takes_levels=True,
    )


IPNDM, IPNDM_V = _scheduler(true_steps=False), _scheduler(true_steps=True)

SAMPLERS = (
    Sampler("ipndm", "iPNDM", IPNDM),
    Sampler("ipndm-v", "iPNDM V", IPNDM_V),
)
