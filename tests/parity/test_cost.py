"""Multiply-adds against torch's own counter of floating-point operations, on diffusers' models."""

from __future__ import annotations

from typing import Any

import pytest
from test_cost import PIXELS, SD15, SDXL, TAESD
from tiny_models import CLIPS, UNETS, VAES

from mlxdiff.networks.config import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    CLIPTextConfig,
    UNet2DConditionConfig,
    UNet2DConfig,
)
from mlxdiff.networks.cost import multiply_adds

pytestmark = pytest.mark.parity
BATCH = 2


def counted(call: Any) -> int:
    """Multiply-adds of what a function does on torch tensors."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name in UNETS for side in ((8, 8), (9, 7))]
    + [("SD 1.5", (64, 64)), ("SDXL", (72, 56))],
)
def test_unets(name: str, side: tuple[int, int]) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    data = dict({**UNETS, "SD 1.5": SD15, "SDXL": SDXL}[name])
    if "num_attention_heads" in data:  # diffusers takes it under its other name only
        data["attention_head_dim"] = data.pop("num_attention_heads")
    config = UNet2DConditionConfig.from_dict(data)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**data).eval()
        text = torch.zeros(BATCH, 77, config.cross_attention_dim[0])
        given: dict[str, Any] = {}
        if config.addition_embed_type is not None:
            pooled = (config.projection_class_embeddings_input_dim or 0) - 6 * (
                config.addition_time_embed_dim or 0
            )
            given["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(BATCH, pooled),
                "time_ids": torch.zeros(BATCH, 6),
            }
        if config.time_cond_proj_dim is not None:
            given["timestep_cond"] = torch.zeros(BATCH, config.time_cond_proj_dim)
        if config.num_class_embeds is not None:
            given["class_labels"] = torch.zeros(BATCH, dtype=torch.int64)
        sample = torch.zeros(BATCH, config.in_channels, *side)
        time = torch.zeros(BATCH)
        expected = counted(lambda: unet(sample, time, text, **given))
    assert multiply_adds(config, *side, batch=BATCH) == expected


@pytest.mark.parametrize("name", PIXELS)
def test_unets_of_pixels(name: str) -> None:
    import torch
    from diffusers import UNet2DModel

    data = PIXELS[name]
    with torch.device("meta"):
        unet = UNet2DModel(**data).eval()
        labels = torch.zeros(BATCH) if "class_embed_type" in data else None
        sample, time = torch.zeros(BATCH, 3, 16, 12), torch.zeros(BATCH)
        expected = counted(lambda: unet(sample, time, labels))
    assert multiply_adds(UNet2DConfig.from_dict(data), 16, 12, batch=BATCH) == expected


@pytest.mark.parametrize("name", [*VAES, "taesd"])
def test_vaes(name: str) -> None:
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny

    data = {**VAES, "taesd": TAESD}[name]
    tiny = name == "taesd"
    config = (AutoencoderTinyConfig if tiny else AutoencoderKLConfig).from_dict(data)
    with torch.device("meta"):
        vae = (AutoencoderTiny if tiny else AutoencoderKL)(**data).eval()
        pixels, latents = torch.zeros(1, 3, 24, 20), torch.zeros(1, config.latent_channels, 12, 10)
        assert multiply_adds(config, 24, 20, encode=True) == counted(lambda: vae.encode(pixels))
        assert multiply_adds(config, 12, 10) == counted(lambda: vae.decode(latents))


@pytest.mark.parametrize("name", CLIPS)
def test_text_encoders(name: str) -> None:
    import torch
    from transformers import CLIPTextConfig as Theirs
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    data = dict(CLIPS[name])
    kind = CLIPTextModelWithProjection if "architectures" in data else CLIPTextModel
    data.pop("architectures", None)
    model = kind(Theirs(**data, attn_implementation="eager")).eval()
    ids = torch.full((BATCH, 16), 3)
    expected = counted(lambda: model(ids))
    assert multiply_adds(CLIPTextConfig.from_dict(CLIPS[name]), batch=BATCH, tokens=16) == expected
