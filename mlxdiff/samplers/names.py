"""Names of samplers and schedules: our ids, A1111's names, and the classes of diffusers.

A sampler is understood by any of them wherever one is named: `dpmpp-2m`, `DPM++ 2M Karras`,
`dpmpp_2m`, `DPMSolverMultistepScheduler`. Case does not matter, and `_` counts as `-`.
"""

from __future__ import annotations

from mlxdiff.errors import UsageError
from mlxdiff.samplers.registry import NAMES, SAMPLERS, SCHEDULES

SAMPLER_NAMES = {one.id: one.a1111 for one in SAMPLERS.values()}
"""Our sampler ids -> the names that A1111 shows, or would."""

SCHEDULE_NAMES = {
    "auto": "Automatic",
    "normal": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "lu": "Lu",
    "trailing": "Trailing",
    "leading": "Leading",
    "linspace": "Linspace",
    "ays": "Align Your Steps",
    "sgm-uniform": "SGM Uniform",
    "simple": "Simple",
    "ddim-uniform": "DDIM",
    "kl-optimal": "KL Optimal",
    "bong-tangent": "Bong Tangent",
    "gits": "GITS",
}
"""Our schedule ids -> A1111's "Schedule type"."""

_IN_SAMPLER = ("karras", "exponential")  # A1111 before 1.9 wrote the schedule behind the sampler


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", "-").split())


_SCHEDULE_IDS = {
    **{_plain(name): name for name in SCHEDULES},
    **{_plain(name): key for key, name in SCHEDULE_NAMES.items()},
    "polyexponential": "exponential",  # the same with its usual rho 1
    "discrete": "linspace",  # of stable-diffusion.cpp
    "align-your-steps": "ays",
}


def _sampler_ids() -> dict[str, str]:
    """All spellings of a sampler -> its id. A class means the first id that is this class."""
    found = {}
    for one in reversed(SAMPLERS.values()):
        if (reference := one.scheduler.reference) is not None:
            found[_plain(reference)] = found[_plain(reference.removesuffix("Scheduler"))] = one.id
    for one in SAMPLERS.values():
        found |= {_plain(name): one.id for name in (one.a1111, *one.also)}
    return found | {_plain(name): name for name in NAMES}


_SAMPLER_IDS = _sampler_ids()


def find_sampler(name: str) -> tuple[str, str | None] | None:
    """Return (sampler id, schedule id or None) of a sampler's name, or None if it is unknown."""
    plain = _plain(name)
    if plain in _SAMPLER_IDS:
        return _SAMPLER_IDS[plain], None
    head, _, schedule = plain.replace("-", " ").rpartition(" ")
    head = plain[: len(head)]
    if schedule in _IN_SAMPLER and head in _SAMPLER_IDS:
        return _SAMPLER_IDS[head], schedule
    return None


def spelled(name: str) -> str | None:
    """Return a sampler's id, with " SCHEDULE" behind it if its name gives one; None: unknown."""
    found = find_sampler(name)
    return None if found is None else " ".join(filter(None, found))


def find_schedule(name: str) -> str | None:
    """Return the id of a schedule's name, or None if it is unknown."""
    return _SCHEDULE_IDS.get(_plain(name))


def resolve(sampler: str, schedule: str) -> tuple[str, str]:
    """Return the ids of a sampler and a schedule, named in any way.

    Raises: UsageError for an unknown name, or a sampler's name that gives another schedule.
    """
    found = find_sampler(sampler)
    if found is None:
        raise UsageError(f"unknown sampler {sampler!r}; there are {', '.join(NAMES)}")
    own = find_schedule(schedule)
    if own is None:
        raise UsageError(f"unknown schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
    if found[1] is None or own == found[1]:
        return found[0], own
    if own != "auto":
        raise UsageError(f"sampler {sampler!r} names the schedule {found[1]}; leave {own} out")
    return found[0], found[1]
