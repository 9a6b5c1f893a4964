"""A tiny Stable Video Diffusion with random weights, the same wherever it is made: not stored."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from folders import stored, write_json
from safetensors.numpy import save_file

from mlxdiff.networks.config import (
    AutoencoderKLTemporalDecoderConfig,
    CLIPVisionConfig,
    UNetSpatioTemporalConfig,
)
from mlxdiff.networks.params import expected_parameters

UNET: dict[str, Any] = {
    "_class_name": "UNetSpatioTemporalConditionModel",
    "addition_time_embed_dim": 8,
    "block_out_channels": [32, 64],
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
    "in_channels": 8,
    "layers_per_block": 1,
    "num_attention_heads": [2, 4],
    "num_frames": 4,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 24,
    "sample_size": 8,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLTemporalDecoder",
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}
IMAGE_ENCODER: dict[str, Any] = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 32,
    "image_size": 224,
    "intermediate_size": 64,
    "model_type": "clip_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 56,
    "projection_dim": 16,
}
# As published: stabilityai/stable-video-diffusion-img2vid, scheduler and feature_extractor.
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "trained_betas": None,
    "use_karras_sigmas": True,
}
PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}
INDEX: dict[str, Any] = {
    "_class_name": "StableVideoDiffusionPipeline",
    "_diffusers_version": "0.24.0.dev0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
    "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
}
PARTS: dict[str, tuple[dict[str, Any], Any]] = {
    "unet": (UNET, UNetSpatioTemporalConfig),
    "vae": (VAE, AutoencoderKLTemporalDecoderConfig),
    "image_encoder": (IMAGE_ENCODER, CLIPVisionConfig),
}
_AMONG_FRAMES = (".temporal_res_block.conv", ".time_conv_out.")


def tensors(part: str) -> dict[str, np.ndarray]:
    """The weights of a part as diffusers names and shapes them, float32 of float16's values.

    They are scaled so that signals keep their size; every mixture has a share of its own.
    """
    data, kind = PARTS[part]
    found = {}
    for name, shape in expected_parameters(kind.from_dict(data)).items():
        among = any(piece in f".{name}" for piece in _AMONG_FRAMES) and len(shape) == 2
        shape = (shape[0], shape[1] // 3, 3, 1, 1) if among else stored(shape)
        random = np.random.RandomState(zlib.crc32(f"{part} {name}".encode()))
        values = random.standard_normal(shape)
        if len(shape) == 1:
            scale = 1.0 if name.endswith("mix_factor") else 0.1
            values = scale * values + ("norm" in name and name.endswith("weight"))
        elif "embedding.weight" in name:
            values *= 0.5
        else:
            values *= 0.8 / np.sqrt(np.prod(shape[1:]))
        found[name] = values
    if part == "vae":
        # Latents of about the size that the config's scale expects, and a small deviation.
        found["quant_conv.weight"][:4] *= 8
        found["quant_conv.bias"][4:] -= 4
    return {name: values.astype(np.float16).astype(np.float32) for name, values in found.items()}


def write_svd(folder: Path) -> Path:
    """A folder as diffusers writes it, float16."""
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    write_json(folder / "feature_extractor/preprocessor_config.json", PREPROCESSOR)
    for part, (data, _) in PARTS.items():
        write_json(folder / part / "config.json", data)
        stem = "model" if part == "image_encoder" else "diffusion_pytorch_model"
        weights = {name: array.astype(np.float16) for name, array in tensors(part).items()}
        save_file(weights, folder / part / f"{stem}.safetensors", {"format": "pt"})
    return folder
