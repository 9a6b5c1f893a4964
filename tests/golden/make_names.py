"""Names and shapes of the parameters of real, full-size models: names/*.json.gz.

    python tests/golden/make_names.py

The configs are those of the published checkpoints (the keys that decide shapes; the rest at their
defaults), the names come from diffusers and transformers on torch's meta device: no weights. Shapes
are torch's (convolutions OIHW). `parameters` in PUBLISHED are the counts that the papers or model
cards give, in millions: a check that the configs are the right ones.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    UNet2DConditionModel,
    UNet2DModel,
    UNetSpatioTemporalConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

HERE = Path(__file__).parent
DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "in_channels": 4,
    "layers_per_block": 2,
    "sample_size": 64,
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
SD21 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
UPSCALER = SD15 | {
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "sample_size": 128,
    "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP, UP],
    "use_linear_projection": True,
}
# stabilityai/stable-video-diffusion-img2vid; -xt and 1.1 have 25 frames.
SVD = {
    "_class_name": "UNetSpatioTemporalConditionModel",
    "addition_time_embed_dim": 256,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"],
    "in_channels": 8,
    "layers_per_block": 2,
    "num_attention_heads": [5, 10, 20, 20],
    "num_frames": 14,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 768,
    "sample_size": 96,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3,
}
UNCLIP = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}
SDXL = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "in_channels": 4,
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "use_linear_projection": True,
}
REFINER = SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
}
SSD_1B = SDXL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
VEGA = SDXL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
}
# As published in 2022: google/ddpm-cifar10-32 and google/ddpm-celebahq-256 (-cat-256, ...).
DDPM_CIFAR10 = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": [DOWN, "AttnDownBlock2D", DOWN, DOWN],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": [UP, UP, "AttnUpBlock2D", UP],
}
DDPM_CELEBAHQ = DDPM_CIFAR10 | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [DOWN, DOWN, DOWN, DOWN, "AttnDownBlock2D", DOWN],
    "sample_size": 256,
    "up_block_types": [UP, "AttnUpBlock2D", UP, UP, UP, UP],
}
UNETS: dict[str, dict[str, Any]] = {
    "ddpm-cifar10-32": DDPM_CIFAR10,
    "ddpm-celebahq-256": DDPM_CELEBAHQ,
    "sd15": SD15,
    "sd15-inpainting": SD15 | {"in_channels": 9},
    "instruct-pix2pix": SD15 | {"in_channels": 8},
    "lcm-dreamshaper-v7": SD15 | {"time_cond_proj_dim": 256},
    "bk-sdm-base": SD15 | {"layers_per_block": 1},
    "bk-sdm-small": SD15 | {"layers_per_block": 1, "mid_block_type": None},
    "bk-sdm-tiny": SD15
    | {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": [CROSS_DOWN] * 3,
        "layers_per_block": 1,
        "mid_block_type": None,
        "up_block_types": [CROSS_UP] * 3,
    },
    "sd21": SD21,
    "sd2-inpainting": SD21 | {"in_channels": 9},
    "sd2-depth": SD21 | {"in_channels": 5, "sample_size": 64},
    "marigold": SD21 | {"in_channels": 8},
    "svd": SVD,
    "x4-upscaler": UPSCALER,
    "sd21-unclip-h": SD21 | UNCLIP,
    "sd21-unclip-l": SD21 | UNCLIP | {"projection_class_embeddings_input_dim": 1536},
    "sdxl": SDXL,
    "sdxl-inpainting": SDXL | {"in_channels": 9},
    "sdxl-refiner": REFINER,
    "ssd-1b": SSD_1B,
    "segmind-vega": VEGA,
}
VAES: dict[str, dict[str, Any]] = {
    "sd15": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
}
VAES["sdxl"] = VAES["sd15"] | {"sample_size": 1024, "scaling_factor": 0.13025}
VAES["svd"] = {
    "_class_name": "AutoencoderKLTemporalDecoder",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
VAES["x4-upscaler"] = VAES["sd15"] | {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "sample_size": 256,
    "scaling_factor": 0.08333,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "eos_token_id": 2,
}
OPENCLIP = {"hidden_act": "gelu", "eos_token_id": 2}
TEXTS: dict[str, dict[str, Any]] = {
    "sd15": CLIP_L,
    "sd21": OPENCLIP
    | {
        "architectures": ["CLIPTextModel"],
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "sdxl-2": OPENCLIP
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}
VISION_L = {  # of image variations, Zero-1-to-3 and Stable unCLIP l: openai/clip-vit-large-patch14
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
VISIONS: dict[str, dict[str, Any]] = {
    "clip-l": VISION_L,
    "openclip-h": VISION_L  # of Stable unCLIP h: laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    | {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "projection_dim": 1024,
    },
}
PUBLISHED = {  # millions of parameters: papers (DDPM, SD, SDXL, BK-SDM, SSD-1B and Vega)
    "unet ddpm-cifar10-32": 35.7,
    "unet ddpm-celebahq-256": 114,
    "unet sd15": 860,
    "unet bk-sdm-base": 580,
    "unet bk-sdm-small": 490,
    "unet bk-sdm-tiny": 330,
    "unet sd21": 866,
    "unet x4-upscaler": 473,
    "unet svd": 1521,
    "unet sdxl": 2570,
    "unet ssd-1b": 1300,
    "unet segmind-vega": 740,
    "vae sd15": 84,
    "text_encoder sd15": 123,
    "text_encoder sd21": 340,
    "text_encoder sdxl-2": 695,
    "image_encoder clip-l": 304,
    "image_encoder openclip-h": 632,
}


def build(component: str, config: dict[str, Any]) -> torch.nn.Module:
    """The module of a config on the meta device."""
    with torch.device("meta"):
        if component == "unet":
            known = (UNet2DConditionModel, UNet2DModel, UNetSpatioTemporalConditionModel)
            kinds = {k.__name__: k for k in known}
            return kinds[config["_class_name"]].from_config(config)
        if component == "vae":
            kinds = {k.__name__: k for k in (AutoencoderKL, AutoencoderKLTemporalDecoder)}
            return kinds[config["_class_name"]].from_config(config)
        if component == "image_encoder":
            return CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        kinds = {k.__name__: k for k in (CLIPTextModel, CLIPTextModelWithProjection)}
        return kinds[config["architectures"][0]](CLIPTextConfig(**config))


def main() -> None:
    """Write one file for each component of each model."""
    folder = HERE / "names"
    folder.mkdir(exist_ok=True)
    every = {"unet": UNETS, "vae": VAES, "text_encoder": TEXTS, "image_encoder": VISIONS}
    for component, configs in every.items():
        for model, config in configs.items():
            shapes = {k: list(p.shape) for k, p in build(component, config).named_parameters()}
            if component == "text_encoder":  # as published files have it
                shapes = {_prefixed(name): shape for name, shape in shapes.items()}
            total = sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e6
            expected = PUBLISHED.get(f"{component} {model}", total)
            assert abs(total / expected - 1) < 0.03, (component, model, total, expected)
            print(f"{component} {model}: {len(shapes)} parameters, {total:.0f} M")
            document = {"component": component, "config": config, "shapes": shapes}
            data = json.dumps(document, separators=(",", ":")).encode()
            path = folder / f"{component}.{model}.json.gz"
            path.write_bytes(gzip.compress(data, 9, mtime=0))


def _prefixed(name: str) -> str:
    if name.startswith(("text_model.", "text_projection.")):
        return name
    return f"text_model.{name}"


if __name__ == "__main__":
    main()
