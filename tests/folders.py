"""Tiny diffusers folders with random weights, written without mlxdiff's file and name code.

The names come from ``expected_parameters``; that these are the real libraries' names is proven
elsewhere (tests/test_params.py, and the golden checkpoints that diffusers itself wrote).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlxdiff.networks.config import AutoencoderKLConfig, CLIPTextConfig, UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters

TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "projection_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
}
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
UNET_XL = UNET | {
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}
VOCAB = ["!", "a", "b", "a</w>", "b</w>", "!</w>", "<|startoftext|>", "<|endoftext|>"]


def stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Convert our layout to PyTorch's."""
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape


def random_tensors(config: Any, seed: int = 0, dtype: Any = np.float16) -> dict[str, np.ndarray]:
    """Return all tensors of a component in diffusers' current names and PyTorch's layout."""
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(stored(shape), np.float32).astype(dtype)
        for name, shape in expected_parameters(config).items()
    }


def save_bfloat16(bits: dict[str, np.ndarray], path: Path) -> None:
    """Write bfloat16 tensors, given by their bits (uint16)."""
    header, place = {}, 0
    for name, array in bits.items():
        span = [place, place + array.nbytes]
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": span}
        place += array.nbytes
    raw = json.dumps(header).encode()
    data = b"".join(array.astype("<u2").tobytes() for array in bits.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(VOCAB)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def diffusers_folder(
    path: Path, family: str = "sd1", unet: dict[str, Any] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Write a whole model of a family. Return its tensors by component.

    ``unet`` changes the config of the U-Net.
    """
    xl = family == "sdxl"
    configs: dict[str, dict[str, Any]] = {"text_encoder": TEXT, "unet": UNET, "vae": VAE}
    if family == "sd2":
        configs["text_encoder"] = TEXT | {"hidden_act": "gelu"}
    if xl:
        second = TEXT | {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu"}
        configs |= {"text_encoder_2": second, "unet": UNET_XL}
    configs["unet"] = configs["unet"] | (unet or {})
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None],
        "requires_safety_checker": True,
    }
    tensors = {}
    for seed, (name, data) in enumerate(sorted(configs.items())):
        write_json(path / name / "config.json", data)
        if name.startswith("text"):
            index[name] = ["transformers", data["architectures"][0]]
            tokenizer = name.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
            write_tokenizer(path / tokenizer)
            config: Any = CLIPTextConfig.from_dict(data)
            file = "model.safetensors"
        else:
            kind = UNet2DConditionConfig if name == "unet" else AutoencoderKLConfig
            config = kind.from_dict(data)
            file = "diffusion_pytorch_model.safetensors"
        tensors[name] = random_tensors(config, seed)
        save_file(tensors[name], path / name / file, {"format": "pt"})
    write_json(path / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(path / "model_index.json", index)
    (path / "safety_checker").mkdir()
    return tensors


def wide(path: Path, family: str = "sd1") -> Path:
    """Make a folder whose U-Net has the published number of heads for its widths.

    MLX's groups of weights divide them, too.
    """
    heads = [1, 2] if family == "sdxl" else 8
    diffusers_folder(path, family, {"block_out_channels": [64, 128], "attention_head_dim": heads})
    return path
