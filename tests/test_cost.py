"""Multiply-adds from configs, against sums by hand, the parameters, and hooks on diffusers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_models

from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    CLIPVisionConfig,
    ComponentConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
)
from mlxdiff.networks.cost import multiply_adds, operations
from mlxdiff.networks.params import expected_parameters

PIXELS: dict[str, dict[str, Any]] = {
    "ddpm": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "sample_size": 16,
    },
    "labels": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "class_embed_type": "timestep",
        "resnet_time_scale_shift": "scale_shift",
    },
}
TAESD: dict[str, Any] = {
    "encoder_block_out_channels": [16, 16],
    "decoder_block_out_channels": [16, 16],
    "num_encoder_blocks": [1, 2],
    "num_decoder_blocks": [2, 1],
}
CONFIGS: dict[str, ComponentConfig] = {
    **{f"clip {n}": tiny_models.config("clip", n) for n in tiny_models.CLIPS},
    **{f"unet {n}": tiny_models.config("unet", n) for n in tiny_models.UNETS},
    **{f"vae {n}": tiny_models.config("vae", n) for n in tiny_models.VAES},
    **{f"unet2d {n}": UNet2DConfig.from_dict(data) for n, data in PIXELS.items()},
    "clip vision": CLIPVisionConfig(32, 64, 16, 2, 4, image_size=24, patch_size=8),
    "taesd": AutoencoderTinyConfig.from_dict(TAESD),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_multiplied_with_exactly_once(name: str) -> None:
    config = CONFIGS[name]
    walks = [operations(config, 8, 8)]
    if isinstance(config, (AutoencoderKLConfig, AutoencoderTinyConfig)):
        walks.append(operations(config, 8, 8, encode=True))
    # Tables of embeddings are looked up, not multiplied with.
    expected = sorted(
        math.prod(shape)
        for key, shape in expected_parameters(config).items()
        if len(shape) > 1 and ("embedding.weight" not in key or "patch_embedding" in key)
    )
    assert sorted(op.weights for walk in walks for op in walk if op.weights) == expected


def test_by_hand() -> None:
    # A VAE of one level: post-quant and input convolution, two resnets around attention, one more
    # resnet a layer (two), output convolution; on 2x3 latents.
    config = AutoencoderKLConfig.from_dict(
        {
            "block_out_channels": [8],
            "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"],
            "norm_num_groups": 4,
            "latent_channels": 4,
        }
    )
    n = 2 * 3
    resnet = 2 * n * 9 * 8 * 8
    attention = 4 * n * 8 * 8 + 2 * n * n * 8
    by_hand = n * 4 * 4 + n * 9 * 4 * 8 + 4 * resnet + attention + n * 9 * 8 * 3
    assert multiply_adds(config, 2, 3) == by_hand
    assert multiply_adds(config, 2, 3, batch=5) == 5 * by_hand


def test_a_text_encoder_by_hand() -> None:
    config = tiny_models.config("clip", "projection")
    d, hidden, t = 32, 64, 16
    layer = 4 * t * d * d + 2 * t * t * d + 2 * t * d * hidden
    assert multiply_adds(config, tokens=t) == 3 * layer + d * 12


def test_what_is_held_is_let_go() -> None:
    for name, config in CONFIGS.items():
        if not name.startswith("clip"):
            last = operations(config, 8, 8)[-1]
            assert last.held == 0, name


SD15 = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("data", "side", "teraflops"), [(SD15, 64, 1.607), (SDXL, 128, 13.52)], ids=["sd15", "sdxl"]
)
def test_full_size(data: dict[str, Any], side: int, teraflops: float) -> None:
    """Published counts of a guided step, two floating-point operations a multiply-add."""
    config = UNet2DConditionConfig.from_dict(data)
    assert 2 * multiply_adds(config, side, side, batch=2) / 1e12 == pytest.approx(
        teraflops, rel=3e-3
    )
