"""Models of random architecture, written by the installed diffusers: both libraries must agree.

Networks, and whole pictures under random schedules. The golden files are checked as well: the
installed diffusers still computes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import (
    NAMES,
    arrays,
    assert_component_close,
    assert_latents_close,
    assert_picture_close,
    cases,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from golden import make_checkpoints as make  # noqa: E402
from golden import make_goldens as goldens  # noqa: E402

import mlxdiff  # noqa: E402
from mlxdiff.convert import open_source  # noqa: E402
from mlxdiff.loading import make_backend  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SEEDS = range(8)


def random_unet(rng: np.random.Generator, text_width: int, added: int | None) -> Any:
    """A U-Net of random depth, widths, heads, block types and options.

    Args:
        added: width of SDXL's pooled text embedding; None for no added embeddings.
    """
    levels = int(rng.integers(2, 5))
    layers = [int(n) for n in rng.integers(1, 3, levels)]

    def attending(up: bool) -> list[str]:
        way = "Up" if up else "Down"
        return [f"{rng.choice(['', 'CrossAttn'])}{way}Block2D" for _ in range(levels)]

    options: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "block_out_channels": [int(n) for n in 8 * rng.integers(1, 5, levels)],
        "layers_per_block": layers if rng.random() < 0.5 else layers[0],
        "attention_head_dim": [int(n) for n in rng.choice([1, 2, 4, 8], levels)],
        "down_block_types": attending(False),
        "up_block_types": attending(True),
        "mid_block_type": rng.choice(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None]),
        "transformer_layers_per_block": [int(n) for n in rng.integers(1, 4, levels)],
        "use_linear_projection": bool(rng.random() < 0.5),
        "only_cross_attention": bool(rng.random() < 0.2),
        "upcast_attention": bool(rng.random() < 0.5),
        "flip_sin_to_cos": bool(rng.random() < 0.8),
        "freq_shift": int(rng.integers(0, 2)),
    }
    if added is not None:
        options |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        options["projection_class_embeddings_input_dim"] = added + 6 * 8
    return make.make_unet(int(rng.integers(1000)), text_width, **options)


def random_scheduler(rng: np.random.Generator) -> Any:
    """A scheduler config: betas, prediction and spacing at random."""
    prediction = str(rng.choice(["epsilon", "v_prediction", "sample"]))
    return diffusers.DDIMScheduler(
        beta_start=float(rng.choice([0.00085, 0.0001])),
        beta_end=float(rng.choice([0.012, 0.02])),
        beta_schedule=str(rng.choice(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=int(rng.integers(0, 2)),
        timestep_spacing=str(rng.choice(["leading", "linspace", "trailing"])),
        rescale_betas_zero_snr=bool(prediction == "v_prediction" and rng.random() < 0.5),
    )


def write_model(rng: np.random.Generator, folder: Path) -> Any:
    """A random SD or SDXL model in a folder; returns the pipeline that diffusers reads from it."""
    xl = bool(rng.random() < 0.5)
    tokenizer = make.write_tokenizer(folder / "spare", make.END, "both")
    size, seed = len(tokenizer), int(rng.integers(1000))

    def text(kind: Any, width: int) -> Any:
        heads = int(rng.choice([2, 4]))
        act = str(rng.choice(["gelu", "quick_gelu"]))
        eos = int(rng.choice([2, size - 1]))
        config = {"hidden_size": width, "intermediate_size": 3 * width, "projection_dim": 20}
        config |= {"num_hidden_layers": 2, "num_attention_heads": heads, "hidden_act": act}
        return make.make_text(kind, seed + width, size, eos, **config)

    parts: dict[str, Any] = {
        "vae": make.make_vae(seed, scaling_factor=float(rng.choice([0.13025, 0.18215]))),
        "scheduler": random_scheduler(rng),
        "tokenizer": tokenizer,
        "text_encoder": text(transformers.CLIPTextModel, 32),
    }
    if xl:
        parts["tokenizer_2"] = tokenizer
        parts["text_encoder_2"] = text(transformers.CLIPTextModelWithProjection, 24)
        parts["unet"] = random_unet(rng, 32 + 24, 20)
        parts["force_zeros_for_empty_prompt"] = bool(rng.random() < 0.5)
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        parts |= dict.fromkeys(("safety_checker", "feature_extractor"))
        parts["unet"] = random_unet(rng, 32, None)
        pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    dtype = [torch.float32, torch.float16, torch.bfloat16][int(rng.integers(3))]
    pipe.to(dtype).save_pretrained(folder / "model")
    pipe = type(pipe).from_pretrained(folder / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_networks_of_a_random_model(seed: int, backend: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    pipe = write_model(rng, tmp_path)
    source = open_source(tmp_path / "model")
    ours = make_backend(backend, "float32")
    height, width = (int(n) for n in rng.integers(4, 12, 2))

    def tensor(*shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    def array(x: Any) -> Any:
        return ours.asarray(goldens.nhwc(x) if x.ndim == 4 else x.numpy())

    def close(actual: Any, expected: Any) -> None:
        assert_component_close(ours.to_numpy(actual), goldens.nhwc(expected))

    def load(component: str) -> Any:
        return ours.load(source.config(component), source.tensors(component))

    unet = pipe.unet
    sample, text = tensor(2, 4, height, width), tensor(2, 77, unet.config.cross_attention_dim)
    times = torch.from_numpy(rng.integers(0, 1000, 2))
    added = None
    if unet.config.addition_embed_type:
        added = {"text_embeds": tensor(2, 20), "time_ids": 500 * abs(tensor(2, 6))}
    expected = unet(sample, times, text, added_cond_kwargs=added).sample
    given = {k: array(v) for k, v in (added or {}).items()}
    close(load("unet")(array(sample), array(times.float()), array(text), **given), expected)

    vae, image = load("vae"), tensor(1, 3, 8 * height, 8 * width).clamp(-1, 1)
    posterior = pipe.vae.encode(image).latent_dist
    mean, logvar = vae.encode(array(image))
    close(mean, posterior.mean)
    close(logvar, posterior.logvar)
    close(vae.decode(array(posterior.mean)), pipe.vae.decode(posterior.mean).sample)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_picture_of_a_random_model(seed: int, backend: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1000 + seed)
    pipe = write_model(rng, tmp_path)
    width, height = (int(n) for n in 8 * rng.integers(5, 11, 2))
    arguments = {
        "prompt": str(rng.choice(goldens.PROMPTS)),
        "negative_prompt": [None, "", "blurry"][int(rng.integers(3))],
        "steps": int(rng.integers(1, 15)),
        "guidance": float(rng.choice([1.0, 2.5, 7.5])),
        "guidance_rescale": float(rng.choice([0.0, 0.7])),
        "seed": int(rng.integers(2**32)),
        "width": width,
        "height": height,
        "sampler": "dpmpp-2m",
        "schedule": str(rng.choice(["normal", "karras"])),
    }
    latents, image = goldens.run(pipe, arguments)
    model = mlxdiff.load(tmp_path / "model", backend=backend, dtype="float32")
    if arguments["guidance"] == 1.0:  # no effect there, and refused or noted
        arguments |= {"negative_prompt": None, "guidance_rescale": 0.0}
    result = model.generate(**arguments)
    assert_latents_close(result.latents, latents)
    assert_picture_close(np.stack([np.asarray(i) for i in result.images]), image)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_installed_diffusers_computes_the_golden_files(name: str) -> None:
    pipe = goldens.load(name, torch.float32)
    expected = arrays(name)
    found = goldens.component_arrays(pipe)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        if value.std():  # an input may be constant
            assert_component_close(value, expected[key], 2e-5)
    case = cases(name)[0]
    latents, image = goldens.run(pipe, case["arguments"])
    assert_latents_close(latents, case["latents"], 1e-4)
    assert_picture_close(image, case["image"])
