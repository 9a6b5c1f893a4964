"""Upscalers of random structure, against diffusers' StableDiffusionUpscalePipeline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "golden")]
import make_checkpoints as make  # noqa: E402
from golden_data import assert_latents_close, assert_picture_close, photo  # noqa: E402
from make_goldens import PROMPTS, nhwc  # noqa: E402
from PIL import Image  # noqa: E402

import mlxdiff  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SCHEDULERS = {"DDIMScheduler": {"clip_sample": False}, "EulerDiscreteScheduler": {}}


def write_model(rng: np.random.Generator, folder: Path) -> Any:
    """A random upscaler in a folder; returns the pipeline that diffusers reads from it."""

    def pick(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    levels, factor_levels = int(rng.integers(2, 5)), int(rng.integers(2, 5))
    tokenizer = make.write_tokenizer(folder / "spare", "!", "both")
    unet = make.make_unet(
        int(rng.integers(1000)),
        32,
        in_channels=7,
        sample_size=8,
        block_out_channels=[int(n) for n in 8 * rng.integers(1, 5, levels)],
        layers_per_block=int(rng.integers(1, 3)),
        attention_head_dim=[int(n) for n in rng.choice([1, 2, 4, 8], levels)],
        down_block_types=[pick("DownBlock2D", "CrossAttnDownBlock2D") for _ in range(levels)],
        up_block_types=[pick("UpBlock2D", "CrossAttnUpBlock2D") for _ in range(levels)],
        only_cross_attention=[pick(True, False) for _ in range(levels)],
        use_linear_projection=pick(True, False),
        num_class_embeds=int(rng.integers(360, 500)),
    )
    vae = make.make_vae(
        int(rng.integers(1000)),
        block_out_channels=[8, 16, 16, 24][:factor_levels],
        down_block_types=["DownEncoderBlock2D"] * factor_levels,
        up_block_types=["UpDecoderBlock2D"] * factor_levels,
        scaling_factor=0.08333,
    )
    betas = {"beta_start": 0.0001, "beta_end": 0.02}
    kind = pick(*SCHEDULERS)
    schedule = betas | {"beta_schedule": pick("linear", "scaled_linear"), "steps_offset": 1}
    schedule |= {"prediction_type": pick("epsilon", "v_prediction")} | SCHEDULERS[kind]
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "hidden_act": "gelu"}
    diffusers.StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=make.make_text(transformers.CLIPTextModel, 3, len(tokenizer), 2, **text),
        tokenizer=tokenizer,
        unet=unet,
        low_res_scheduler=diffusers.DDPMScheduler(
            **betas, beta_schedule=pick("linear", "scaled_linear", "squaredcos_cap_v2")
        ),
        scheduler=getattr(diffusers, kind)(**schedule),
        max_noise_level=int(rng.integers(300, 360)),
    ).save_pretrained(folder / "model")
    kind = diffusers.StableDiffusionUpscalePipeline
    pipe = kind.from_pretrained(folder / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_a_picture_of_a_random_upscaler(seed: int, backend: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    pipe = write_model(rng, tmp_path)
    image, draw = photo(*(int(n) for n in rng.integers(8, 24, 2))), int(rng.integers(2**32))
    prompt, negative = (str(rng.choice(PROMPTS)) for _ in range(2))
    steps, guidance = int(rng.integers(2, 8)), float(rng.choice([1.0, 3.0, 9.0]))
    level = int(rng.integers(0, 300))
    last: dict[str, Any] = {}
    pictures = pipe(
        prompt,
        image=Image.fromarray(image),
        negative_prompt=negative,
        num_inference_steps=steps,
        guidance_scale=guidance,
        noise_level=level,
        generator=torch.Generator("cpu").manual_seed(draw),
        output_type="np",
        callback=lambda step, time, latents: last.update(latents=latents),
    ).images
    result = mlxdiff.load(tmp_path / "model", backend=backend, dtype="float32").generate(
        prompt,
        image=image,
        negative_prompt=negative,
        steps=steps,
        guidance=guidance,
        noise_level=level,
        seed=draw,
        sampler="checkpoint",
        schedule="normal",
    )
    assert_latents_close(result.latents, nhwc(last["latents"]))
    expected = (pictures * 255).round().astype(np.uint8)
    assert_picture_close(np.stack([np.asarray(i) for i in result.images]), expected)
