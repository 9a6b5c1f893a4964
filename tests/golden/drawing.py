"""What the scripts of this folder share that have diffusers draw whole pictures.

A case is the arguments of Pipeline.generate, and beside them names of what stands in this folder
(model, vae, refiner) or is made by the tests' own modules (controlnets, ip_adapters, loras,
embeddings). Pictures are sizes of golden_data.photo and golden_data.mask. Arguments that are left
out are left to diffusers' own defaults.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from make_goldens import CIRCLE, TREE, nhwc
from PIL import Image

from mlxdiff.samplers.registry import samplers_for

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from golden_data import checkpoint  # noqa: E402

Drawn = tuple[np.ndarray, np.ndarray]
"""Latents (B, h, w, C) and uint8 pictures (B, H, W, 3)."""
OWN: dict[str, Any] = {"clip_sample": False}  # of a latent model, whatever the class's default
WORDS = {  # ours -> diffusers'
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_rescale": "guidance_rescale",
    "image_guidance": "image_guidance_scale",
    "noise_level": "noise_level",
    "strength": "strength",
    "eta": "eta",
    "aesthetic_score": "aesthetic_score",
    "negative_aesthetic_score": "negative_aesthetic_score",
    "denoising_start": "denoising_start",
    "denoising_end": "denoising_end",
    "control_scale": "controlnet_conditioning_scale",
    "control_start": "control_guidance_start",
    "control_end": "control_guidance_end",
    "guess_mode": "guess_mode",
}


def case(prompt: str = CIRCLE, **arguments: Any) -> dict[str, Any]:
    """A case: 6 steps, and the schedule named where the sampler is."""
    named = "sampler" in arguments and arguments["sampler"] != "checkpoint"
    schedule = {"schedule": "normal"} if named else {}
    return {"prompt": prompt, "seed": 0, "steps": 6} | schedule | arguments


def opened(name: str) -> Any:
    """A model as its folder says."""
    pipe = DiffusionPipeline.from_pretrained(checkpoint(name), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prepare(pipe: Any, arguments: dict[str, Any]) -> Any:
    """Sampler and VAE of a case; returns the pipeline."""
    if "vae" in arguments:
        pipe.vae = AutoencoderTiny.from_pretrained(checkpoint("taesd"), dtype=torch.float32)
    own, sampler = pipe.scheduler.config, arguments.get("sampler", "checkpoint")
    if sampler == "checkpoint":
        kind, settings = getattr(diffusers, own["_class_name"]), {}
    else:
        chosen = samplers_for(own)[sampler]
        kind, settings = getattr(diffusers, str(chosen.scheduler.reference)), dict(chosen.arguments)
        if "clip_sample" in inspect.signature(kind.__init__).parameters:
            settings |= OWN
    if (schedule := arguments.get("schedule")) in ("karras", "exponential"):
        edm = own["_class_name"].startswith("EDM")
        more = {"sigma_schedule": schedule} if edm else {f"use_{schedule}_sigmas": True}
        settings = settings | more
    pipe.scheduler = kind.from_config(own, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def words(arguments: dict[str, Any], *but: str) -> dict[str, Any]:
    """Those of a case's arguments that diffusers has by another name, some left out."""
    return {t: arguments[o] for o, t in WORDS.items() if o in arguments and o not in but}


def pictures(kind: Callable[..., np.ndarray], sizes: Iterable[list[Any]]) -> list[Image.Image]:
    """Pictures of golden_data.photo or golden_data.mask."""
    return [Image.fromarray(kind(*size)) for size in sizes]


def seeds(arguments: dict[str, Any]) -> range:
    """Of the pictures of a case."""
    return range(arguments["seed"], arguments["seed"] + arguments.get("count", 1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def draw(
    pipe: Any,
    prompt: Any,
    /,
    *,
    output_type: str = "np",
    after: Callable[[Any, int], None] | None = None,
    **given: Any,
) -> Any:
    """Have a pipeline draw: Drawn, or what it gives itself where no pictures are asked for.

    Args:
        prompt: the first argument of the pipeline, whatever it is.
        after: called with the pipeline and the step when a step is done.
    """
    last: dict[str, torch.Tensor] = {}

    def keep(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        last.update(state)
        if after is not None:
            after(pipe, step)
        return state

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        given["callback_on_step_end"] = keep
    else:  # the SDXL class that edits and the upscaler have the older kind
        given |= {"callback": lambda step, time, x: last.update(latents=x), "callback_steps": 1}
    pasted = "padding_mask_crop" in given  # diffusers does that with Pillow's pictures alone
    images = pipe(prompt, output_type="pil" if pasted else output_type, **given).images
    if pasted:
        return nhwc(last["latents"]), np.stack([np.asarray(image) for image in images])
    if output_type != "np":
        return images
    return nhwc(last["latents"]), (images * 255).round().astype(np.uint8)


def write_pictures(
    folder: Path,
    cases: dict[str, dict[str, Any]],
    run: Callable[[dict[str, Any], int], Drawn],
    names: Iterable[str] = (),
    **more: Any,
) -> None:
    """Write cases.json and pictures.npz, the pictures of a case one at a time.

    One at a time, since of several diffusers encodes the image with the first one's generator.

    Args:
        run: draws the picture of a case with a seed.
        names: draw these cases anew; none: all.
        more: what else stands in cases.json.
    """
    folder.mkdir(exist_ok=True)
    document = {"prompts": [CIRCLE, TREE], "pictures": cases} | more
    (folder / "cases.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    arrays: dict[str, np.ndarray] = {}
    if names := list(names):
        with np.load(folder / "pictures.npz") as before:
            arrays = {k: before[k] for k in before.files if k.split("/")[0] in cases}
    for label in names or cases:
        drawn = [run(cases[label], seed) for seed in seeds(cases[label])]
        latents, image = (np.concatenate(part) for part in zip(*drawn, strict=True))
        arrays[f"{label}/latents"], arrays[f"{label}/image"] = latents, image
        clipped = np.isin(image, (0, 255)).mean()
        name = f"{folder.name} {label}"
        print(f"{name}: contrast {image.std():.0f}, clipped {clipped:.1%}", flush=True)
    np.savez_compressed(folder / "pictures.npz", **arrays)
