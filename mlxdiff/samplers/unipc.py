"""UniPC: a multistep exponential predictor, and a corrector that costs no evaluation of its own.

The predictor is DPM-Solver's integral (dpm_solver.py) with other weights of the differences. The
network's output at the predicted point also repeats the step that led there, one order higher. The
run continues from the corrected point.

Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 1 to 4. Equal to diffusers'
UniPCMultistepScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdiff.errors import ConfigError
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
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


def _grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    return solver_grid(arguments, steps, custom, repeat_last=True)


@dataclass(frozen=True)
class _Step:
    """The coefficients of a step from sigmas[i] to sigmas[i + 1] with `order` outputs up to i.

    Attributes:
        scale: the coefficient of the sample.
        first: that of the output at i, by the first-order method.
        outer: the factor of the differences of outputs.
        ratios: the distance in lambda of each earlier output from i, over that of i + 1; then 1,
            for i + 1 itself.
        system: matrix and right-hand side; the solution weighs the differences.
    """

    scale: float
    first: float
    outer: float
    ratios: tuple[float, ...]
    system: tuple[np.ndarray, np.ndarray]

    @classmethod
    def at(
        cls, arguments: SchedulerArguments, sigmas: Sequence[float], i: int, order: int
    ) -> _Step:
        (alpha_s, sigma_s), (alpha_t, sigma_t) = (sch.alpha_sigma(sigmas[k]) for k in (i, i + 1))
        h = log_ratio(sigmas[i], sigmas[i + 1])
        by_x0 = arguments.predict_x0
        z = -h if by_x0 else h
        scale, outer = (sigma_t / sigma_s, alpha_t) if by_x0 else (alpha_t / alpha_s, sigma_t)
        size = z if arguments.solver_type == "bh1" else math.expm1(z)
        first = -outer * math.expm1(z)
        while order > 1 and len(set(sigmas[i - order + 1 : i + 1])) < order:
            order -= 1  # equal sigmas carry no slope (the reference: 0 / 0)
        if h in (0.0, math.inf):  # nothing to extrapolate over, or to zero: first order
            return cls(scale, first, 0.0, (1.0,), (np.zeros((0, 0)), np.zeros(0)))
        ratios = [-log_ratio(sigmas[i - k], sigmas[i]) / h for k in range(1, order)] + [1.0]
        phi, right = math.expm1(z) / z - 1.0, []
        for k in range(1, order + 1):
            right.append(phi * math.factorial(k) / size)
            phi = phi / z - 1.0 / math.factorial(k + 1)
        matrix = np.array([[ratio**k for ratio in ratios] for k in range(order)])
        return cls(scale, first, -outer * size, tuple(ratios), (matrix, np.array(right)))

    def predictor(self) -> tuple[float, ...]:
        """Return the weights of the outputs at i, i - 1, ...: UniP."""
        earlier = len(self.ratios) - 1
        if earlier == 1:  # the reference rounds the solution to one half, as the authors do
            shares = [0.5]
        else:
            matrix, right = self.system
            shares = np.linalg.solve(matrix[:-1, :-1], right[:-1]).tolist() if earlier else []
        return self._spread(shares)

    def corrector(self) -> tuple[float, ...]:
        """Return the weights of the outputs at i + 1, i, i - 1, ...: UniC."""
        if len(self.ratios) == 1:
            shares = [0.5]
        else:
            shares = np.linalg.solve(*self.system).tolist()
        new = self.outer * shares[-1]
        at_i, *earlier = self._spread(shares[:-1])
        return (new, at_i - new, *earlier)

    def _spread(self, shares: Sequence[float]) -> tuple[float, ...]:
        """Turn shares of the differences from the output at i into weights of the outputs."""
        earlier = [
            self.outer * share / ratio for share, ratio in zip(shares, self.ratios, strict=False)
        ]
        return (self.first - sum(earlier), *earlier)


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    sigmas, count = grid.levels(), len(grid.timesteps)
    if not arguments.predict_x0 and arguments.final_sigmas_type == "zero":
        raise ConfigError(
            "scheduler_config.json: predict_x0 false predicts noise and has no step to sigma 0: "
            "it needs final_sigmas_type sigma_min"
        )
    before: _Step | None = None
    for i, timestep in grid.evaluations(start):
        order = min(arguments.solver_order, i - start + 1)
        if arguments.lower_order_final:
            order = min(order, count - i)
        alpha, sigma = sch.alpha_sigma(sigmas[i])
        step = _Step.at(arguments, sigmas, i, order)
        corrected: dict[str, Any] = {}
        if before is not None and i - 1 not in arguments.disable_corrector:
            corrected = {
                "anchor_x": 0.0,
                "anchor_last": before.scale,
                "anchor_data": before.corrector(),
            }
        yield Row(
            timestep=timestep,
            **_terms(arguments, alpha, sigma),
            **corrected,
            scale=step.scale,
            weights=step.predictor(),
        )
        before = step


def _terms(arguments: SchedulerArguments, alpha: float, sigma: float) -> dict[str, Any]:
    """Return the level's `Row` fields; the reference does not threshold a predicted noise."""
    if arguments.predict_x0:
        return vp_terms(arguments, alpha, sigma)
    return vp_terms(arguments.replace(thresholding=False), alpha, sigma, noise=True)


UNIPC = Scheduler(
    reference="UniPCMultistepScheduler",
    defaults={
        **TRAINING,
        **THRESHOLDING,
        **SIGMA_SPACINGS,
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "use_flow_sigmas": False,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
        "use_dynamic_shifting": False,
        "shift_terminal": None,
    },
    choices={
        "solver_order": (1, 2, 3, 4, 5),
        # The names after the first two are other classes'; the reference reads them as bh2.
        "solver_type": ("bh2", "bh1", "midpoint", "heun", "logrho"),
    },
    grid=_grid,
    takes_levels=True,
    rows=_rows,
)

SAMPLERS = (Sampler("unipc", "UniPC", UNIPC, also=("uni_pc", "uni_pc_bh2")),)
