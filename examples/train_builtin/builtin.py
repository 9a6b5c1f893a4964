"""The built-in model in diffusers' form, for scripts that train an addition to it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.numpy import load_file, save_file

import mlxdiff


def open_builtin() -> StableDiffusionPipeline:
    """Open the built-in model with diffusers. Its convolutions get torch's layout back."""
    source = Path(mlxdiff.__file__).parent / "builtin"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(source, folder)
        for part in ("unet", "vae", "text_encoder"):
            path = folder / part / "model.safetensors"
            weights = {
                key: np.ascontiguousarray(value.transpose(0, 3, 1, 2)) if value.ndim == 4 else value
                for key, value in load_file(path).items()
            }
            path.unlink()
            name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            save_file(weights, folder / part / f"{name}.safetensors", {"format": "pt"})
        return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def text_of(pipe: StableDiffusionPipeline, captions: list[str]) -> torch.Tensor:
    """Return states of the text encoder, (captions, 77, 128)."""
    ids = pipe.tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return pipe.text_encoder(ids).last_hidden_state
