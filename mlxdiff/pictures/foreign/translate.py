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
from mlxdiff.samplers.registry import SAMPLERS, has_schedule

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
    " sgm uniform": "trailing",
}


def settings(record: Record) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of ``metadata.Metadata``, and its ``extra``: options by their keys."""
    sampler, schedule = sampler_and_schedule(record)
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
        "loras": [
            {"name": one.name, "scale": one.scale}
            | ({} if one.text_scale is None else {"text_scale": one.text_scale})
            for one in record.loras
        ]
        or None,
        "parameters": dict(record.named) or None,
    }
    return fields, {key: value for key, value in extra.items() if value is not None}


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
    said = (record.schedule or "").strip()
    if own is None and said.lower() in _NO_SCHEDULE:
        own = record.automatic or (_even(sampler) if record.even else None)
    elif own is None and said.lower() in _EVEN:
        own = _even(sampler) if record.even else "normal"
    elif own is None or said.lower() not in _NO_SCHEDULE:
        own = find_schedule(said) or said
    if own is None and record.sampler is not None:
        # What is built on diffusers takes the schedule of the model's own file.
        own = "normal" if sampler in SAMPLERS and not record.even else "auto"
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
