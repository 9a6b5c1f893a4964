"""PNDM: linear multistep methods on the predicted noise, moved by DDIM's step.

A combination of the last four outputs (Adams-Bashforth, PLMS) is the noise in DDIM's step. The
first three steps have fewer outputs. Pseudo Runge-Kutta makes these steps, with four evaluations
each. With skip_prk_steps, as in Stable Diffusion's own file, lower orders and one repeated step
make them.

Source: Liu et al. 2022 (arXiv 2202.09778), equations 9 to 13 and algorithm 2. Equal to diffusers'
PNDMScheduler, also where a run begins in the middle: it counts its start-up from there, so the
Runge-Kutta steps and the repeated step act on the first timesteps of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.ddim import level
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import TRAINING, Grid, Sampler, Scheduler, to_x0

_RUNGE_KUTTA_STEPS = 3
_RUNGE_KUTTA = 4 * _RUNGE_KUTTA_STEPS  # evaluations
_STAGES = ((1.0,), (1.0,), (1.0,), (1 / 6, 1 / 3, 1 / 3, 1 / 6))  # weights, latest first
ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams-Bashforth's weights of the latest 1, 2, 3, 4 outputs for equal steps, latest first."""


def _grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    times = sch.whole(sch.spaced(arguments, steps), arguments)
    if arguments.skip_prk_steps:
        times = np.concatenate([times[:2], times[1:]])
    else:
        if steps <= _RUNGE_KUTTA_STEPS:
            raise UsageError(
                f"steps is {steps}; pndm begins with {_RUNGE_KUTTA_STEPS} Runge-Kutta steps here "
                f"(skip_prk_steps false): take at least {_RUNGE_KUTTA_STEPS + 1}"
            )
        half = arguments.num_train_timesteps // steps // 2
        start_up = [
            (times[k], times[k + 1] + half, times[k + 1] + half, times[k + 1])
            for k in range(_RUNGE_KUTTA_STEPS)
        ]
        times = np.concatenate([np.ravel(start_up), times[3:]])
    return Grid(sch.NoiseSchedule.from_arguments(arguments), times)


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    times = grid.timesteps.tolist()
    runge_kutta = 0 if arguments.skip_prk_steps else _RUNGE_KUTTA
    steps = len(times) - (9 if runge_kutta else int(len(times) > 1))
    stride = len(grid.schedule) // steps
    kept: list[int] = []  # the evaluations whose outputs Adams-Bashforth combines, latest first
    for count, timestep in enumerate(times[start:]):
        weights: tuple[float, ...]
        again = False  # True if the step starts where the last one did
        if count < runge_kutta:
            stage = count % 4
            if stage == 0:
                kept.insert(0, count)
            here = times[count - stage]
            there = timestep - (0 if stage % 2 else stride // 2)
            weights, again = _STAGES[stage], stage > 0
        elif count == 1:  # the first step once more, with the mean of both ends
            here, there, weights, again = timestep + stride, timestep, (1 / 2, 1 / 2), True
        else:
            kept = [count, *kept[:3]]
            here, there = timestep, timestep - stride
            weights = _spread(ADAMS[len(kept) - 1], [count - k for k in kept])
        yield _row(arguments, grid, timestep, here, there, weights, again)


def _spread(weights: Sequence[float], places: Sequence[int]) -> tuple[float, ...]:
    """Put `weights` at `places` of a tuple that is zero elsewhere."""
    spread = [0.0] * (places[-1] + 1)
    for weight, place in zip(weights, places, strict=True):
        spread[place] = weight
    return tuple(spread)


def _row(
    arguments: SchedulerArguments,
    grid: Grid,
    timestep: int,
    here: int,
    there: int,
    weights: Sequence[float],
    again: bool,
) -> Row:
    """Return DDIM's step from timestep `here` to `there` with the noise that `weights` combine."""
    known = grid.schedule.alphas_cumprod
    final = 1.0 if arguments.set_alpha_to_one else float(known[0])
    alpha, sigma = level(float(known[here]))
    alpha_next, sigma_next = level(float(known[there]) if there >= 0 else final)
    scale, push = alpha_next / alpha, sigma_next - alpha_next / alpha * sigma
    if arguments.prediction_type == "v_prediction":  # noise = alpha v + sigma x, of the combined v
        scale, push = scale + push * sigma, push * alpha
    seen = level(float(known[timestep]))
    return Row(
        timestep=timestep,
        level=seen,
        x0=to_x0(arguments.prediction_type, *seen),
        data=(0.0, 1.0),
        anchor_x=float(not again),
        anchor_last=float(again),
        scale=scale,
        weights=tuple(push * weight for weight in weights),
    )


PNDM = Scheduler(
    reference="PNDMScheduler",
    defaults={
        **TRAINING,
        "skip_prk_steps": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    },
    choices={"prediction_type": ("epsilon", "v_prediction")},
    grid=_grid,
    rows=_rows,
)

SAMPLERS = (Sampler("pndm", "PLMS", PNDM),)
