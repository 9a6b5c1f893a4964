"""The samplers and schedules that exist, by id. The one list of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers import (
    cfg_plus_plus,
    ddim,
    deis,
    dpm_fast,
    dpm_solver,
    dpmpp_3m_sde,
    er_sde,
    euler,
    fitted,
    heunpp,
    ipndm,
    lcm,
    lms,
    midpoint,
    pndm,
    restart,
    sa_solver,
    unipc,
)
from mlxdiff.samplers.levels import LEVELS
from mlxdiff.samplers.process import check_process, is_continuous, is_edm
from mlxdiff.samplers.scheduler import Sampler, Scheduler

# The order is the order of lists in messages and help.
_FILES = (
    dpm_solver,
    unipc,
    euler,
    midpoint,
    dpmpp_3m_sde,
    ddim,
    lms,
    pndm,
    ipndm,
    lcm,
    deis,
    er_sde,
    sa_solver,
    restart,
    heunpp,
    dpm_fast,
    cfg_plus_plus,
    fitted,
)
SAMPLERS: dict[str, Sampler] = {one.id: one for file in _FILES for one in file.SAMPLERS}
"""Sampler id -> sampler; without `auto` and `checkpoint`."""

SCHEDULE_ARGUMENTS: dict[str, tuple[dict[str, Any], ...]] = {
    "normal": ({},),
    "karras": ({"use_karras_sigmas": True}, {"sigma_schedule": "karras"}),
    "exponential": ({"use_exponential_sigmas": True}, {"sigma_schedule": "exponential"}),
    "beta": ({"use_beta_sigmas": True},),
    "lu": ({"use_lu_lambdas": True},),
    "trailing": ({"timestep_spacing": "trailing"},),
    "leading": ({"timestep_spacing": "leading"},),
    "linspace": ({"timestep_spacing": "linspace"},),
}
SCHEDULE_ARGUMENTS |= {name: () for name in LEVELS if name not in SCHEDULE_ARGUMENTS}
"""Schedule id -> the arguments that it sets: of the first set that the scheduler class takes; none
for the schedules of levels.py, which give the noise levels themselves."""

SIGMA_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""The arguments that choose a spacing of sigmas."""

NAMES = ("auto", "checkpoint", *SAMPLERS)
"""What `--sampler` takes."""

SCHEDULES = ("auto", *SCHEDULE_ARGUMENTS)
"""What `--schedule` takes."""


def check_known(what: str, name: str, names: tuple[str, ...]) -> None:
    """Raise UsageError unless the name of a sampler or schedule is one of `names`."""
    if name not in names:
        raise UsageError(f"unknown {what} {name!r}; there are {', '.join(names)}")


def schedule_arguments(scheduler: Scheduler, schedule: str) -> dict[str, Any] | None:
    """Return the arguments that a schedule sets, or None if the scheduler class takes none."""
    if schedule == "ays":  # whole timesteps, which more classes take
        return {} if scheduler.takes_timesteps else None
    for arguments in SCHEDULE_ARGUMENTS[schedule]:
        if set(arguments) <= set(scheduler.defaults):
            return arguments
    return {} if schedule in LEVELS and scheduler.takes_levels else None


def has_schedule(scheduler: Scheduler, schedule: str) -> bool:
    """Return True if the schedule exists for the scheduler."""
    return schedule_arguments(scheduler, schedule) is not None


def has_own_schedule(scheduler: Scheduler, schedule: str) -> bool:
    """Return True if the scheduler class itself has the schedule, as an argument."""
    return schedule == "normal" or bool(schedule_arguments(scheduler, schedule))


def samplers_for(config: Mapping[str, Any]) -> dict[str, Sampler]:
    """Return the samplers of a model by id, each with the scheduler for the model's process."""
    every = SAMPLERS.values()
    if is_edm(config):
        return {one.id: replace(one, scheduler=one.edm) for one in every if one.edm is not None}
    if is_continuous(config):
        return {one.id: one for one in every if "timestep_type" in one.scheduler.defaults}
    return SAMPLERS


def find(config: Mapping[str, Any], sampler: str) -> Sampler:
    """Return the sampler of an id other than `auto`.

    `checkpoint` is the class that the config names, without fixed arguments.
    Raises: UsageError for an unknown id, or an id that the model's process does not have;
        ConfigError if the config names a class or a process that is not implemented.
    """
    check_known("sampler", sampler, NAMES)
    check_process(config)
    existing = samplers_for(config)
    if sampler in existing:
        return existing[sampler]
    if sampler != "checkpoint":
        raise UsageError(
            f"sampler {sampler} does not exist for this model, which takes continuous noise "
            f"levels (EDM's); there are auto, checkpoint, {', '.join(existing)}"
        )
    classes = {one.scheduler.reference: one.scheduler for one in existing.values()}
    known = [name for name in classes if name is not None]
    name = config.get("_class_name")
    if name not in known:
        raise ConfigError(
            f"scheduler_config.json: _class_name {name!r} is not implemented "
            f"(there are {', '.join(known)}); choose a sampler by name"
        )
    return Sampler("checkpoint", "checkpoint", classes[name])


def of_class(name: str | None) -> str | None:
    """Return the id of the sampler that is this class of diffusers, with no fixed arguments."""
    for one in SAMPLERS.values():
        if name is not None and one.scheduler.reference == name and not one.arguments:
            return one.id
    return None
