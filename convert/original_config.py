"""A .yaml beside a single file: the config of the LDM code, as A1111 reads it.

Names and shapes in the file decide the structure, so few keys count: those below. A key that means
something else than mlxdiff would do is an error, and so is an unknown one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxdiff.convert.marks import Config, Marks, Said
from mlxdiff.convert.plain_yaml import MAX_BYTES, NotPlain, parse
from mlxdiff.errors import CheckpointError

SUFFIXES = (".yaml", ".yml")
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
_NUMBERS = {  # key of model.params -> (config, key) that it becomes
    "linear_start": ("scheduler", "beta_start"),
    "linear_end": ("scheduler", "beta_end"),
    "timesteps": ("scheduler", "num_train_timesteps"),
    "scale_factor": ("vae", "scaling_factor"),
}
_FACTOR = 8  # pixels to a latent
_USUAL_LATENTS = 64  # every published file says so, also those of 768 pixels: it says nothing

# Key -> the values with which it means what mlxdiff does anyway.
_CHECKED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear",),
    "denoiser_config.target": ("DiscreteDenoiser",),
    "denoiser_config.params.discretization_config.target": ("LegacyDDPMDiscretization",),
    "denoiser_config.params.num_idx": (1000,),
    "unet_config.params.num_heads": (8, -1),
    "unet_config.params.num_head_channels": (64, -1),
    "network_config.params.num_heads": (8, -1),
    "network_config.params.num_head_channels": (64, -1),
    "cond_stage_config.params.layer": ("last", "penultimate"),
    "noise_aug_config.params.noise_schedule_config.timesteps": (1000,),
    "noise_aug_config.params.noise_schedule_config.beta_schedule": ("squaredcos_cap_v2",),
}
# Structure that the tensors show, and training.
_NO_EFFECT = re.compile(
    r"(?:unet|network|first_stage|cond_stage|conditioner|scheduler|optimizer|sampler|loss_fn"
    r"|personalization|low_scale|ema|log_images|denoiser|embedder|noise_aug)_config(?:\..+)?"
    r"|embedding_dropout"
    r"|num_timesteps_cond|log_every_t|first_stage_key|cond_stage_key|cond_stage_trainable"
    r"|conditioning_key|channels|monitor|finetune_keys|concat_keys|low_scale_key|ckpt_path"
    r"|ignore_keys|unet_trainable|embedding_reg_weight|cond_stage_forward|input_key|load_only_unet"
    r"|disable_first_stage_autocast|compile_model|en_and_decode_n_samples_a_time|loss_type"
    r"|no_cond_log|only_model|l_simple_weight|original_elbo_weight|v_posterior|logvar_init"
    r"|learn_logvar|control_key|only_mid_control|sd_locked"
)


def places(path: Path) -> list[Path]:
    """Return where a file's .yaml can stand: beside it, under its name."""
    return [path.with_suffix(suffix) for suffix in SUFFIXES]


def beside(path: Path) -> Path | None:
    """Return the .yaml of a file's name beside it, or None."""
    return next((place for place in places(path) if place.is_file()), None)


def read(path: Path) -> Marks:
    """Read a .yaml of the LDM code.

    Raises: CheckpointError for what is not plain YAML, an unknown key, or another meaning.
    """
    try:
        with path.open("rb") as file:
            text = file.read(4 * MAX_BYTES + 1).decode("utf-8")
        document = parse(text)
    except (UnicodeDecodeError, NotPlain) as error:
        raise _fault(path, f"cannot be read as the config of the model: {error}") from None
    model = document.get("model") if isinstance(document, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    if not isinstance(params, dict):
        return Marks(notes=(f"{path.name}: has no model.params; it does not count",))
    found = Marks()
    configs: dict[str, Config] = {"scheduler": {}, "vae": {}, "unet": {}}
    for key, value in _flat(params):
        by = f"{key} in {path.name}"
        if key == "parameterization":
            found = replace(found, prediction=Said(_one(path, key, value, _PREDICTIONS), by))
        elif key == "denoiser_config.params.scaling_config.target":
            name = str(value).rpartition(".")[2]
            found = replace(found, prediction=Said(_one(path, key, name, _SCALINGS), by))
        elif key == "use_ema":
            found = replace(found, ema=Said(_flag(path, key, value), by))
        elif key == "image_size":
            if type(value) is not int or not 8 <= value <= 512:
                raise _fault(path, f"{key} is {value!r}; expected 8 to 512, in latents")
            if value != _USUAL_LATENTS:
                side = value * _FACTOR
                found = replace(found, size=Said((side, side), by))
        elif key in _NUMBERS:
            config, name = _NUMBERS[key]
            if type(value) not in (int, float) or not 0 < value < 1e6:
                raise _fault(path, f"{key} is {value!r}; expected a number above 0")
            configs[config][name] = value
        elif key.endswith(("_config.params.upcast_attention", "_config.params.upcast_attn")):
            configs["unet"]["upcast_attention"] = _flag(path, key, value)
        elif key in _CHECKED:
            said = value.rpartition(".")[2] if isinstance(value, str) else value
            if said not in _CHECKED[key]:
                known = " or ".join(map(str, _CHECKED[key]))
                raise _fault(path, f"{key} is {said!r}; mlxdiff has {known} here")
        elif not _NO_EFFECT.fullmatch(key):
            raise _fault(path, f"model.params.{key} is unknown")
    scheduler, vae, unet = (configs[name] for name in ("scheduler", "vae", "unet"))
    return replace(found, scheduler=scheduler, vae=vae, unet=unet)


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is not a mapping."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _one(path: Path, key: str, value: Any, known: Mapping[str, str]) -> str:
    if value not in known:
        raise _fault(path, f"{key} is {value!r}; mlxdiff has {', '.join(known)}")
    return known[value]


def _flag(path: Path, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _fault(path, f"{key} is {value!r}; expected true or false")
    return value


def _fault(path: Path, what: str) -> CheckpointError:
    shown = what if len(what) <= 200 else f"{what[:200]}..."
    return CheckpointError(
        f"{path}: {shown}; mend the file, or move it away: then only the weights count"
    )
