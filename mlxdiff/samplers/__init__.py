"""Samplers: how a picture is reached from noise in n steps. One code for both backends, no mlx.

    plan = samplers.plan(scheduler_config, "dpmpp-2m", "karras", 12)
    x, state = plan.init_noise_sigma * noise, plan.start()
    for t in plan.timesteps:
        output = network(plan.scale_model_input(x, state), t)
        x, state = plan.step(x, output, state)

A sampler's id means a scheduler class of diffusers, built from the checkpoint's
scheduler_config.json by `X.from_config` (see settings.py); each equals it in timesteps, sigmas and
every step. docs/samplers.md says what each is and when to use it. To add one: a file with a
`Family`, and a line in `_SAMPLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlxdiff.errors import ConfigError, UsageError
from mlxdiff.samplers import ddim, deis, dpm_solver, euler, fitted, lcm, lms, pndm, unipc
from mlxdiff.samplers.family import Family, Grid
from mlxdiff.samplers.plan import Plan, Row, State
from mlxdiff.samplers.schedule import NoiseSchedule, ays, check_steps
from mlxdiff.samplers.settings import Settings

__all__ = [
    "NAMES",
    "SCHEDULES",
    "Plan",
    "Row",
    "State",
    "automatic",
    "distilled_for",
    "forward_process",
    "plan",
    "timesteps",
]

# id -> the class, and the arguments that the id fixes
_SAMPLERS: dict[str, tuple[Family, dict[str, Any]]] = {
    "dpmpp-2m": (dpm_solver.MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp-3m": (dpm_solver.MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmpp-2m-sde": (
        dpm_solver.MULTISTEP,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    ),
    "dpm-2m": (
        dpm_solver.MULTISTEP,
        {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"},
    ),
    "dpmpp-2s": (dpm_solver.SINGLESTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (unipc.UNIPC, {}),
    "euler": (euler.EULER, {}),
    "euler-a": (euler.ANCESTRAL, {}),
    "heun": (euler.HEUN, {}),
    "ddim": (ddim.DDIM, {}),
    "ddpm": (ddim.DDPM, {}),
    "lms": (lms.LMS, {}),
    "pndm": (pndm.PNDM, {}),
    "lcm": (lcm.LCM, {}),
    "tcd": (lcm.TCD, {}),
    "deis": (deis.DEIS, {}),
    "fitted": (fitted.FITTED, {}),
}
_CLASSES = {family.name: family for family, _ in _SAMPLERS.values()}

# id -> the arguments that the schedule sets
_SCHEDULES: dict[str, dict[str, Any]] = {
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
_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

PIXELS = "ddpm"
"""The family of models that draw pixels, not latents of a VAE."""

FEW_GUIDED, FEW_UNGUIDED = 20, 8
"""From so many steps on Karras' spacing does better than an even one, by measurement."""

NAMES = ("auto", "checkpoint", *_SAMPLERS)
SCHEDULES = ("auto", *_SCHEDULES)


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
) -> Plan:
    """A run of `steps` steps, worked out.

    Args:
        scheduler_config: the checkpoint's scheduler_config.json.
        sampler, schedule: ids from `NAMES` and `SCHEDULES`.
        steps: as diffusers counts num_inference_steps; len(plan) counts model evaluations.
        eta: share of fresh noise, 0 to 1, for the samplers that have it (None: 0).
        family: the model's family ("sd1", "sdxl", ...), for schedules made for one, and for what
            is different in pixels ("ddpm").
        strength: image to image: run only this last share of the steps, 0 to 1.
        denoising_start, denoising_end: run only the timesteps between these shares of the way,
            0 to 1 (SDXL's base and refiner); denoising_start takes the place of strength.
        distilled_strength: sampler lcm: run all steps, over this last share of the timesteps that
            the model was distilled on (strength as LatentConsistencyModelImg2ImgPipeline takes it).
        guidance: scale of the guidance that the outputs will have; `auto` and sampler fitted depend
            on it. None: there is some.
        altered: whether the outputs will not be those of the whole network, guided in all steps;
            `auto` does not take what was fitted then.
    Raises: UsageError for an unknown id, a combination that does not exist, a number out of range;
        ConfigError for a scheduler_config.json that is not understood.
    """
    partial = any(share is not None for share in (strength, denoising_start, denoising_end))
    altered = altered or partial  # what was fitted is whole runs
    chosen = _choose(scheduler_config, sampler, schedule, steps, family, guidance, altered)
    if eta is not None and not chosen.family.has_eta:
        having = [name for name, (other, _) in _SAMPLERS.items() if other.has_eta]
        raise UsageError(f"sampler {chosen.sampler} has no eta; {' and '.join(having)} have")
    _check_share("eta", eta)
    if distilled_strength is not None:
        if chosen.family is not lcm.LCM or not 0.0 <= distilled_strength <= 1.0:
            raise UsageError(
                f"strength is {distilled_strength} for sampler {chosen.sampler}; "
                "expected 0 to 1 and sampler lcm"
            )
        custom = lcm.timesteps(chosen.settings, steps, distilled_strength)
        chosen = replace(chosen, custom=custom)
    grid = chosen.grid()
    first, last = _window(chosen.family, grid, steps, strength, denoising_start, denoising_end)
    rows = tuple(chosen.family.rows(chosen.settings, grid, first, eta or 0.0))
    return Plan(chosen.sampler, chosen.schedule, rows[: last - first], grid.init_noise_sigma)


def timesteps(
    scheduler_config: Mapping[str, Any],
    sampler: str,
    schedule: str,
    steps: int,
    *,
    family: str | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The reference's `scheduler.timesteps` and `scheduler.sigmas` after set_timesteps(steps).

    Returns: timesteps, int64 or float32 as the class has them, repeats included; sigmas, float32,
        the final one included, or None where the class has none.
    Raises: as `plan`.
    """
    grid = _choose(scheduler_config, sampler, schedule, steps, family).grid()
    return grid.timesteps, grid.sigmas


def distilled_for(config: Mapping[str, Any]) -> str | None:
    """The sampler that a checkpoint was distilled for, to need a few steps only; else None.

    LCM and TCD by the scheduler's class. Models of adversarial distillation (SD-Turbo, SDXL-Turbo,
    SDXL-Lightning) are told by what the published files have in common and no others have: an Euler
    class with trailing timesteps, predicting noise, not trained to zero terminal SNR.
    """
    name = config.get("_class_name", "")
    euler_like = {"EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler-a"}
    if name in euler_like:
        turbo = (
            config.get("timestep_spacing") == "trailing"
            and config.get("prediction_type", "epsilon") == "epsilon"
            and not config.get("rescale_betas_zero_snr")
        )
        return euler_like[name] if turbo else None
    return {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}.get(name)


def forward_process(scheduler_config: Mapping[str, Any]) -> np.ndarray:
    """alphas_cumprod of the forward process q(x_t | x_0), for each timestep t: (T,) float32.

    Args:
        scheduler_config: of a DDPMScheduler.
    Raises: ConfigError for one that is not understood, or of another class.
    """
    name, ddpm = scheduler_config.get("_class_name"), ddim.DDPM
    if name != ddpm.name:
        raise ConfigError(f"scheduler_config.json: _class_name is {name!r}, expected {ddpm.name!r}")
    settings = Settings(scheduler_config, ddpm.name, ddpm.defaults, choices=ddpm.choices)
    return NoiseSchedule.from_settings(settings).alphas_cumprod


def automatic(
    config: Mapping[str, Any],
    sampler: str,
    schedule: str,
    steps: int,
    family: str | None = None,
    guidance: float | None = None,
    altered: bool = False,
) -> tuple[str, str]:
    """What `auto` means for a checkpoint: ids for whichever of `sampler` and `schedule` is "auto".

    Both left to us, a model that was fitted (fitted.py) for this many steps at this guidance scale
    takes what was fitted, unless the run is altered. Otherwise the sampler is dpmpp-2m, but for a
    model distilled to a few steps its own. The schedule is the checkpoint's for those; trailing
    where the checkpoint says so or has zero terminal SNR (its highest sigma is beyond what Karras'
    spacing was made for). Else karras, but trailing where the steps are few (`FEW_GUIDED`,
    `FEW_UNGUIDED`). Both start at the last training timestep, where the initial noise belongs,
    unlike the spacing that SDXL's config asks for. Evidence: docs/samplers.md, docs/few_step.md.
    """
    if (sampler, schedule) == ("auto", "auto") and not altered:
        if fitted.available(config, steps, guidance):
            return "fitted", "normal"
    distilled = distilled_for(config)
    if sampler == "auto":
        sampler = distilled or "dpmpp-2m"
    if schedule == "auto":
        few = FEW_UNGUIDED if guidance is not None and guidance <= 1.0 else FEW_GUIDED
        wanted = "karras" if steps >= few else "trailing"
        if config.get("timestep_spacing") == "trailing" or config.get("rescale_betas_zero_snr"):
            wanted = "trailing"
        # Models that draw pixels: nothing was measured, so the reference's own.
        if distilled or sampler == "checkpoint" or family == "ddpm":
            wanted = "normal"
        schedule = wanted if _exists(_family(config, sampler)[0], wanted) else "normal"
    return sampler, schedule


def _check_share(name: str, value: float | None) -> None:
    """Raise UsageError unless the value is between 0 and 1, or absent."""
    if value is not None and not 0.0 <= value <= 1.0:
        raise UsageError(f"{name} must be between 0 and 1, not {value}")


@dataclass(frozen=True)
class _Choice:
    """A sampler and a schedule, resolved."""

    sampler: str
    schedule: str
    family: Family
    settings: Settings
    steps: int
    custom: list[int] | None

    def grid(self) -> Grid:
        return self.family.grid(self.settings, self.steps, self.custom)


def _choose(
    config: Mapping[str, Any],
    sampler: str,
    schedule: str,
    steps: int,
    model_family: str | None,
    guidance: float | None = None,
    altered: bool = False,
) -> _Choice:
    """Ids to a class and its settings; UsageError for what does not exist."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"scheduler_config.json must hold an object, not {type(config).__name__}")
    for what, name, names in (("sampler", sampler, NAMES), ("schedule", schedule, SCHEDULES)):
        if name not in names:
            raise UsageError(f"unknown {what} {name!r}; there are {', '.join(names)}")
    sampler, schedule = automatic(config, sampler, schedule, steps, model_family, guidance, altered)
    family, overrides = _family(config, sampler)
    if not _exists(family, schedule):
        having = [name for name in _SCHEDULES if _exists(family, name)]
        others = [name for name, (other, _) in _SAMPLERS.items() if _exists(other, schedule)]
        raise UsageError(
            f"sampler {sampler} has no schedule {schedule}; it has {', '.join(having)}; "
            f"{schedule} exists for {', '.join(others)}"
        )
    overrides = {**overrides, **_SCHEDULES[schedule]}
    if schedule == "ays" or set(_SCHEDULES[schedule]) & set(_FLAGS):
        # The file's own spacing of sigmas gives way to the one that was asked for.
        overrides = {**{flag: False for flag in _FLAGS if flag in family.defaults}, **overrides}
    if family is fitted.FITTED:
        overrides = {**overrides, **fitted.overrides(config, steps, guidance)}
    defaults = family.defaults
    if model_family == PIXELS:
        defaults = {**defaults, **family.pixel_defaults}
    settings = Settings(config, family.name, defaults, overrides, family.choices)
    check_steps(steps, settings)
    custom = ays(settings, steps, model_family) if schedule == "ays" else None
    return _Choice(sampler, schedule, family, settings, steps, custom)


def _family(config: Mapping[str, Any], sampler: str) -> tuple[Family, dict[str, Any]]:
    """The class behind a sampler id (not `auto`), and the arguments that the id fixes."""
    if sampler != "checkpoint":
        return _SAMPLERS[sampler]
    name = config.get("_class_name")
    if name not in _CLASSES:
        raise ConfigError(
            f"scheduler_config.json: _class_name {name!r} is not implemented "
            f"(there are {', '.join(_CLASSES)}); choose a sampler by name"
        )
    return _CLASSES[name], {}


def _exists(family: Family, schedule: str) -> bool:
    """Whether the reference class takes the argument that the schedule sets."""
    return (
        family.takes_timesteps
        if schedule == "ays"
        else set(_SCHEDULES[schedule]) <= set(family.defaults)
    )


def _window(
    family: Family,
    grid: Grid,
    steps: int,
    strength: float | None,
    denoising_start: float | None,
    denoising_end: float | None,
) -> tuple[int, int]:
    """The grid indices (first, one past the last) that a run covers.

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
    first, last = 0, count
    if denoising_start:
        cutoff = round(trained - denoising_start * trained)
        left = int((grid.timesteps < cutoff).sum())
        if family.order == 2 and left % 2 == 0:  # do not begin in the middle of a two-stage step
            left += 1
        first = max(count - left, 0)
    elif strength is not None:
        first = max(steps - int(steps * strength), 0) * family.order
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
