"""A linear multistep method with numbers that were fitted to one model, for few steps.

A step is that of DPM-Solver++ 2M plus a linear combination of the sample and the latest predictions
of x_0:

    x' = 2M(x, x_0, x_0 before) + e * x + sum of e_k * (k-th latest x_0)

DPM-Solver++ and similar solvers compute their coefficients from the noise levels alone, as if x_0
were a polynomial in lambda. Here a least-squares fit over prompts and seeds chooses timesteps and
numbers, so that runs of this model come closest to its own fine solution. The way of x_0 along a
run depends on the guidance scale. So a fit covers one scale, or a range of scales: then both ends
have the same timesteps, and the numbers are interpolated between the ends.

The fits stand in the model's scheduler_config.json, under a key that diffusers skips:

    "_mlxdiff_fitted": [{"guidance": [4.0], "runs": {"8": [[[999, [e, e_0]], ...]], ...}},
                        {"guidance": [4.0, 7.5], "runs": {"8": [[[999, [e, e_0]], ...],
                                                                [[999, [e, e_0]], ...]], ...}},
                        ...]

by step count, one run for each scale. examples/train_builtin/fit_sampler.py makes the fits.
docs/few_step.md shows the gain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.dpm_solver import second_order
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import TRAINING, Grid, Sampler, Scheduler, vp_terms

KEY = "_mlxdiff_fitted"


def available(config: Mapping[str, Any], steps: int, guidance: float | None) -> bool:
    """Return True if the model has a fit for this step count at this guidance scale (None: no)."""
    if KEY not in config or guidance is None:
        return False
    return _find(_checked(config[KEY]), steps, max(guidance, 1.0)) is not None


def overrides(config: Mapping[str, Any], steps: int, guidance: float | None) -> dict[str, Any]:
    """Return the arguments of FITTED for a run.

    Raises: UsageError if no fit covers the step count and the guidance scale.
    """
    if KEY not in config:
        raise UsageError("sampler fitted: this model has not been fitted; choose another sampler")
    fits = _checked(config[KEY])
    scale = 1.0 if guidance is None else max(guidance, 1.0)  # up to 1 there is no guidance
    found = _find(fits, steps, scale)
    if found is None:
        counts = ", ".join({count: None for fit in fits for count in fit["runs"]})
        scales = [scale for fit in fits for scale in fit["guidance"]] or [0.0]
        raise UsageError(
            f"sampler fitted: this model was fitted for {counts} steps at guidance "
            f"{min(scales):g} to {max(scales):g}; not for {steps} steps at guidance {scale:g}"
        )
    return {"run": _between(found["guidance"], found["runs"][str(steps)], scale)}


def _find(fits: Sequence[Any], steps: int, scale: float) -> Any:
    """Return the narrowest fit that covers the step count and the scale, or None."""
    covering = [
        fit
        for fit in fits
        if fit["guidance"][0] <= scale <= fit["guidance"][-1] and str(steps) in fit["runs"]
    ]
    return min(covering, key=lambda fit: fit["guidance"][-1] - fit["guidance"][0], default=None)


def _between(scales: Sequence[float], runs: Sequence[Any], scale: float) -> list[Any]:
    """Interpolate the run for a guidance scale between the runs of the first and the last scale."""
    width = scales[-1] - scales[0]
    share = (scale - scales[0]) / width if width > 0 else 0.0
    return [
        [time, [a + share * (b - a) for a, b in zip(low, high, strict=True)]]
        for (time, low), (_, high) in zip(runs[0], runs[-1], strict=True)
    ]


def _checked(fits: Any) -> Sequence[Any]:
    """Return the fits; raise ConfigError if they are malformed."""
    try:
        sound = isinstance(fits, list) and all(_is_fit(fit) for fit in fits)
    except (TypeError, KeyError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise ConfigError(f"scheduler_config.json: {KEY} is malformed; fit again, or remove it")
    assert isinstance(fits, list)
    return fits


def _is_fit(fit: Any) -> bool:
    scales = [float(scale) for scale in fit["guidance"]]
    return (
        1 <= len(scales) <= 2
        and scales[0] >= 1.0
        and scales == sorted(set(scales))
        and all(
            len(runs) == len(scales)
            and all(_is_run(int(steps), run) for run in runs)
            and len({tuple((time, len(numbers)) for time, numbers in run) for run in runs}) == 1
            for steps, runs in fit["runs"].items()
        )
    )


def _is_run(steps: int, run: Sequence[Any]) -> bool:
    times = [time for time, _ in run]
    return (
        len(run) == steps
        and all(type(time) is int and time >= 0 for time in times)
        and times == sorted(set(times), reverse=True)
        and all(len(numbers) >= 2 for _, numbers in run)
        and all(math.isfinite(number) for _, numbers in run for number in numbers)
    )


def _grid(arguments: SchedulerArguments, steps: int, custom: sch.Levels | None) -> Grid:
    schedule = sch.NoiseSchedule.from_arguments(arguments)
    times = np.array([time for time, _ in arguments.run], np.int64)
    if times[0] >= len(schedule):
        raise ConfigError(
            f"scheduler_config.json: {KEY} begins at timestep {times[0]}; "
            f"the model was trained on {len(schedule)}"
        )
    return Grid(schedule, times, np.append(schedule.sigmas_karras[times], np.float32(0)))


def _rows(arguments: SchedulerArguments, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    if start > 0:
        raise UsageError("sampler fitted runs from noise to picture only; choose another sampler")
    for (time, numbers), sigma, usual in zip(
        arguments.run, grid.levels(), second_order(grid.levels()), strict=False
    ):
        of_x, weights = usual
        more, *of_data = map(float, numbers)
        both = itertools.zip_longest(weights, of_data, fillvalue=0.0)
        yield Row(
            timestep=time,
            **vp_terms(arguments, *sch.alpha_sigma(sigma)),
            scale=of_x + more,
            weights=tuple(weight + number for weight, number in both),
        )


FITTED = Scheduler(reference=None, defaults={**TRAINING, "run": None}, grid=_grid, rows=_rows)

SAMPLERS = (Sampler("fitted", "Fitted", FITTED),)
