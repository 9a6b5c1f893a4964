"""Config files are read strictly: what is not understood is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from mlxdiff.errors import ConfigError
from mlxdiff.machine.disk import read_json
from mlxdiff.networks.config import AutoencoderKLConfig, CLIPTextConfig, UNet2DConditionConfig

CLASSES = {
    "unet": UNet2DConditionConfig,
    "vae": AutoencoderKLConfig,
    "text": CLIPTextConfig,
}


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("unet", "resnet_time_scale_shift", "scale_shift"),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "encoder_hid_dim", 768),
        ("unet", "dual_cross_attention", True),
        ("unet", "act_fn", "relu"),
        ("unet", "down_block_types", ["AttnDownBlock2D"] * 4),
        ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet", "block_out_channels", [320, 640]),
        ("unet", "block_out_channels", [320, 640, 1280, 1281]),
        ("unet", "attention_head_dim", [8, 8]),
        ("unet", "attention_head_dim", 7),
        ("unet", "in_channels", "4"),
        ("unet", "in_channels", 0),
        ("unet", "norm_eps", "small"),
        ("unet", "addition_embed_type", "text_time"),
        ("unet", "addition_embed_type", "image"),
        ("unet", "sample_size", [1, 2, 3]),
        ("unet", "brand_new_key", 1),
        ("vae", "brand_new_key", None),
        ("vae", "latents_mean", [0.0]),
        ("vae", "scaling_factor", None),
        ("vae", "norm_num_groups", 7),
        ("vae", "up_block_types", ["AttnUpDecoderBlock2D"]),
        ("text", "hidden_act", "relu"),
        ("text", "model_type", "t5"),
        ("text", "num_attention_heads", 7),
        ("text", "architectures", ["T5EncoderModel"]),
        ("text", "rope_theta", 10000),
        ("text", "num_hidden_layers", 2**31),
        ("unet", "layers_per_block", 2**31),
        ("unet", "transformer_layers_per_block", 2**31),
        ("unet", "block_out_channels", [2**40] * 4),
        ("vae", "layers_per_block", 10**30),
    ],
)
def test_what_is_not_supported_is_refused_by_name(kind: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        CLASSES[kind].from_dict({key: value}, where="some/config.json")
    assert "some/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_file_of_another_class_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="FluxTransformer2DModel"):
        CLASSES[kind].from_dict({"_class_name": "FluxTransformer2DModel"})


def test_absent_keys_take_the_defaults_of_the_reference() -> None:
    unet = UNet2DConditionConfig.from_dict({})
    assert unet.block_out_channels == (320, 640, 1280, 1280)
    assert unet.num_attention_heads == (8,) * 4  # "attention_head_dim" means the number of heads
    assert AutoencoderKLConfig.from_dict({}).scaling_factor == 0.18215
    assert CLIPTextConfig.from_dict({}).eos_token_id == 49407


def test_both_spellings_of_the_head_count() -> None:
    spelled = {"attention_head_dim": [5, 10, 20, 20], "num_attention_heads": None}
    assert UNet2DConditionConfig.from_dict(spelled).num_attention_heads == (5, 10, 20, 20)
    spelled = {"attention_head_dim": 64, "num_attention_heads": [5, 10, 20, 20]}
    assert UNet2DConditionConfig.from_dict(spelled).num_attention_heads == (5, 10, 20, 20)


def test_transformer_depths_inside_a_block() -> None:
    """SSD-1B gives a depth for each layer, and the up path's on its own."""
    data = {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    }
    config = UNet2DConditionConfig.from_dict(data)
    assert [b.transformer_layers for b in config.down_blocks] == [(), (2, 2), (4, 4)]
    assert [b.transformer_layers for b in config.up_blocks] == [(4, 4, 10), (2, 1, 1), ()]
    assert config.mid_block is not None and config.mid_block.num_layers == 1
    del data["reverse_transformer_layers_per_block"]
    data["transformer_layers_per_block"] = [0, [2, 1], 4]
    with pytest.raises(ConfigError, match="reverse_transformer_layers_per_block"):
        UNet2DConditionConfig.from_dict(data)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"a": '])
def test_unreadable_files(tmp_path: Any, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_json(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "other.json")
