"""One translation from what other programs say to our settings.

What can be honoured gets the name of our option. Everything else stays under its own name in
``parameters``, which the command line names in one note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mlxdiff.pictures.foreign.record import Record, short
from mlxdiff.samplers.names import find_sampler, find_schedule
from mlxdiff.samplers.registry import SAMPLERS, SCHEDULES, has_schedule

_NO_SCHEDULE = {"", "automatic", "default", "none", "native", "auto"}
_EVEN = {"normal", "uniform", "discrete", "linear"}
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"_gpu$", ""),  # ComfyUI: where the noise is drawn
    (r"^(sample|k)[_-]", ""),
    (r"^dpm\+\+(?=\d)", "dpm++ "),  # stable-diffusion.cpp
    (r"^(ddim|plms|unipc)(_|-).*$", r"\1"),
)
_SUFFIXES = {
    "_k": "karras",
    " karras": "karras",
    "_karras": "karras",
    " exponential": "exponential",
    " ays": "ays",
    " trailing": "trailing",
    "_trailing": "trailing",
    # ComfyUI's savers and stable-diffusion.cpp write both names behind each other.
    **{f"{space}{name}": name for space in " _" for name in ("normal", "simple", "discrete")},
    **{
        f"{space}{name}": name
        for space in " _"
        for name in ("sgm_uniform", "ddim_uniform", "beta", "kl_optimal", "smoothstep", "gits")
    },
}
_BROWNIAN = ("dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde")
"""Samplers whose noise is a Brownian motion's in all that is built on k-diffusion."""
_ELSEWHERE = {
    "dpmpp-2m-cfg++": "extrapolates otherwise there",
    "ipndm-v": "has other weights there, where steps differ in length",
    "deis": "is of third order there, over another variable",
    "unipc": "is of third order there, with other weights",
    "sa-solver": "is of higher order there",
}
"""Samplers of k-diffusion's kin by other formulas than ours, which are those of diffusers."""


def settings(record: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of ``metadata.Metadata``, and its ``extra``: options by their keys."""
    sampler, schedule = sampler_and_schedule(record)
    brownian = record.even and sampler in _BROWNIAN
    _name_differences(record, sampler, brownian)
    fields: dict[str, Any] = {
        name: getattr(record, name)
        for name in (
            "prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "seed", "width",
            "height", "steps", "guidance", "model",
        )
    }  # fmt: skip
    fields |= {
        "guidance_rescale": record.guidance_rescale or None,
        "sampler": sampler,
        "schedule": schedule,
        "clip_skip": None if record.clip_skip is None else max(record.clip_skip - 1, 0),
    }
    extra: dict[str, Any] = {
        "tool": _tool(record),
        "prompt_syntax": record.syntax,
        "image": record.image,
        "mask": record.mask,
        "strength": record.strength,
        "hires": record.hires,
        "hires_upscaler": record.hires_upscaler,
        "hires_strength": record.hires_strength,
        "hires_steps": record.hires_steps,
        "eta": record.eta or None,
        "vae": record.vae,
        "rng": record.rng,
        "sampler_rng": record.sampler_rng,
        "noise_seed_delta": record.noise_seed_delta or None,
        "seed_order": record.seed_order,
        "vary": None if record.vary is None else list(record.vary),
        "noise_size": None if record.noise_size is None else list(record.noise_size),
        "sigmas": record.sigmas,
        "seamless": record.seamless,
        "step_noise": "brownian" if brownian else None,
        "unread_prompt": record.unread_prompt,
        "loras": [
            {"name": one.name, "scale": one.scale}
            | ({} if one.text_scale is None else {"text_scale": one.text_scale})
            for one in record.loras
        ]
        or None,
        "parameters": dict(record.named) or None,
    }
    return fields, {key: value for key, value in extra.items() if value is not None}


def _is_of_comfyui(record: Record) -> bool:
    return record.even and record.rng == "cpu" and record.sampler_rng == "gpu"


def _name_differences(record: Record, sampler: str | None, brownian: bool) -> None:
    """Name what a program draws otherwise than mlxdiff, though it is honoured."""
    of_comfyui = _is_of_comfyui(record)
    if record.even and sampler in _ELSEWHERE:
        record.name({f"sampler {record.sampler}": _ELSEWHERE[sampler]})
    if brownian:
        on_gpu = (record.sampler or "").lower().endswith("_gpu") if of_comfyui else True
        if on_gpu and "gpu" in (record.rng, record.sampler_rng):
            record.name({"noise of the steps": "a Brownian motion drawn on a GPU; here on the CPU"})
        elif of_comfyui and record.image is not None and (record.strength or 1.0) < 1.0:
            record.name({"noise of the steps": "a Brownian motion over the steps that are left"})


def _tool(record: Record) -> str:
    version = short(record.version or "")
    if version.lower().startswith(record.tool.lower()):
        return version
    return f"{record.tool} {version}".strip()


def sampler_and_schedule(record: Record) -> tuple[str | None, str | None]:
    """Return our ids of a program's sampler and schedule. An unknown name stays as it is."""
    sampler: str | None = None
    own: str | None = None
    if record.sampler is not None:
        sampler, own = next(_found(record.sampler), (record.sampler, None))
    if sampler == "ddim" and _is_of_comfyui(record):
        sampler = "euler"  # the same, at the levels of any schedule
    if own in _EVEN:
        own = _even(sampler) if record.even else "normal"
    elif own is not None:
        own = find_schedule(own) or own
    said = (record.schedule or "").strip()
    if own is None and said.lower() in _NO_SCHEDULE:
        own = record.automatic or (_even(sampler) if record.even else None)
    elif own is None and said.lower() in _EVEN:
        own = _even(sampler) if record.even else "normal"
    elif own is None or said.lower() not in _NO_SCHEDULE:
        own = find_schedule(said) or said
    known = SAMPLERS.get(sampler or "")
    if own is None and record.sampler is not None:
        # What is built on diffusers takes the schedule of the model's own file.
        own = "normal" if known is not None and not record.even else "auto"
    elif known is not None and own in SCHEDULES and not record.even:
        # A class of diffusers leaves out an argument that it does not have.
        own = own if has_schedule(known.scheduler, own) else "normal"
    return sampler, own


def _even(sampler: str | None) -> str | None:
    """Return the schedule that has steps even in time, as k-diffusion has them."""
    known = SAMPLERS.get(sampler or "")
    if known is None:
        return None
    # DDIM and its kin step so there as well as in their classes of diffusers.
    even = str(known.scheduler.defaults.get("timestep_spacing", "linspace"))
    return even if has_schedule(known.scheduler, even) else "normal"


def _found(name: str) -> Iterator[tuple[str, str | None]]:
    """Yield what a name may mean here: as it is, and in the spellings of other programs."""
    for spelling in _spellings(name.strip()):
        if (found := find_sampler(spelling)) is not None:
            yield found
        for suffix, schedule in _SUFFIXES.items():
            if spelling.lower().endswith(suffix):
                found = find_sampler(spelling[: -len(suffix)])
                if found is not None:
                    yield found[0], schedule


def _spellings(name: str) -> Iterator[str]:
    yield name
    for pattern, other in _SPELLINGS:
        changed = re.sub(pattern, other, name, flags=re.IGNORECASE)
        if changed != name:
            name = changed
            yield name
