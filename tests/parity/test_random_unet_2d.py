"""Pixel models of random architecture, written by the installed diffusers: networks and pictures.

The golden files are checked as well: the installed diffusers still computes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import (
    arrays,
    assert_component_close,
    assert_latents_close,
    assert_picture_close,
    cases,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from golden import make_ddpm_goldens as goldens  # noqa: E402
from golden.make_checkpoints import enliven  # noqa: E402
from golden.make_goldens import nhwc  # noqa: E402

import mlxdiff  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SEEDS = range(8)


def random_unet(rng: np.random.Generator) -> Any:
    """A U-Net of random depth, widths, heads, block types, embeddings and labels."""
    levels = int(rng.integers(1, 4))

    def types(way: str) -> list[str]:
        return [f"{rng.choice(['', 'Attn'])}{way}Block2D" for _ in range(levels)]

    options: dict[str, Any] = {
        "sample_size": [int(n) for n in 4 * rng.integers(2, 5, 2)],
        "block_out_channels": [int(n) for n in 8 * rng.integers(1, 5, levels)],
        "layers_per_block": int(rng.integers(1, 3)),
        "down_block_types": types("Down"),
        "up_block_types": types("Up"),
        "mid_block_type": ["UNetMidBlock2D", None][int(rng.random() < 0.2)],
        "add_attention": bool(rng.random() < 0.7),
        "attention_head_dim": [None, 2, 4, 8][int(rng.integers(4))],
        "norm_num_groups": int(rng.choice([2, 4, 8])),
        "attn_norm_num_groups": [None, 2][int(rng.integers(2))],
        "norm_eps": float(rng.choice([1e-6, 1e-5, 1e-2])),
        "resnet_time_scale_shift": str(rng.choice(["default", "scale_shift"])),
        "downsample_padding": int(rng.integers(2)),
        "flip_sin_to_cos": bool(rng.random() < 0.5),
        "freq_shift": int(rng.integers(2)),
        "time_embedding_dim": [None, 24][int(rng.integers(2))],
        "class_embed_type": [None, "timestep", "identity"][int(rng.integers(3))],
        "num_class_embeds": [None, 5][int(rng.integers(2))],
    }
    channels = int(rng.choice([1, 3]))
    unet = diffusers.UNet2DModel(in_channels=channels, out_channels=channels, **options).eval()
    enliven(unet, int(rng.integers(1000)))
    return unet


def random_labels(rng: np.random.Generator, config: Any) -> np.ndarray | None:
    """Labels for a batch of two, of the kind that the model takes."""
    if config.class_embed_type == "identity":
        width = config.time_embedding_dim or 4 * config.block_out_channels[0]
        return rng.standard_normal((2, width), np.float32)
    if config.class_embed_type == "timestep":
        return rng.integers(0, 100, 2).astype(np.float32)
    return None if config.num_class_embeds is None else rng.integers(0, 5, 2).astype(np.int32)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_random_model(seed: int, backend: str, tmp_path: Path) -> None:
    """Its network at two times, with a label of the kind that it takes."""
    rng = np.random.default_rng(seed)
    unet = random_unet(rng)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    pipe = mlxdiff.load(tmp_path, backend=backend, dtype="float32")
    labels = random_labels(rng, unet.config)
    height, width = unet.config.sample_size
    sample = torch.from_numpy(
        rng.standard_normal((2, unet.config.in_channels, height, width), np.float32)
    )
    times = rng.integers(0, 1000, 2).astype(np.float32)
    given = None if labels is None else torch.from_numpy(labels)
    expected = nhwc(unet(sample, torch.from_numpy(times), given).sample)
    ours = pipe.model.component("unet")(
        pipe.backend.asarray(nhwc(sample)),
        pipe.backend.asarray(times),
        None if labels is None else pipe.backend.asarray(labels),
    )
    assert_component_close(pipe.backend.to_numpy(ours), expected)


@pytest.mark.parametrize("name", goldens.MAKERS)
@torch.no_grad()
def test_the_installed_diffusers_computes_the_golden_files(name: str) -> None:
    found, expected = goldens.unet_arrays(name), arrays(name)
    assert found.keys() == expected.keys()
    assert_component_close(found["unet/output"], expected["unet/output"], 2e-5)
    case = cases(name)[-1]
    latents, image = goldens.run(name, case["arguments"])
    assert_latents_close(latents, case["latents"], 1e-3)
    assert_picture_close(image, case["image"])
