"""Pictures of the built-in model by diffusers, float32.

    python tests/golden/make_builtin_goldens.py

The built-in model is shipped converted; here its convolutions get torch's layout back and diffusers
reads it as any other folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
BUILTIN = HERE.parent.parent / "mlxdiff" / "builtin"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
SEVERAL = "a small yellow star above a large purple ring on a black background"
CASES = [
    {
        "prompt": "a small red circle left of a large blue square on a yellow background",
        "seed": 0,
        "steps": 12,
        "guidance": 4.0,
        "schedule": "normal",
    },
    {"prompt": SEVERAL, "seed": 3, "steps": 12, "guidance": 7.5, "schedule": "karras"},
    {
        "prompt": "a large green heart on a pink background",
        "negative_prompt": "red",
        "seed": 5,
        "steps": 25,
        "guidance": 2.0,
        "schedule": "normal",
    },
]


def diffusers_folder(folder: Path) -> Path:
    """The built-in model in diffusers' layout."""
    shutil.copytree(BUILTIN, folder)
    for component, name in WEIGHTS.items():
        path = folder / component / "model.safetensors"
        weights = {
            key: np.ascontiguousarray(value.transpose(0, 3, 1, 2)) if value.ndim == 4 else value
            for key, value in load_file(path).items()
        }
        path.unlink()
        save_file(weights, folder / component / name, {"format": "pt"})
    return folder


FAST = [("a large purple ring above a small red circle on a gray background", 1), (SEVERAL, 2)]


def add_student(unet: torch.nn.Module) -> None:
    """Add to the weights what the file of --fast holds: their changes."""
    changes = load_file(BUILTIN / "few_step.safetensors")
    for name, value in unet.named_parameters():
        module, _, part = name.rpartition(".")
        kind = "diff" if part == "weight" else "diff_b"
        change = changes.pop(f"lora_unet_{module.replace('.', '_')}.{kind}")
        value.data += torch.from_numpy(change.astype(np.float32))
    assert not changes, list(changes)


def drawn(pipe: StableDiffusionPipeline, prompt: str, **how: object) -> tuple:
    """Return latents (1, h, w, C) and the picture (1, H, W, 3) uint8."""
    latents = pipe(prompt, output_type="latent", **how).images
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    image = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return latents.permute(0, 2, 3, 1).numpy(), (image * 255).round().astype(np.uint8)


def main() -> None:
    """Write builtin/cases.json, builtin/pictures.npz and builtin/fast.npz."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = diffusers_folder(Path(temporary) / "builtin")
        pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arrays, fast = {}, {}
    for i, case in enumerate(CASES):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, use_karras_sigmas=case["schedule"] == "karras"
        )
        arrays[f"{i}/latents"], arrays[f"{i}/image"] = drawn(
            pipe,
            case["prompt"],
            negative_prompt=case.get("negative_prompt"),
            num_inference_steps=case["steps"],
            guidance_scale=case["guidance"],
            generator=torch.Generator("cpu").manual_seed(case["seed"]),
        )
    (HERE / "builtin").mkdir(exist_ok=True)
    np.savez_compressed(HERE / "builtin" / "pictures.npz", **arrays)
    text = json.dumps(CASES, indent=1)
    (HERE / "builtin" / "cases.json").write_text(text + "\n", encoding="utf-8")

    add_student(pipe.unet)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    for i, (prompt, seed) in enumerate(FAST):
        generator = torch.Generator("cpu").manual_seed(seed)
        how = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": generator}
        fast[f"{i}/latents"], fast[f"{i}/image"] = drawn(pipe, prompt, **how)
    cases = {"prompts": [prompt for prompt, _ in FAST], "seeds": [seed for _, seed in FAST]}
    np.savez_compressed(HERE / "builtin" / "fast.npz", **fast, **cases)


if __name__ == "__main__":
    main()
