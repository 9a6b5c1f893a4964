"""What mlxdiff trains loads in diffusers, and draws the same picture there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import checkpoint
from PIL import Image
from test_training_commands import FEW, pictures, weights

import mlxdiff

pytest.importorskip("mlx.core")

from mlxdiff.training.train_controlnet import train_controlnet
from mlxdiff.training.train_distill import train_distill
from mlxdiff.training.train_embedding import train_embedding
from mlxdiff.training.train_finetune import train_finetune
from mlxdiff.training.train_lora import train_lora
from mlxdiff.training.train_unconditional import train_unconditional

pytestmark = [pytest.mark.parity, pytest.mark.mlx]

# Enough to change every weight well above float32's rounding.
HARD: dict[str, Any] = {**FEW, "steps": 3, "learning_rate": 1e-2}
PROMPT, STEPS, GUIDANCE = "a photo of a cat", 4, 5.0
WITHIN = 1e-3  # of the latents' deviation, as for all runs (docs/numerics.md)


def diffusers_pipeline(path: Path, **more: Any) -> Any:
    import diffusers
    import torch

    pipe = diffusers.DiffusionPipeline.from_pretrained(
        path, dtype=torch.float32, safety_checker=None, **more
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, prompt: str = PROMPT, **more: Any) -> np.ndarray:
    """Latents of diffusers, in our layout."""
    import torch
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    found = pipe(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        height=64,
        width=64,
        **more,
    ).images
    return np.moveaxis(found.numpy(), 1, -1)


def ours(pipe: Any, prompt: str = PROMPT, **more: Any) -> np.ndarray:
    told = {"sampler": "ddim", "schedule": "normal", "steps": STEPS, "guidance": GUIDANCE}
    found: np.ndarray = pipe.generate(prompt, width=64, height=64, seed=3, **told, **more).latents
    return found


def check(mine: np.ndarray, reference: np.ndarray, plain: np.ndarray) -> None:
    """The same latents as diffusers', and not those of the model before training."""
    error = np.abs(mine - reference).max() / reference.std()
    change = np.abs(plain - reference).max() / reference.std()
    print(f"difference {error:.1e} of the deviation; training changed {change:.1e}")
    assert error < WITHIN < change / 10


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "cats")


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_a_trained_lora(model: str, cats: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    told = {"resolution": 64, "targets": "all", "output": str(out)}
    train_lora(cats, model=checkpoint(model), **told, **HARD)
    pipe = diffusers_pipeline(checkpoint(model))
    pipe.load_lora_weights(str(out))
    mine = ours(mlxdiff.load(checkpoint(model), backend="numpy", loras=[out]))
    check(mine, theirs(pipe), ours(mlxdiff.load(checkpoint(model), backend="numpy")))


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_a_lora_of_few_steps(model: str, cats: Path, tmp_path: Path) -> None:
    """TCD without noise: LCM's own noise is drawn in another order there."""
    from diffusers import TCDScheduler

    out = tmp_path / "lora.safetensors"
    told = {"resolution": 64, "targets": "all", "output": str(out)}
    train_distill(cats, model=checkpoint(model), **told, **HARD)
    pipe = diffusers_pipeline(checkpoint(model))
    pipe.load_lora_weights(str(out))
    pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
    reference = few(pipe, guidance_scale=0.0, eta=0.0)
    told = {"sampler": "tcd", "eta": 0.0, "steps": STEPS, "guidance": 0.0}
    mine, plain = (
        mlxdiff.load(checkpoint(model), backend="numpy", loras=loras)
        .generate(PROMPT, width=64, height=64, seed=3, **told)
        .latents
        for loras in ([out], [])
    )
    check(mine, reference, plain)


def test_a_model_of_few_steps(cats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_distill(cats, model=checkpoint("sd15"), output=str(out), whole=True, **HARD)
    pipe = diffusers_pipeline(out)
    assert type(pipe).__name__ == "LatentConsistencyModelPipeline"
    reference = few(pipe, guidance_scale=5.0)
    told = {"width": 64, "height": 64, "seed": 3, "steps": STEPS}
    mine = mlxdiff.load(out, backend="numpy").generate(PROMPT, guidance=5.0, **told).latents
    teacher = mlxdiff.load(checkpoint("sd15"), backend="numpy")
    plain = teacher.generate(PROMPT, sampler="lcm", guidance=1.0, **told).latents
    check(mine, reference, plain)


def few(pipe: Any, **more: Any) -> np.ndarray:
    """Latents of diffusers with the pipeline's own scheduler, in our layout."""
    import torch

    found = pipe(
        PROMPT,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        height=64,
        width=64,
        **more,
    ).images
    return np.moveaxis(found.numpy(), 1, -1)


def test_a_trained_unet(cats: Path, tmp_path: Path) -> None:
    train_finetune(cats, model=checkpoint("sd15"), output=str(tmp_path / "out"), **HARD)
    mine = ours(mlxdiff.load(tmp_path / "out", backend="numpy"))
    reference = theirs(diffusers_pipeline(tmp_path / "out"))
    check(mine, reference, ours(mlxdiff.load(checkpoint("sd15"), backend="numpy")))


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_a_trained_controlnet(model: str, cats: Path, tmp_path: Path) -> None:
    import diffusers
    import torch

    from mlxdiff.pictures.preprocess import edges

    out = tmp_path / "net"
    told = {"control": "edges", "resolution": 64, "output": str(out)}
    train_controlnet(cats, model=checkpoint(model), **told, **HARD)
    hint = Image.fromarray(edges(np.asarray(Image.open(cats / "0.png").convert("RGB"))))
    net = diffusers.ControlNetModel.from_pretrained(out, dtype=torch.float32)
    plain = diffusers_pipeline(checkpoint(model))
    kind = type(plain).__name__.replace("Pipeline", "ControlNetPipeline")
    pipe = getattr(diffusers, kind).from_pipe(plain, controlnet=net)
    reference = theirs(pipe, image=hint)
    mine = mlxdiff.load(checkpoint(model), backend="numpy", controlnets=[out])
    own = ours(mlxdiff.load(checkpoint(model), backend="numpy"))
    check(ours(mine, control_image=hint), reference, own)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_a_trained_word(model: str, tmp_path: Path) -> None:
    import torch

    out, word, prompt = tmp_path / "own.safetensors", "<own>", "a photo of <own>"
    pictures(tmp_path / "in", caption="a photo of <own>")
    told: dict[str, Any] = {"word": word, "vectors": 2, "resolution": 64, "output": str(out)}
    train_embedding(tmp_path / "in", model=checkpoint(model), **told, **HARD)
    pipe = diffusers_pipeline(checkpoint(model))
    if model == "sdxl":
        for part, number in (("clip_l", ""), ("clip_g", "_2")):
            rows = torch.from_numpy(np.array(weights(out)[part]))
            encoder, tokenizer = (
                getattr(pipe, f"{kind}{number}") for kind in ("text_encoder", "tokenizer")
            )
            pipe.load_textual_inversion(rows, token=word, text_encoder=encoder, tokenizer=tokenizer)
    else:
        pipe.load_textual_inversion(str(out))
    given = [(out, word)] if model == "sdxl" else [out]  # SDXL's files do not hold the word
    mine = ours(mlxdiff.load(checkpoint(model), backend="numpy", embeddings=given), prompt)
    check(
        mine, theirs(pipe, prompt), ours(mlxdiff.load(checkpoint(model), backend="numpy"), prompt)
    )


@pytest.mark.parametrize("classes", [False, True])
def test_a_trained_model_of_pixels(classes: bool, tmp_path: Path) -> None:
    import diffusers
    import torch

    for name in ("dots", "lines"):
        pictures(tmp_path / "in" / name, 16, caption=None)
    out = tmp_path / "out"
    told: dict[str, Any] = {"resolution": 16, "channels": (8, 16), "layers": 1, "attention": 8}
    told |= {"classes": classes, "output": str(out), "noise": "cosine"}
    train_unconditional(tmp_path / "in", **told, **HARD | {"steps": 6})
    pipe = mlxdiff.load(out, backend="numpy")
    label = {"label": 1} if classes else {}
    mine = pipe.generate(seed=3, steps=STEPS, sampler="ddpm", **label).latents
    generator = torch.Generator().manual_seed(3)
    if not classes:
        reference = diffusers.DDPMPipeline.from_pretrained(out)
        reference.set_progress_bar_config(disable=True)
        found = reference(generator=generator, num_inference_steps=STEPS, output_type="np").images
        assert np.abs(found - (mine.clip(-1, 1) / 2 + 0.5)).max() < WITHIN
        return
    # diffusers' pipeline takes no label; its network does.
    unet = diffusers.UNet2DModel.from_pretrained(out, subfolder="unet")
    scheduler = diffusers.DDPMScheduler.from_pretrained(out, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    x = torch.randn((1, 3, 16, 16), generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = unet(x, t, torch.tensor([1])).sample
            x = scheduler.step(noise, t, x, generator=generator).prev_sample
    assert np.abs(np.moveaxis(x.numpy(), 1, -1) - mine).max() < WITHIN
