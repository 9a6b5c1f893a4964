"""Multiply-adds from configs, against sums by hand, the parameters, and hooks on diffusers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_models
from adapter_files import ENCODER
from control_files import controlnet_config
from motion_files import motion_config
from svd_files import UNET as SVD_UNET
from svd_files import VAE as SVD_VAE

from mlxdiff.networks import recorder
from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderKLTemporalDecoderConfig,
    AutoencoderTinyConfig,
    CCProjectionConfig,
    CLIPVisionConfig,
    CompactConfig,
    ComponentConfig,
    ControlNetConfig,
    ImageNormalizerConfig,
    IPAdapterConfig,
    LLLiteConfig,
    LLLiteModuleConfig,
    MotionAdapterConfig,
    RRDBNetConfig,
    T2IAdapterConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
    UNetSpatioTemporalConfig,
)
from mlxdiff.networks.cost import multiply_adds, operations
from mlxdiff.networks.layers import Sizes
from mlxdiff.networks.params import expected_parameters
from mlxdiff.networks.registry import NETWORKS, build

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


IP_ADAPTERS = {
    "image": IPAdapterConfig("image", 12, 24, 4, (32, 64)),
    "full": IPAdapterConfig("full", 12, 24, 0, (32, 64)),
    "plus": IPAdapterConfig("plus", 12, 24, 6, (32, 64), 40, 128, 160, 2),
}
CONTROLNETS = {
    model: ControlNetConfig.from_dict(controlnet_config(model)) for model in ("sd15", "sdxl")
}
ALL_CONFIGS: dict[str, ComponentConfig] = {
    **CONFIGS,
    **{f"controlnet {model}": config for model, config in CONTROLNETS.items()},
    **{f"ip-adapter {kind}": config for kind, config in IP_ADAPTERS.items()},
    "image encoder": CLIPVisionConfig.from_dict(ENCODER),
    **{
        f"t2i-adapter {kind}": T2IAdapterConfig(3, (32, 64, 64), 2, 2, kind)
        for kind in ("full_adapter", "full_adapter_xl", "light_adapter")
    },
    "lllite": LLLiteConfig((LLLiteModuleConfig("attn1.to_q", 8, 4, 6, 1),)),
    "rrdb": RRDBNetConfig(width=8, growth=4, blocks=2),
    "compact": CompactConfig(width=8, convolutions=3),
    "image normalizer": ImageNormalizerConfig(16),
    "camera": CCProjectionConfig(20, 16),
    "motion adapter": MotionAdapterConfig.from_dict(motion_config("v2", "sd15")),
    "video unet": UNetSpatioTemporalConfig.from_dict(SVD_UNET),
    "video vae": AutoencoderKLTemporalDecoderConfig.from_dict(SVD_VAE),
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


def run_on(tape: recorder.Tape, config: ComponentConfig, encode: bool = False) -> Any:
    network = build(recorder, config)
    with tape:
        return network.run_once(Sizes(recorder.parameter, 8, 8, 1, 77, encode))


def held_by(out: Any) -> int:
    """Values of arrays, alone or in tuples; those of views count once."""
    found: dict[int, int] = {}

    def walk(x: Any) -> None:
        if isinstance(x, (tuple, list)):
            for one in x:
                walk(one)
        elif x is not None and x.memory is not None:
            found[id(x.memory)] = x.memory.size

    walk(out)
    return sum(found.values())


def test_what_is_held_is_let_go() -> None:
    """When a network is done, nothing but its result is held."""
    for name, config in ALL_CONFIGS.items():
        for encode in (False, True):
            tape = recorder.Tape()
            out = run_on(tape, config, encode)
            assert tape.held == held_by(out), name
            del out
            assert tape.held == 0, name


def test_what_is_held_by_hand() -> None:
    """A resnet of a VAE: x is held for the shortcut while its two convolutions run."""
    config = AutoencoderKLConfig.from_dict(
        {
            "block_out_channels": [8],
            "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"],
            "norm_num_groups": 4,
            "latent_channels": 4,
            "mid_block_add_attention": False,
        }
    )
    n = 2 * 3
    post, first, norm1, conv1, norm2, conv2, *_ = operations(config, 2, 3)
    latents, x = 4 * n, 8 * n  # what post_quant_conv gives is a variable of its caller's
    assert [op.kind for op in (post, first, norm1, conv1)] == [
        "convolution",
        "convolution",
        "elementwise",
        "convolution",
    ]
    assert (post.held, post.inputs, post.outputs) == (0, latents, latents)
    assert (first.held, first.inputs, first.outputs) == (0, latents, x)
    assert (norm1.held, norm1.inputs) == (latents, x)
    assert (conv1.held, conv1.inputs) == (latents + x, x)
    assert (norm2.held, norm2.inputs) == (latents + x + x, x)  # conv1's input is a variable too
    assert (conv2.held, conv2.inputs) == (latents + x, x)


def test_every_network_has_a_cost() -> None:
    assert {type(config) for config in ALL_CONFIGS.values()} == set(NETWORKS)
    for name, config in ALL_CONFIGS.items():
        # A normalizer scales and shifts; it multiplies no matrices.
        assert (multiply_adds(config, 8, 8) > 0) != (name == "image normalizer"), name


def test_an_image_encoder_by_hand() -> None:
    config = CLIPVisionConfig.from_dict(ENCODER)  # 4x4 patches of 7x7 pixels, and the class token
    d, hidden, t = 32, 48, 17
    layer = 4 * t * d * d + 2 * t * t * d + 2 * t * d * hidden
    patches = 16 * 7 * 7 * 3 * d
    assert multiply_adds(config) == patches + 3 * layer + d * 24


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
