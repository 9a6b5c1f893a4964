"""A linear multistep method whose numbers were fitted to one model, to need few steps.

The row of a multistep sampler steps from x to a * x + sum_k b_k * (k-th latest x_0). DPM-Solver++
and its kin derive a and b_k from the noise levels alone, as if x_0 were a polynomial in lambda;
here timesteps, a and b_k are those with which this model's runs come closest to its own fine
solution, by least squares over prompts, seeds and guidance scales. How x_0 moves along a run
depends on the guidance scale g, so each coefficient is a line in it: c[0] + c[1] * (g - 1).

The numbers stand in the model's scheduler_config.json, under a key that diffusers skips:

    "_mlxdiff_fitted": {"guidance": [1.0, 10.0],                      lowest and highest g fitted to
                        "runs": {"8": [[999, [[a, a'], [b_0, b_0'], ...]], ...]}}      by step count

examples/train_builtin/fit_sampler.py makes them; docs/few_step.md shows what they gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers import schedule as sch
from mlxdiff.samplers.family import TRAINING, Family, Grid, data_terms
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.settings import Settings

KEY = "_mlxdiff_fitted"


def available(config: Mapping[str, Any], steps: int, guidance: float | None) -> bool:
    """Whether the model has been fitted for this many steps at this guidance scale (None: no)."""
    if KEY not in config or guidance is None:
        return False
    low, high = _range(config[KEY])
    return low <= max(guidance, 1.0) <= high and str(steps) in config[KEY]["runs"]


def overrides(config: Mapping[str, Any], steps: int, guidance: float | None) -> dict[str, Any]:
    """The arguments of FITTED for a run. Raises: UsageError where it was not fitted for that."""
    if KEY not in config:
        raise UsageError("sampler fitted: this model has not been fitted; choose another sampler")
    low, high = _range(config[KEY])
    scale = 1.0 if guidance is None else max(guidance, 1.0)  # up to 1 there is no guidance
    runs = config[KEY]["runs"]
    if str(steps) not in runs:
        raise UsageError(
            f"sampler fitted: this model was fitted for {', '.join(runs)} steps, not {steps}"
        )
    if not low <= scale <= high:
        raise UsageError(
            f"sampler fitted: this model was fitted for guidance {low:g} to {high:g}, not {scale:g}"
        )
    return {"run": runs[str(steps)], "guidance": scale}


def _range(fit: Any) -> tuple[float, float]:
    """(lowest, highest) guidance; ConfigError where the entry is not one of ours."""
    try:
        low, high = (float(scale) for scale in fit["guidance"])
        sound = 1.0 <= low <= high and all(_is_run(n, rows) for n, rows in fit["runs"].items())
    except (TypeError, KeyError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise ConfigError(f"scheduler_config.json: {KEY} is malformed; fit again, or remove it")
    return low, high


def _is_run(steps: str, rows: Sequence[Any]) -> bool:
    times = [time for time, _ in rows]
    pairs = [pair for _, coefficients in rows for pair in coefficients]
    return (
        len(rows) == int(steps)
        and all(type(time) is int and time >= 0 for time in times)
        and times == sorted(set(times), reverse=True)
        and all(len(coefficients) >= 2 for _, coefficients in rows)
        and all(math.isfinite(value) for value_and_slope in pairs for value in value_and_slope)
        and all(len(pair) == 2 for pair in pairs)
    )


def _grid(settings: Settings, steps: int, custom: Sequence[int] | None) -> Grid:
    schedule = sch.NoiseSchedule.from_settings(settings)
    times = np.array([time for time, _ in settings.run], np.int64)
    if times[0] >= len(schedule):
        raise ConfigError(
            f"scheduler_config.json: {KEY} begins at timestep {times[0]}; "
            f"the model was trained on {len(schedule)}"
        )
    return Grid(schedule, times, np.append(schedule.sigmas_karras[times], np.float32(0)))


def _rows(settings: Settings, grid: Grid, start: int, eta: float) -> Iterator[Row]:
    if start > 0:
        raise UsageError("sampler fitted runs from noise to picture only; choose another sampler")
    above = settings.guidance - 1.0
    for (time, coefficients), sigma_karras in zip(settings.run, grid.levels(), strict=False):
        alpha, sigma = sch.alpha_sigma(sigma_karras)
        scale, *weights = (float(value + slope * above) for value, slope in coefficients)
        yield Row(
            timestep=time,
            level=(alpha, sigma),
            **data_terms(settings, alpha, sigma),
            scale=scale,
            weights=tuple(weights),
        )


FITTED = Family(
    name="fitted",
    defaults={**TRAINING, "run": None, "guidance": 1.0},
    grid=_grid,
    rows=_rows,
)
