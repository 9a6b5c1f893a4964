"""Tiny configs of every kind of network, and random weights and inputs for them."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    CLIPTextConfig,
    ComponentConfig,
    UNet2DConditionConfig,
)
from mlxdiff.networks.params import expected_parameters
from mlxdiff.weights.tensors import LazyTensor

_UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
_ATTENTION_BELOW = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
UNETS: dict[str, dict[str, Any]] = {
    name: _UNET | changes
    for name, changes in {
        "sd1": {},
        "sd2": {"use_linear_projection": True, "attention_head_dim": [4, 8]},
        "sdxl": _ATTENTION_BELOW
        | {
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2],
            "use_linear_projection": True,
            "attention_head_dim": [2, 4],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        },
        "three levels": {
            "block_out_channels": [32, 64, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
        "no mid block": {"mid_block_type": None},
        "mid block without attention": _ATTENTION_BELOW
        | {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [0, [2]],
            "reverse_transformer_layers_per_block": [[2, 1], 1],
        },
        "pix2pix": {"in_channels": 8},
        "inpainting": {"in_channels": 9},
        "guidance-distilled": {"time_cond_proj_dim": 12},
        "upscaler": _ATTENTION_BELOW
        | {"in_channels": 7, "num_class_embeds": 40, "only_cross_attention": [False, True]},
        "unusual": {
            "only_cross_attention": [True, False],
            "num_attention_heads": [2, 4],
            "freq_shift": 1,
            "flip_sin_to_cos": False,
            "downsample_padding": 0,
            "conv_in_kernel": 5,
            "conv_out_kernel": 1,
            "norm_eps": 1e-3,
        },
    }.items()
}
_VAE = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}
VAES: dict[str, dict[str, Any]] = {
    "kl": _VAE,
    "no quant convs": _VAE | {"use_quant_conv": False, "use_post_quant_conv": False},
    "no attention": _VAE | {"mid_block_add_attention": False, "latent_channels": 16},
}
_CLIP = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 16,
    "projection_dim": 12,
}
CLIPS: dict[str, dict[str, Any]] = {
    "legacy end": _CLIP | {"eos_token_id": 2},
    "end by id": _CLIP | {"eos_token_id": 97},
    "projection": _CLIP
    | {
        "eos_token_id": 97,
        "hidden_act": "gelu",
        "architectures": ["CLIPTextModelWithProjection"],
    },
}


def config(kind: str, name: str) -> ComponentConfig:
    """The config of this name among CLIPS ("clip"), UNETS ("unet") or VAES ("vae")."""
    if kind == "clip":
        return CLIPTextConfig.from_dict(CLIPS[name])
    if kind == "unet":
        return UNet2DConditionConfig.from_dict(UNETS[name])
    return AutoencoderKLConfig.from_dict(VAES[name])


def random_arrays(config: ComponentConfig) -> dict[str, np.ndarray]:
    """Weights that keep activations near unit size: every norm, bias and matrix matters."""
    arrays = {}
    for name, shape in expected_parameters(config).items():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) == 1:
            values = 0.1 * values + (1 if "norm" in name and name.endswith("weight") else 0)
        else:
            values = values / math.sqrt(math.prod(shape[1:]))
        arrays[name] = values.astype(np.float32)
    return arrays


def lazy(arrays: dict[str, np.ndarray]) -> dict[str, LazyTensor]:
    """The same arrays as a checkpoint offers them."""
    return {
        name: LazyTensor(array.shape, "F32", lambda array=array: array)
        for name, array in arrays.items()
    }


def unet_inputs(
    config: UNet2DConditionConfig, height: int = 8, width: int = 8
) -> dict[str, np.ndarray]:
    """Keyword arguments for a U-Net, batch 2, with all that this config takes."""
    random = np.random.RandomState(7)
    inputs = {
        "sample": random.standard_normal((2, height, width, config.in_channels)),
        "timesteps": np.array([999, 3.5]),
        "encoder_hidden_states": random.standard_normal((2, 7, config.cross_attention_dim[0])),
    }
    if config.addition_embed_type is not None:
        inputs["text_embeds"] = random.standard_normal((2, 16))
        inputs["time_ids"] = np.array([[64, 64, 0, 0, 64, 64], [1024, 768, 10, 20, 512, 512]])
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = random.standard_normal((2, config.time_cond_proj_dim))
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    if config.num_class_embeds is not None:
        inputs["class_labels"] = np.array([0, config.num_class_embeds - 1], np.int32)
    return inputs


# A start, words, the end, padding; the second row has no padding, and ids above its end.
INPUT_IDS = np.array(
    [[96, 5, 6, 97, 97, 97, 3, 4], [96, 9, 6, 99, 8, 97, 1, 0]],
    dtype=np.int32,
)


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def order_of_sums(config: ComponentConfig) -> float:
    """How far a network's result may move if each sum is taken in another order.

    In standard deviations of the result; holds for any BLAS. A rounding in float32 is off by u =
    2^-24 at most, u / sqrt(3) as a standard deviation. The n terms of a sum are about independent,
    so its partial sums grow as sqrt(i): taken one after the other, their roundings give the sum an
    error of u sqrt(n / 6) of its own size. (Other orders give less.) Norms keep signals near unit
    size, so the products' errors add up as a random walk, at most through all weights in series.
    Two results differ by sqrt(2) times that; six standard deviations are out of reach.
    """
    terms = [math.prod(shape[1:]) for shape in expected_parameters(config).values() if shape[1:]]
    return 6 * math.sqrt(2) * 2**-24 * math.sqrt(sum(terms) / 6)
