"""Compute the golden arrays and pictures of this folder's tiny checkpoints with diffusers.

    python tests/golden/make_goldens.py [sd15 sd21v sdxl] [--report]

Everything is computed in float32; --report computes it again in float64 (the yardstick of rounding)
and with a guidance scale that is 2 % off (which must not pass the picture bound), and prints both.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from golden_data import checkpoint, picture_difference  # noqa: E402

PROMPTS = [
    "",
    "a small red circle left of a large blue square on a yellow background",
    "A photograph of an ASTRONAUT riding a horse!!  4k, it's  sharp",
    "naïve café, 東京タワー, 🎈 and 1234567890",
    "<|endoftext|> in the middle <|startoftext|> of the text",
    "an orange tree in the garden of a stone house, " * 12,
]
CIRCLE, TREE = PROMPTS[1], "an orange tree in the garden of a stone house, spring morning"
SAMPLERS = {"normal": False, "karras": True}  # design: what --schedule sets


def picture(prompt: str = CIRCLE, **arguments: Any) -> dict[str, Any]:
    """Arguments of Pipeline.generate for one case."""
    usual = {"steps": 10, "guidance": 7.5, "seed": 0, "width": 64, "height": 64}
    return {"prompt": prompt, "sampler": "dpmpp-2m", "schedule": "normal"} | usual | arguments


PICTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "plain": picture(),
        "25-steps-karras": picture(TREE, steps=25, schedule="karras", seed=1),
        "negative-wide": picture(negative_prompt="blurry, low quality", width=96, seed=2),
        "empty-negative-tall": picture(negative_prompt="", height=96, guidance=5.0, seed=3),
        "no-guidance": picture(TREE, guidance=1.0, steps=25, seed=4),
        "odd-karras": picture(width=72, height=56, schedule="karras", seed=5),
        "empty-prompt": picture("", negative_prompt="watermark", seed=2**32 - 1),
        "two-seeds": picture(PROMPTS[5], count=2, seed=7),
    },
    "sd21v": {
        "plain": picture(width=96, height=96),
        "25-steps": picture(TREE, steps=25, seed=1),
        "karras-negative-wide": picture(
            schedule="karras", negative_prompt="blurry", width=96, seed=2
        ),
        "rescale": picture(guidance_rescale=0.7, seed=3),
        "no-guidance-odd": picture(TREE, guidance=1.0, width=72, height=56, seed=4),
        "two-seeds-karras": picture(schedule="karras", guidance=5.0, count=2, seed=5),
    },
    "sdxl": {
        "plain": picture(guidance=5.0, width=128, height=128),
        "25-steps-karras": picture(TREE, steps=25, schedule="karras", guidance=5.0, seed=1),
        "negative-wide": picture(negative_prompt="blurry, low quality", width=96, seed=2),
        "empty-negative": picture(negative_prompt="", seed=2),
        "no-guidance-tall": picture(TREE, guidance=1.0, height=96, seed=3),
        "odd-karras": picture(width=72, height=56, schedule="karras", seed=4),
        "two-seeds-rescale": picture(guidance_rescale=0.7, count=2, seed=5),
    },
}


def load(name: str, dtype: torch.dtype) -> Any:
    """A pipeline of diffusers for one of the tiny checkpoints."""
    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    pipe = kind.from_pretrained(checkpoint(name), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) to (B, H, W, C)."""
    return np.ascontiguousarray(tensor.permute(0, 2, 3, 1).numpy())


# --------------------------------------------------------------------------------------- components


def text_arrays(pipe: Any, component: str) -> dict[str, np.ndarray]:
    """A text encoder on PROMPTS and on ids beyond the tokenizer's vocabulary, where it has them."""
    suffix = component.removeprefix("text_encoder")
    tokenizer, encoder = getattr(pipe, "tokenizer" + suffix), getattr(pipe, component)
    ids = tokenizer(
        PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    if encoder.config.vocab_size > len(tokenizer):
        added = ids[1:3].clone()
        added[0, 3], added[1, 2] = len(tokenizer), len(tokenizer) + 1
        ids = torch.cat([ids, added])
    out = encoder(ids, output_hidden_states=True)
    hidden = out.hidden_states
    found = {"last_hidden_state": out.last_hidden_state, "penultimate": hidden[-2]}
    found["embeddings"] = hidden[0]
    if hasattr(out, "text_embeds"):
        found["text_embeds"] = out.text_embeds
    else:
        found["pooled"] = out.pooler_output
    result = {f"{component}/{key}": value.numpy() for key, value in found.items()}
    return {f"{component}/input_ids": ids.numpy().astype(np.int32), **result}


def unet_arrays(pipe: Any) -> dict[str, np.ndarray]:
    """The U-Net on a square, a wide and an odd-sided batch of two at two different times."""
    result: dict[str, np.ndarray] = {}
    generator = torch.Generator().manual_seed(0)
    unet = pipe.unet
    text_width = unet.config.cross_attention_dim
    sizes = {"square": (8, 8, 999, 1), "wide": (8, 12, 500, 500), "odd": (9, 7, 21, 761)}
    for case, (height, width, *times) in sizes.items():
        inputs = {
            "sample": torch.randn((2, 4, height, width), generator=generator),
            "timesteps": torch.tensor(times),
            "encoder_hidden_states": torch.randn((2, 77, text_width), generator=generator),
        }
        if unet.config.addition_embed_type:
            side = [8.0 * height, 8.0 * width]
            inputs["text_embeds"] = torch.randn((2, 48), generator=generator)
            inputs["time_ids"] = torch.tensor([[*side, 0, 0, *side], [*side, 16, 8, 1024, 768]])
        given = {
            k: v if k in ("timesteps", "time_ids") else v.to(unet.dtype) for k, v in inputs.items()
        }
        added = {k: given[k] for k in ("text_embeds", "time_ids") if k in given} or None
        output = unet(
            given["sample"],
            given["timesteps"],
            given["encoder_hidden_states"],
            added_cond_kwargs=added,
        ).sample
        inputs["sample"] = torch.from_numpy(nhwc(inputs["sample"]))
        result |= {f"unet.{case}/{key}": value.numpy() for key, value in inputs.items()}
        result[f"unet.{case}/timesteps"] = np.array(times, np.float32)
        result[f"unet.{case}/output"] = nhwc(output)
    return result


def vae_arrays(pipe: Any) -> dict[str, np.ndarray]:
    """The VAE both ways, on pictures that are not square."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((2, 3, 56, 72), generator=generator) * 2 - 1
    latents = torch.randn((2, 4, 9, 7), generator=generator) / pipe.vae.config.scaling_factor
    posterior = pipe.vae.encode(image.to(pipe.vae.dtype)).latent_dist
    return {
        "vae/image": nhwc(image),
        "vae/mean": nhwc(posterior.mean),
        "vae/logvar": nhwc(posterior.logvar),
        "vae/latents": nhwc(latents),
        "vae/decoded": nhwc(pipe.vae.decode(latents.to(pipe.vae.dtype)).sample),
    }


def component_arrays(pipe: Any) -> dict[str, np.ndarray]:
    """All golden arrays of one checkpoint, in the precision of the pipeline."""
    encoders = [c for c in ("text_encoder", "text_encoder_2") if getattr(pipe, c, None)]
    texts = [text_arrays(pipe, component) for component in encoders]
    return {k: v for part in [*texts, unet_arrays(pipe), vae_arrays(pipe)] for k, v in part.items()}


# ----------------------------------------------------------------------------------- whole pictures


def run(pipe: Any, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Latents (B, h, w, C) and uint8 pictures (B, H, W, 3) as diffusers' pipeline makes them."""
    count, seed = arguments.get("count", 1), arguments["seed"]
    height, width = arguments["height"], arguments["width"]
    noise = [
        torch.randn(
            (1, 4, height // 8, width // 8), generator=torch.Generator("cpu").manual_seed(s)
        )
        for s in range(seed, seed + count)
    ]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=SAMPLERS[arguments["schedule"]]
    )
    last: dict[str, torch.Tensor] = {}

    def keep(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        last.update(state)
        return state

    images = pipe(
        arguments["prompt"],
        negative_prompt=arguments.get("negative_prompt"),
        num_inference_steps=arguments["steps"],
        guidance_scale=arguments["guidance"],
        guidance_rescale=arguments.get("guidance_rescale", 0.0),
        num_images_per_prompt=count,
        height=height,
        width=width,
        latents=torch.cat(noise).to(pipe.unet.dtype),
        output_type="np",
        callback_on_step_end=keep,
    ).images
    return nhwc(last["latents"]), (images * 255).round().astype(np.uint8)


# --------------------------------------------------------------------------------------------- main


def report(name: str, arrays: dict[str, np.ndarray], pictures: dict[str, np.ndarray]) -> None:
    """Print how far float64 is, and how far a guidance scale 2 % off."""
    single, double = load(name, torch.float32), load(name, torch.float64)
    for key, value in component_arrays(double).items():
        difference = np.abs(arrays[key].astype(np.float64) - value)
        if difference.any():
            print(f"{name} {key}: float64 {difference.max() / value.std():.1e} std")
    for case, arguments in PICTURES[name].items():
        latents, image = pictures[f"{case}/latents"], pictures[f"{case}/image"]
        exact, exact_image = run(double, arguments)
        worst = np.abs(latents - exact).max() / exact.std()
        within, mean = picture_difference(image, exact_image)
        clipped = np.isin(image, (0, 255)).mean()
        line = f"{name} {case}: float64 {worst:.1e} std, {within:.2%} {mean:.4f} levels"
        line += f"; contrast {image.std():.0f}, clipped {clipped:.1%}"
        if arguments["guidance"] > 1:
            off = run(single, arguments | {"guidance": 1.02 * arguments["guidance"]})[1]
            within, mean = picture_difference(image, off)
            line += f"; guidance 2 % off {within:.2%} {mean:.3f} levels"
        print(line, flush=True)


@torch.no_grad()
def main(names: list[str], with_report: bool) -> None:
    """Write components.npz, pictures.npz and cases.json of each model."""
    for name in names or list(PICTURES):
        pipe = load(name, torch.float32)
        arrays = component_arrays(pipe)
        pictures: dict[str, np.ndarray] = {}
        for case, arguments in PICTURES[name].items():
            pictures[f"{case}/latents"], pictures[f"{case}/image"] = run(pipe, arguments)
        np.savez_compressed(HERE / name / "components.npz", **arrays)
        np.savez_compressed(HERE / name / "pictures.npz", **pictures)
        text = json.dumps({"prompts": PROMPTS, "pictures": PICTURES[name]}, indent=1)
        (HERE / name / "cases.json").write_text(text + "\n", encoding="utf-8")
        print(name, "written", flush=True)
        if with_report:
            report(name, arrays, pictures)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main([a for a in sys.argv[1:] if a != "--report"], "--report" in sys.argv)
