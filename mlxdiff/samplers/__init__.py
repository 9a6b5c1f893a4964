"""Samplers: the ways from noise to a picture in n steps. One code for both backends, without mlx.

    plan = samplers.plan(scheduler_config, "dpmpp-2m", "karras", 12)
    x, state = plan.init_noise_sigma * noise, plan.start()
    for t in plan.timesteps:
        output = network(plan.scale_model_input(x, state), t)
        x, state = plan.step(x, output, state)

A sampler's id means a scheduler class of diffusers, built from the checkpoint's
scheduler_config.json by `X.from_config` (arguments.py). Each equals that class in timesteps, sigmas
and every step. docs/samplers.md describes each sampler. docs/extending.md shows how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlxdiff.errors import ConfigError, UsageError, argument
from mlxdiff.samplers import fitted, levels
from mlxdiff.samplers.arguments import SchedulerArguments
from mlxdiff.samplers.ddim import DDPM
from mlxdiff.samplers.defaults import (
    PIXELS,
    advised_guidance,
    automatic,
    distilled_for,
    is_turbo,
)
from mlxdiff.samplers.names import find_schedule, resolve, spelled
from mlxdiff.samplers.plan import Plan, Row, State
from mlxdiff.samplers.process import check_process, is_continuous, is_edm
from mlxdiff.samplers.registry import (
    NAMES,
    SAMPLERS,
    SCHEDULE_ARGUMENTS,
    SCHEDULES,
    SIGMA_FLAGS,
    find,
    has_schedule,
    of_class,
    samplers_for,
    schedule_arguments,
)
from mlxdiff.samplers.schedule import Levels, NoiseSchedule, check_steps
from mlxdiff.samplers.scheduler import Grid, Scheduler

__all__ = [
    "NAMES",
    "SAMPLERS",
    "SCHEDULES",
    "Plan",
    "Row",
    "State",
    "advised_guidance",
    "automatic",
    "check_process",
    "distilled_for",
    "evaluations_per_step",
    "find_schedule",
    "forward_process",
    "is_continuous",
    "is_edm",
    "is_turbo",
    "of_class",
    "plan",
    "reference_class",
    "resolve",
    "spelled",
    "takes_distilled_strength",
    "timesteps",
]


def plan(
    scheduler_config: Mapping[str, Any],
    sampler: str = "auto",
    schedule: str = "auto",
    steps: int = 20,
    *,
    eta: float | None = None,
    family: str | None = None,
    strength: float | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    distilled_strength: float | None = None,
    guidance: float | None = None,
    altered: bool = False,
    sigmas: Sequence[float] | None = None,
) -> Plan:
    """Compute all coefficients of a run of `steps` steps.

    Args:
        scheduler_config: the checkpoint's scheduler_config.json.
        sampler, schedule: ids from `NAMES` and `SCHEDULES`, or other names of theirs (names.py).
        steps: as diffusers counts num_inference_steps; len(plan) counts model evaluations.
        eta: share of fresh noise, 0 to 1, for the samplers that take it (None: 0).
        family: the model's family ("sd1", "sdxl", ...). It decides about schedules that were made
            for one family, and about the defaults of models that draw pixels ("ddpm").
        strength: image to image: run only this last share of the steps, 0 to 1.
        denoising_start, denoising_end: run only the timesteps between these shares of the way,
            0 to 1 (SDXL's base and refiner). denoising_start replaces strength.
        distilled_strength: sampler lcm: run all steps, over this last share of the timesteps that
            the model was distilled on (strength as LatentConsistencyModelImg2ImgPipeline takes it).
        guidance: scale of the guidance that the outputs will have, or None if unknown; `auto` and
            sampler fitted depend on it.
        altered: True if an output will not be the guided output of the whole network in every step.
            `auto` then does not take the fitted sampler.
        sigmas: the noise levels of the steps, in place of a schedule: Karras' sigma, falling.
    Raises: UsageError for an unknown id, a combination that does not exist, a number out of range;
        ConfigError for a scheduler_config.json that is not understood.
    """
    partial = any(share is not None for share in (strength, denoising_start, denoising_end))
    altered = altered or partial or sigmas is not None  # fits are for whole runs
    with _finite(sampler, steps):
        chosen = _choose(
            scheduler_config, sampler, schedule, steps, family, guidance, altered, sigmas
        )
    scheduler = chosen.scheduler
    if eta is not None and not scheduler.has_eta:
        having = [one.id for one in SAMPLERS.values() if one.scheduler.has_eta]
        raise UsageError(f"sampler {chosen.sampler} has no eta; {' and '.join(having)} have")
    _check_share("eta", eta)
    if distilled_strength is not None:
        if scheduler.distilled_timesteps is None or not 0.0 <= distilled_strength <= 1.0:
            having = [one.id for one in SAMPLERS.values() if one.scheduler.distilled_timesteps]
            raise UsageError(
                f"strength is {distilled_strength} for sampler {chosen.sampler}; "
                f"expected 0 to 1 and sampler {' or '.join(having)}"
            )
        times = scheduler.distilled_timesteps(chosen.arguments, steps, distilled_strength)
        known = NoiseSchedule.from_arguments(chosen.arguments)
        chosen = replace(chosen, custom=known.at(times))
    if is_continuous(scheduler_config) and (denoising_start, denoising_end) != (None, None):
        raise UsageError(
            f"{argument('denoising_start')}, {argument('denoising_end')}: this model takes "
            "continuous noise levels (EDM's) and "
            "has no numbered timesteps to divide between two models; draw with it alone"
        )
    with _finite(chosen.sampler, steps):
        grid = chosen.grid()
        first, last = _window(scheduler, grid, steps, strength, denoising_start, denoising_end)
        rows = tuple(scheduler.rows(chosen.arguments, grid, first, eta or 0.0))
        if not all(row.is_finite for row in rows):
            raise FloatingPointError
    return Plan(
        chosen.sampler,
        chosen.schedule,
        rows[: last - first],
        grid.init_noise_sigma,
        scheduler.evaluations_per_step,
        _interval(grid),
        scheduler.brownian,
    )


def _interval(grid: Grid) -> tuple[float, float] | None:
    """Return the lowest sigma of a run above 0, and the highest."""
    found = [] if grid.sigmas is None else [sigma for sigma in grid.levels() if sigma > 0.0]
    return (min(found), max(found)) if found else None


def timesteps(
    scheduler_config: Mapping[str, Any],
    sampler: str,
    schedule: str,
    steps: int,
    *,
    family: str | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the reference's `scheduler.timesteps` and `scheduler.sigmas` after set_timesteps.

    Returns: timesteps, int64 or float32 as the class has them, repeats included; sigmas, float32,
        the final one included, or None where the class has none.
    Raises: as `plan`.
    """
    with _finite(sampler, steps):
        grid = _choose(scheduler_config, sampler, schedule, steps, family).grid()
    return grid.timesteps, grid.sigmas


@contextmanager
def _finite(sampler: str, steps: int) -> Iterator[None]:
    """Turn arithmetic that fails into a ConfigError: the numbers of a file can be wild."""
    try:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            yield
    except (ArithmeticError, ValueError) as error:
        raise ConfigError(
            f"scheduler_config.json: its numbers give no finite schedule of {steps} steps for "
            f"sampler {sampler}; take fewer steps, another sampler, or the model's original file"
        ) from error


def evaluations_per_step(sampler: str) -> int:
    """Return the network evaluations that one step of a sampler id takes.

    1 for `auto` and `checkpoint`, whose class depends on the file: `Plan.evaluations_per_step`
    knows it.
    """
    return SAMPLERS[sampler].scheduler.evaluations_per_step if sampler in SAMPLERS else 1


def reference_class(scheduler_config: Mapping[str, Any], sampler: str) -> str | None:
    """Return the diffusers class of a sampler id other than `auto`, or None if it has none.

    Raises: ConfigError if `sampler` is `checkpoint` and the config names an unknown class.
    """
    return find(scheduler_config, sampler).scheduler.reference


def takes_distilled_strength(scheduler_config: Mapping[str, Any], sampler: str) -> bool:
    """Return True if a run with this sampler id can take `distilled_strength` (see `plan`)."""
    if sampler == "auto":
        sampler = distilled_for(scheduler_config) or "checkpoint"
    if sampler == "checkpoint":
        sampler = of_class(scheduler_config.get("_class_name")) or sampler
    return sampler in SAMPLERS and SAMPLERS[sampler].scheduler.distilled_timesteps is not None


def forward_process(scheduler_config: Mapping[str, Any]) -> np.ndarray:
    """Return alphas_cumprod of the forward process q(x_t | x_0) for each timestep: (T,) float32.

    Args:
        scheduler_config: of a DDPMScheduler.
    Raises: ConfigError for a config that is not understood or names another class.
    """
    name = scheduler_config.get("_class_name")
    if name != DDPM.reference:
        raise ConfigError(
            f"scheduler_config.json: _class_name is {name!r}, expected {DDPM.reference!r}"
        )
    return NoiseSchedule.from_arguments(DDPM.read(scheduler_config)).alphas_cumprod


def _check_share(name: str, value: float | None) -> None:
    """Raise UsageError unless the value is between 0 and 1, or None."""
    if value is not None and not 0.0 <= value <= 1.0:
        raise UsageError(f"{name} must be between 0 and 1, not {value}")


@dataclass(frozen=True)
class _Choice:
    """A resolved sampler and schedule."""

    sampler: str
    schedule: str
    scheduler: Scheduler
    arguments: SchedulerArguments
    steps: int
    custom: Levels | None

    def grid(self) -> Grid:
        """Return the timesteps and noise levels of the whole run."""
        return self.scheduler.grid(self.arguments, self.steps, self.custom)


def _choose(
    config: Mapping[str, Any],
    sampler: str,
    schedule: str,
    steps: int,
    family: str | None,
    guidance: float | None = None,
    altered: bool = False,
    sigmas: Sequence[float] | None = None,
) -> _Choice:
    """Resolve ids to a scheduler and its arguments; raise UsageError for what does not exist."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"scheduler_config.json must hold an object, not {type(config).__name__}")
    sampler, schedule = resolve(sampler, schedule)
    if sigmas is not None and schedule not in ("auto", "normal"):
        raise UsageError(f"sigmas replace a schedule; leave schedule {schedule} out")
    sampler, schedule = automatic(config, sampler, schedule, steps, family, guidance, altered)
    found = find(config, sampler)
    scheduler = found.scheduler
    if sigmas is not None:
        schedule = "normal"
        if not scheduler.takes_levels:
            having = [one.id for one in samplers_for(config).values() if one.scheduler.takes_levels]
            raise UsageError(
                f"sampler {sampler} takes no list of sigmas on this model; "
                f"{', '.join(having) or 'no sampler'} take one"
            )
    asked = schedule_arguments(scheduler, schedule)
    if asked is None:
        having = [name for name in SCHEDULE_ARGUMENTS if has_schedule(scheduler, name)]
        existing = samplers_for(config).values()
        others = [one.id for one in existing if has_schedule(one.scheduler, schedule)]
        of_this = " of this model" if is_continuous(config) else ""
        raise UsageError(
            f"sampler {sampler} has no schedule {schedule}; it has {', '.join(having)}; "
            f"{schedule} exists for {', '.join(others) or f'no sampler{of_this}'}"
        )
    overrides = {**found.arguments, **asked}
    if (schedule in levels.LEVELS and not asked) or set(asked) & set(SIGMA_FLAGS):
        # The schedule that the user asks for replaces the file's own spacing of sigmas.
        off = {flag: False for flag in SIGMA_FLAGS if flag in scheduler.defaults}
        overrides = {**off, **overrides}
    if scheduler is fitted.FITTED:
        overrides |= fitted.overrides(config, steps, guidance)
    arguments = scheduler.read(config, overrides, pixels=family == PIXELS)
    check_steps(steps, arguments)
    custom = None
    if sigmas is not None:
        custom = levels.given(arguments, sigmas)
    elif schedule in levels.LEVELS and not asked:
        custom = levels.LEVELS[schedule](arguments, steps, family)
    return _Choice(sampler, schedule, scheduler, arguments, steps, custom)


def _window(
    scheduler: Scheduler,
    grid: Grid,
    steps: int,
    strength: float | None,
    denoising_start: float | None,
    denoising_end: float | None,
) -> tuple[int, int]:
    """Return the grid indices (first, one past the last) of a run.

    Source: get_timesteps of diffusers' StableDiffusionImg2ImgPipeline and
    StableDiffusionXLImg2ImgPipeline.
    """
    given = {
        "strength": strength,
        "denoising_start": denoising_start,
        "denoising_end": denoising_end,
    }
    for name, value in given.items():
        _check_share(name, value)
    count, trained = len(grid.timesteps), len(grid.schedule)
    starts = grid.steps(scheduler.evaluations_per_step)
    shares = (denoising_start, denoising_end)
    if any(shares) and (np.diff(grid.timesteps) > 0).any():
        raise UsageError(
            "denoising_start, denoising_end: this sampler goes back to higher noise levels, so a "
            "timestep does not divide its run; choose another sampler"
        )
    first, last = 0, count
    if denoising_start:
        cutoff = round(trained - denoising_start * trained)
        left = int((grid.timesteps < cutoff).sum())
        # Do not begin in the middle of a step.
        first = max((index for index in starts if index <= count - left), default=0)
        if left == 0:
            first = count
    elif strength is not None:
        skipped = max(steps - int(steps * strength), 0)
        if len(starts) != steps:  # the steps of a run are not those that it is asked for
            skipped = skipped * len(starts) // steps
        first = starts[skipped] if skipped < len(starts) else count
    if denoising_end is not None and denoising_end < 1.0:
        cutoff = round(trained - denoising_end * trained)
        last = first + int((grid.timesteps[first:] >= cutoff).sum())
    if first >= last:
        said = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        way_out = "take another value"
        if denoising_start is None and strength is not None:
            way_out = f"take a strength of at least {math.ceil(100 / steps) / 100}, or more steps"
        raise UsageError(f"{said} leaves none of {steps} steps to run; {way_out}")
    return first, last
