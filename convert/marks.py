"""Marks: what a single file says about the training of its model, beyond names and shapes.

Three places can say it, the most certain first: tensors that are there as marks only (ComfyUI's
v_pred and ztsnr, Playground's edm_mean, CosXL's edm_vpred.*, the noise schedule itself); the
metadata of a safetensors file (modelspec.*); a .yaml of the file's name beside it, as A1111 reads
it (original_config.py). What the weights say counts more than any config, except for an option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlxdiff import samplers
from mlxdiff.errors import CheckpointError, UsageError, argument
from mlxdiff.weights.tensors import LazyTensor

Config = dict[str, Any]
PREDICTIONS = ("epsilon", "v_prediction", "sample")

# alphas_cumprod ends at 0 to 5e-8 with zero terminal SNR, at 0.0047 in published schedules.
_ZERO_SNR = 1e-4
_SIDES = range(64, 4097, 8)
_RESOLUTION = re.compile(r"(\d{2,4})(?:x(\d{2,4}))?", re.ASCII)
_WORDS = {"prediction": "prediction type", "zero_snr": "zero terminal SNR", "size": "resolution"}

# scheduler_config.json of playgroundai/playground-v2.5-1024px-aesthetic.
_PLAYGROUND: Config = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sample_max_value": 1.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
}
_PLAYGROUND_SCALE = 0.5
# As diffusers' guide has it for stabilityai/cosxl; the file itself has sigma_min and sigma_max.
_COSXL: Config = {
    "_class_name": "EDMEulerScheduler",
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
}


@dataclass(frozen=True)
class Said:
    """A value, and what says it, in words."""

    value: Any
    by: str


@dataclass(frozen=True)
class Marks:
    """Facts about the training; None or empty if unknown.

    Attributes:
        prediction: "epsilon", "v_prediction" or "sample".
        zero_snr: True if the noise schedule ends at zero signal.
        process: a whole scheduler_config.json, where the noise is not DDPM's.
        size: (height, width) of the training pictures, in pixels.
        ema: True if the moving averages are to be used.
        scheduler, unet, vae: further keys of the configs.
        notes: what contradicts, one line each.
    """

    prediction: Said | None = None
    zero_snr: Said | None = None
    process: Said | None = None
    size: Said | None = None
    ema: Said | None = None
    scheduler: Config = field(default_factory=dict)
    unet: Config = field(default_factory=dict)
    vae: Config = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def over(self, other: Marks) -> Marks:
        """Return both together. Where they contradict, these count, with a note."""
        notes = [*self.notes, *other.notes]
        found: dict[str, Said | None] = {}
        for name in ("prediction", "zero_snr", "process", "size", "ema"):
            mine, theirs = getattr(self, name), getattr(other, name)
            found[name] = theirs if mine is None else mine
            if mine is not None and theirs is not None and mine.value != theirs.value:
                notes.append(
                    f"{_WORDS.get(name, name)}: {mine.by} says {_shown(mine.value)}, {theirs.by} "
                    f"says {_shown(theirs.value)}; the former counts"
                )
        return replace(
            self,
            **found,
            scheduler=other.scheduler | self.scheduler,
            unet=other.unet | self.unet,
            vae=other.vae | self.vae,
            notes=tuple(notes),
        )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):  # (height, width)
        return f"{value[1]}x{value[0]}"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------ from the file


def of_tensors(tensors: Mapping[str, LazyTensor], where: str) -> Marks:
    """Read the tensors that are marks.

    Args:
        where: the file, for messages.
    Raises: CheckpointError for a mark without the values that it needs.
    """
    found = Marks()
    if "v_pred" in tensors:
        found = replace(found, prediction=Said("v_prediction", "the mark v_pred"))
    if "ztsnr" in tensors:
        found = replace(found, zero_snr=Said(True, "the mark ztsnr"))
    else:
        schedule = tensors.get("alphas_cumprod")
        if schedule is not None and len(schedule.shape) == 1 and schedule.size:
            first, last = np.asarray(schedule.read(), np.float32)[[0, -1]]
            if first > 0.9 and abs(last) < _ZERO_SNR:
                found = replace(found, zero_snr=Said(True, "alphas_cumprod"))
    if "edm_mean" in tensors or "edm_std" in tensors:
        mean, std = (_numbers(tensors, name, where) for name in ("edm_mean", "edm_std"))
        if len(mean) != len(std) or any(value <= 0 for value in std):
            raise CheckpointError(f"{where}: edm_mean and edm_std do not fit; the file is damaged")
        found = replace(
            found,
            process=Said(_PLAYGROUND, "edm_mean"),
            vae={
                "scaling_factor": _PLAYGROUND_SCALE,
                "latents_mean": mean,
                "latents_std": std,
            },
        )
    elif "edm_vpred.sigma_max" in tensors or "edm_vpred.sigma_min" in tensors:
        ends = {
            end: _numbers(tensors, f"edm_vpred.{end}", where)[0]
            for end in ("sigma_max", "sigma_min")
        }
        found = replace(found, process=Said(_COSXL | ends, "edm_vpred.sigma_max"))
    return found


def _numbers(tensors: Mapping[str, LazyTensor], name: str, where: str) -> list[float]:
    """Return the values of a small tensor. Raises: CheckpointError."""
    if name not in tensors or not 1 <= tensors[name].size <= 64:
        raise CheckpointError(f"{where}: {name} is missing or misshapen; download the file again")
    values = np.asarray(tensors[name].read(), np.float64).ravel()
    if not np.isfinite(values).all():
        raise CheckpointError(f"{where}: {name} holds values that are not finite")
    # float32 in decimal, as diffusers' configs hold such numbers.
    return [float(f"{value:.7g}") for value in values]


def of_metadata(metadata: Mapping[str, str], where: str) -> Marks:
    """Read modelspec.prediction_type (or predict_key) and modelspec.resolution (WIDTHxHEIGHT).

    Raises: CheckpointError for a prediction type that mlxdiff does not have.
    """
    found = Marks()
    for key in ("modelspec.predict_key", "modelspec.prediction_type"):
        said = metadata.get(key, "").strip().lower().replace("-", "_")
        if not said:
            continue
        prediction = {
            **dict.fromkeys(("v", "v_pred", "v_prediction"), "v_prediction"),
            **dict.fromkeys(("eps", "epsilon"), "epsilon"),
            **dict.fromkeys(("x0", "sample"), "sample"),
        }.get(said)
        if prediction is None:
            raise CheckpointError(
                f"{where}: {key} in its metadata is {said[:40]!r}, which mlxdiff does not have; it "
                f"has {', '.join(PREDICTIONS)}: if one of them is right, say so with "
                f"{argument('prediction_type')}"
            )
        found = replace(found, prediction=Said(prediction, key))
    text = metadata.get("modelspec.resolution", "").strip().lower()
    if text:
        match = _RESOLUTION.fullmatch(text)
        sides = [int(side) for side in match.groups() if side] if match else []
        if sides and all(side in _SIDES for side in sides):
            size = sides[-1], sides[0]
            found = replace(found, size=Said(size, "modelspec.resolution"))
        else:
            note = f"modelspec.resolution {text[:40]!r} is not WIDTHxHEIGHT; it does not count"
            found = replace(found, notes=(note,))
    return found


# ------------------------------------------------------------------------------- what counts


def settle(
    marks: Marks,
    config: Mapping[str, Any],
    *,
    prediction_type: str | None,
    zero_snr: bool | None,
    folder: str | None,
) -> tuple[Config, tuple[str, ...]]:
    """Return the scheduler_config.json of a model, and what was decided against what.

    Args:
        config: the scheduler's config without the marks.
        prediction_type, zero_snr: options; None: not given. They count more than the marks.
        folder: where `config` comes from, for notes; None: it was derived from the file.
    Raises: UsageError if an option has no meaning for the model's noise.
    """
    notes: list[str] = []
    result = dict(config)
    if marks.process is not None and not samplers.is_edm(config):
        result = dict(marks.process.value)
        if folder is not None:
            notes.append(
                f"scheduler: {result['_class_name']}, as {marks.process.by} says; {folder} has "
                f"{config.get('_class_name')}"
            )
    for key, value in marks.scheduler.items():
        if folder is not None and result.get(key, value) != value:
            notes.append(f"{key}: {value}, as the .yaml says; {folder} has {result[key]}")
        result[key] = value
    options = f"{argument('prediction_type')} overrides both"
    result["prediction_type"] = _decide(
        "prediction",
        marks.prediction,
        prediction_type,
        result.get("prediction_type", "epsilon"),
        folder and f"{folder} has {{}} ({options})",
        notes,
    )
    if samplers.is_continuous(result):
        if zero_snr is not None:
            raise UsageError(
                f"{argument('zero_snr')}: this model was trained with EDM's noise, which has none"
            )
        return result, tuple(notes)
    had = bool(result.get("rescale_betas_zero_snr"))
    has = _decide(
        "zero_snr",
        marks.zero_snr,
        zero_snr,
        had,
        folder and f"{folder} has {{}} ({argument('zero_snr')} overrides both)",
        notes,
    )
    if has and not had:
        result |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if not _takes_zero_snr(result.get("_class_name")):
            result["_class_name"] = "DDIMScheduler"
        if folder is None:
            notes.append("its noise schedule ends at zero signal")
    elif had and not has:
        result["rescale_betas_zero_snr"] = False
    return result, tuple(notes)


def _decide(
    name: str, said: Said | None, asked: Any, other: Any, folder: str | None, notes: list[str]
) -> Any:
    """Return the value that counts: what is asked for, what the file says, what else is known."""
    what = _WORDS[name]
    if asked is not None:
        if said is not None and said.value != asked:
            notes.append(
                f"{what}: {_shown(asked)}, as asked for; {said.by} says {_shown(said.value)}"
            )
        return asked
    if said is None:
        return other
    if folder is not None and said.value != other:
        rest = folder.format(_shown(other))
        notes.append(f"{what}: {_shown(said.value)}, as {said.by} says; {rest}")
    return said.value


def _takes_zero_snr(class_name: Any) -> bool:
    """Return True if a scheduler class has the argument rescale_betas_zero_snr."""
    known: Iterable[Any] = (one.scheduler for one in samplers.SAMPLERS.values())
    return any(
        one.reference == class_name and "rescale_betas_zero_snr" in one.defaults for one in known
    )
