"""A VAE in one file: an AutoencoderKL in either naming, TAESD's own files, the VAE of a model.

Such a file has no config. Its shapes give the structure. What they do not show (scale of the
latents, groups of the norms) comes from the VAE that it replaces.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.convert import detect
from mlxdiff.convert.checkpoint import map_component
from mlxdiff.convert.families import FAMILIES, Unrepresentable, vae_structure
from mlxdiff.convert.keymap import (
    DIFFUSERS,
    FILE_IGNORED,
    Layout,
    ignored_for,
    ldm_vae,
)
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.networks.config import AutoencoderKLConfig, AutoencoderTinyConfig, VAEConfig
from mlxdiff.weights.files import WeightFile, open_file
from mlxdiff.weights.tensors import LazyTensor, Shape

_PREFIXES = ("first_stage_model.", "vae.", "taesd.", "")
_OWN = re.compile(r"(?:encoder|decoder|quant_conv|post_quant_conv)\..+")
# TAESD's own names: a list of layers; the decoder's list begins with a clamp, which has no weights.
_TINY = re.compile(r"(?:(?:taesd_)?(encoder|decoder)\.)?(?:layers\.)?(\d+)\.(.+)")
_SAME_ORIGIN = 0.2
"""Least cosine between the weights of two VAEs of which one was trained from the other.

VAEs that were trained on their own have about 0 (|cosine| < 4 / sqrt(values) < 0.1); published
fine-tuned ones keep most of their weights.
"""


def open_vae_file(
    path: Path, own: VAEConfig | None, own_tensors: Callable[[], Mapping[str, LazyTensor]] | None
) -> tuple[VAEConfig, Callable[[], dict[str, LazyTensor]]]:
    """Open a VAE in one file.

    Args:
        path: the file, in safetensors, PyTorch's format or GGUF.
        own: config of the VAE that it replaces; None: the published values of SD 1 and 2.
        own_tensors: returns the tensors of that VAE; None: not compared.
    Returns: its config; a function that returns its tensors in our names and layout.
    Raises: CheckpointError; UsageError if it was not trained from the VAE that it replaces.
    """
    file = open_file(path)
    tensors = _section(file)
    if _is_tiny(tensors):
        return _open_tiny(path, tensors)
    if any(".time_stack." in name or ".temporal_res_block." in name for name in tensors):
        raise CheckpointError(
            f"{path}: has the VAE of Stable Video Diffusion, whose decoder sees all frames of a "
            "video; give a VAE of pictures"
        )
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        structure = vae_structure(shapes)
    except Unrepresentable as error:
        raise CheckpointError(
            f"{path}: has a VAE of an unknown structure ({error}); the file may be incomplete; if "
            "not, give the VAE's folder with its config.json"
        ) from None
    config = AutoencoderKLConfig.from_dict(
        FAMILIES["sd1"].vae | _values_of(own, structure["block_out_channels"]) | structure,
        f"{path} (derived from its shapes)",
    )
    ldm = any(name.startswith(("encoder.down.", "decoder.up.")) for name in tensors)
    layout = ldm_vae(config) if ldm else DIFFUSERS["vae"]
    files = map_component(path, tensors, layout, config, str(path), file.refused)
    opened = files.read(config)
    if isinstance(own, AutoencoderKLConfig) and own_tensors is not None:
        _check_origin(path, opened, own_tensors())
    return config, lambda: files.read(config)


def _section(file: WeightFile) -> dict[str, LazyTensor]:
    """Return the VAE's tensors without their prefix. Raises: CheckpointError if there are none."""
    for prefix in _PREFIXES:
        found = {
            name.removeprefix(prefix): tensor
            for name, tensor in file.tensors.items()
            if name.startswith(prefix)
            and not ignored_for(name.removeprefix(prefix), FILE_IGNORED)
            and not name.removeprefix(prefix).startswith(("loss.", "model_ema."))
        }
        is_vae = any(_OWN.fullmatch(name) for name in found) or _is_tiny(found)
        if found and is_vae and (prefix or all(_OWN.fullmatch(n) or _is_tiny([n]) for n in found)):
            return found
    raise CheckpointError(
        f"{file.path}: looks like {detect.looks_like(file.tensors)}; expected a VAE"
    )


def _values_of(own: VAEConfig | None, widths: list[int]) -> dict[str, Any]:
    """Return the values of the replaced VAE that shapes do not show; None: the published ones."""
    if not isinstance(own, AutoencoderKLConfig):
        return {"norm_num_groups": math.gcd(32, *widths)}
    return {
        "norm_num_groups": own.norm_num_groups,
        "scaling_factor": own.scaling_factor,
        "shift_factor": own.shift_factor,
        "latents_mean": None if own.latents_mean is None else list(own.latents_mean),
        "latents_std": None if own.latents_std is None else list(own.latents_std),
        "force_upcast": own.force_upcast,
        "sample_size": own.sample_size,
    }


def _check_origin(
    path: Path, opened: Mapping[str, LazyTensor], own: Mapping[str, LazyTensor]
) -> None:
    """Refuse a VAE whose latents are not those of the model.

    Latents of two VAEs agree only if one was trained from the other, and then their weights are
    alike. Shapes cannot tell: the VAEs of SD 1 and of SDXL have the same.
    """
    found = []
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.conv_out.weight"):
        one, other = (tensors[name].read().astype(np.float64) for tensors in (opened, own))
        if one.shape == other.shape:
            length = np.linalg.norm(one) * np.linalg.norm(other)
            found.append(float((one * other).sum() / length) if length else 1.0)
    if found and max(found) < _SAME_ORIGIN:
        raise UsageError(
            f"{path}: this VAE was not trained from the model's own (their weights have nothing in "
            "common), so its latents are others: it belongs to another family, for example SDXL's "
            "on SD 1.5; use one made for this model, or give its folder with its config.json"
        )


# -------------------------------------------------------------------------------------------- TAESD


def _is_tiny(names: Any) -> bool:
    return bool(names) and all(_TINY.fullmatch(name) for name in names)


def _open_tiny(
    path: Path, tensors: Mapping[str, LazyTensor]
) -> tuple[VAEConfig, Callable[[], dict[str, LazyTensor]]]:
    halves = _halves(path, tensors)
    (found, *both) = halves
    other = "decoder" if found == "encoder" else "encoder"
    beside = path.with_name(path.name.replace(found, other))
    if not both and beside != path and beside.is_file():
        halves |= _halves(beside, _section(open_file(beside)))
    if "decoder" not in halves:
        raise CheckpointError(
            f"{path}: is TAESD's encoder alone; put its decoder ({beside.name}) beside it"
        )
    named = {f"{half}.{name}": t for half, part in halves.items() for name, t in part.items()}
    shapes = {name: tensor.shape for name, tensor in named.items()}
    config = _tiny_config(path, shapes, halves)
    files = map_component(path, named, Layout(), config, str(path))
    return config, lambda: files.read(config)


def _halves(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, dict[str, LazyTensor]]:
    """Return half -> its tensors, named as in a list of layers that begins with a convolution."""
    result: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        match = _TINY.fullmatch(name)
        assert match is not None
        half = match[1] or ("encoder" if "0.weight" in tensors else "decoder")
        result.setdefault(half, {})[f"{match[2]}.{match[3]}"] = tensor
    for half, part in result.items():
        first = min(int(name.split(".")[0]) for name in part)
        if first not in (0, 1) or (half, first) == ("encoder", 1):
            raise CheckpointError(
                f"{path}: is not a whole TAESD {half}: its first layers are missing; download "
                "it again"
            )
        result[half] = {
            f"layers.{int(number) - first}.{rest}": tensor
            for name, tensor in part.items()
            for number, _, rest in (name.partition("."),)
        }
    return result


def _tiny_config(
    path: Path, shapes: Mapping[str, Shape], halves: Collection[str]
) -> AutoencoderTinyConfig:
    """Derive the config from the layers: convolutions (weight) and blocks (conv.0.weight)."""
    data: dict[str, Any] = {}
    for half in halves:
        layers: dict[int, Shape | None] = {}
        for name, shape in shapes.items():
            match = re.fullmatch(rf"{half}\.layers\.(\d+)\.(weight|conv\.0\.weight)", name)
            if match and len(shape) == 4:
                layers[int(match[1])] = shape if match[2] == "weight" else None
        # Convolutions stand between the levels, and at both ends.
        counts: list[int] = []
        convolutions = []
        for number in sorted(layers):
            convolution = layers[number]
            if convolution is not None:
                counts.append(0)
                convolutions.append(convolution)
            elif counts:
                counts[-1] += 1
        if len(convolutions) < 2 or counts.pop() != 0:
            raise CheckpointError(f"{path}: is not a whole TAESD; its {half} is incomplete")
        data[f"num_{half}_blocks"] = counts
        data[f"{half}_block_out_channels"] = [convolutions[0][0]] * len(counts)
        ends = convolutions[0][1], convolutions[-1][0]
        pixels, latents = ends if half == "encoder" else ends[::-1]
        data["in_channels" if half == "encoder" else "out_channels"] = pixels
        data["latent_channels"] = latents
    if "encoder" not in halves:
        data["num_encoder_blocks"] = data["num_decoder_blocks"][::-1]
        data["encoder_block_out_channels"] = data["decoder_block_out_channels"]
    config = AutoencoderTinyConfig.from_dict(
        {"_class_name": "AutoencoderTiny", **data}, f"{path} (derived from its shapes)"
    )
    return replace(config, has_encoder="encoder" in halves)
