"""Single files in LDM naming: from tiny diffusers folders, and full-size ones without content."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlxdiff.convert import open_source
from mlxdiff.convert.keymap import (
    CC_PROJECTION_FILE,
    NORMALIZER_FILE,
    ldm_unet,
    ldm_vae,
    openclip_text,
    openclip_vision,
    svd_vae,
)
from mlxdiff.convert.transforms import conv_among_frames_to_linear, thirds
from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderKLTemporalDecoderConfig,
    CLIPVisionConfig,
    UNet2DConditionConfig,
)
from mlxdiff.networks.spatio_temporal import AMONG_FRAMES

Tensors = dict[str, np.ndarray]
ENCODER = "cond_stage_model.model."
OTHERS = {
    "image_normalizer": ("noise_augmentor.", NORMALIZER_FILE),
    "cc_projection": ("cc_projection.", CC_PROJECTION_FILE),
}
LDM_NAMES = sorted((Path(__file__).parent / "golden" / "ldm-names").glob("*.json.gz"))


def real_names(name: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in a full-size file."""
    path = Path(__file__).parent / "golden" / "ldm-names" / f"{name}.json.gz"
    return {k: tuple(v) for k, v in json.loads(gzip.decompress(path.read_bytes())).items()}


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]], **metadata: str) -> Path:
    """Make a float16 safetensors file of zeros that takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path


def ldm_tensors(folder: Path) -> Tensors:
    """Return the tensors of a diffusers folder under the names of a single file."""
    model = open_source(folder)
    result: Tensors = {}
    for component in model.components:
        config, tensors = model.config(component), model.tensors(component)
        arrays = {name: _stored(name, tensor.read()) for name, tensor in tensors.items()}
        if isinstance(config, UNet2DConditionConfig):
            prefix, layout = "model.diffusion_model.", ldm_unet(config)
        elif isinstance(config, AutoencoderKLConfig):
            prefix, layout = "first_stage_model.", ldm_vae(config)
            if isinstance(config, AutoencoderKLTemporalDecoderConfig):
                prefix, layout = "", svd_vae(config)
            arrays = {
                n: a[:, :, None, None] if ".attentions." in n and a.ndim == 2 else a
                for n, a in arrays.items()
            }
        elif isinstance(config, CLIPVisionConfig):
            prefix = "embedder.model." if "text_encoder" in model.components else ENCODER
            prefix = "conditioner.embedders.0.open_clip.model." if model.family == "svd" else prefix
            layout = openclip_vision(config)
        elif component in OTHERS:
            prefix, layout = OTHERS[component]
        elif config.hidden_act == "gelu":
            second = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
            prefix = second.get(model.family, "conditioner.embedders.0.model.")
            layout = openclip_text(config)
        else:
            xl = model.family == "sdxl"
            prefix = f"{'conditioner.embedders.0' if xl else 'cond_stage_model'}.transformer."
            result |= {f"{prefix}{name}": array for name, array in arrays.items()}
            continue
        taken: set[str] = set()
        for name, pieces in (layout.names or {}).items():
            targets = [piece.target for piece in pieces]
            if not set(targets) <= set(arrays) or set(targets) <= taken:
                continue  # the other spelling of the same
            taken |= set(targets)
            parts = [arrays[target] for target in targets]
            if pieces[0].transform in thirds:
                whole = np.concatenate(parts)
            elif pieces[0].transform is not None:
                whole = parts[0].T
            else:
                (whole,) = parts
            result[f"{prefix}{name}"] = whole
        assert taken == set(arrays), set(arrays) - taken
    return {name: np.ascontiguousarray(array) for name, array in result.items()}


def _stored(name: str, array: np.ndarray) -> np.ndarray:
    if AMONG_FRAMES.search(name) and array.ndim == 2:
        return conv_among_frames_to_linear.inverse(array)  # type: ignore[misc]
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array


def single_file(folder: Path, path: Path, more: Tensors | None = None, **metadata: str) -> Path:
    """Write a diffusers folder as one file, with extra tensors."""
    save_file(ldm_tensors(folder) | (more or {}), path, metadata or None)
    return path
