"""The samplers and schedules that exist, by id. The one list of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers import (
    ddim,
    deis,
    dpm_solver,
    euler,
    fitted,
    lcm,
    lms,
    pndm,
    unipc,
)
from mlxdiff.samplers.scheduler import Sampler, Scheduler

# The order is the order of lists in messages and help.
_FILES = (
    dpm_solver,
    unipc,
    euler,
    ddim,
    lms,
    pndm,
    lcm,
    deis,
    fitted,
)
SAMPLERS: dict[str, Sampler] = {one.id: one for file in _FILES for one in file.SAMPLERS}
"""Sampler id -> sampler; without `auto` and `checkpoint`."""

SCHEDULE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "normal": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "ays": {},
}
"""Schedule id -> the arguments that it sets. `ays` passes a list of timesteps instead."""

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


def has_schedule(scheduler: Scheduler, schedule: str) -> bool:
    """Return True if the scheduler class takes the argument that the schedule sets."""
    if schedule == "ays":
        return scheduler.takes_timesteps
    return set(SCHEDULE_ARGUMENTS[schedule]) <= set(scheduler.defaults)


def find(config: Mapping[str, Any], sampler: str) -> Sampler:
    """Return the sampler of an id other than `auto`.

    `checkpoint` is the class that the config names, without fixed arguments.
    Raises: UsageError for an unknown id; ConfigError if the config names a class that is not
        implemented.
    """
    check_known("sampler", sampler, NAMES)
    if sampler != "checkpoint":
        return SAMPLERS[sampler]
    classes = {one.scheduler.reference: one.scheduler for one in SAMPLERS.values()}
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
