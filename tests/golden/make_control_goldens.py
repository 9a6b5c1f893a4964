"""Write pictures that ControlNets have a part in: control/cases.json and control/pictures.npz.

    python tests/golden/make_control_goldens.py

The models are the tiny ones of this folder; the ControlNets are made by tests/control_files.py, in
the tests as here, and are not stored. The control images are golden_data.photo, of another size
than the picture, and the same turned upside down for a second net.
"""

from __future__ import annotations

import json
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from make_family_goldens import CIRCLE, CLASSES, TREE, WORDS, case, load, nhwc
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from control_files import NETS, controlnet_config, controlnet_tensors  # noqa: E402
from golden_data import mask, photo  # noqa: E402

SQUARE = {"width": 64, "height": 64}
WIDE = {"width": 72, "height": 56}
PHOTO = {"image": [64, 64]}
DISC = {"mask": ["disc", 64, 64]}
SHOWN = {"control_image": [[40, 90]]}
TWO = {"controlnets": ["first", "second"], "control_image": [[64, 64], [100, 70]]}
PICTURES: dict[str, dict[str, Any]] = {
    "sd15": case(**SQUARE, **SHOWN, sampler="checkpoint"),
    "sd15-two-pictures": case(
        TREE, **WIDE, **SHOWN, sampler="dpmpp-2m", count=2, seed=5, negative_prompt="blurry"
    ),
    "sd15-part": case(
        **SQUARE, **SHOWN, sampler="ddim", control_scale=0.6, control_start=0.2, control_end=0.7
    ),
    "sd15-part-heun": case(
        **SQUARE, **SHOWN, sampler="heun", control_start=0.3, control_end=0.8, steps=5
    ),
    "sd15-guess": case("", **WIDE, **SHOWN, sampler="dpmpp-2m", guess_mode=True, guidance=3.0),
    "sd15-guess-unguided": case(
        **SQUARE, **SHOWN, sampler="dpmpp-2m", guess_mode=True, guidance=1.0
    ),
    "sd15-negative-scale": case(**SQUARE, **SHOWN, sampler="euler", control_scale=-0.5),
    "sd15-bgr": case(**SQUARE, **SHOWN, sampler="dpmpp-2m", controlnets=["bgr"]),
    "sd15-pooled": case(**SQUARE, **SHOWN, sampler="dpmpp-2m", controlnets=["pooled"]),
    "sd15-two-nets": case(
        **WIDE,
        **TWO,
        sampler="dpmpp-2m",
        control_scale=[0.8, 0.4],
        control_start=[0.0, 0.5],
        control_end=[0.5, 1.0],
    ),
    "sd15-two-guess": case(**SQUARE, **TWO, sampler="dpmpp-2m", guess_mode=True, guidance=4.0),
    "sd15-image": case(**PHOTO, **SHOWN, sampler="checkpoint", strength=0.7, control_end=0.6),
    "sd15-inpaint": case(**PHOTO, **SQUARE, **DISC, **SHOWN, sampler="dpmpp-2m", control_scale=0.7),
    "sd15-inpaint-two": case(
        **PHOTO, **SQUARE, **DISC, **TWO, sampler="euler-a", strength=0.7, count=2
    ),
    "sdxl-inpaint": case(
        **PHOTO,
        **SQUARE,
        **DISC,
        **SHOWN,
        model="sdxl",
        sampler="dpmpp-2m",
        strength=0.8,
        guidance=5.0,
    ),
    "sd21v": case(TREE, **WIDE, **SHOWN, model="sd21v", sampler="checkpoint"),
    "lcm": case(**SQUARE, **SHOWN, model="lcm", sampler="checkpoint", steps=4, guidance=8.5),
    "sdxl": case(**WIDE, **SHOWN, model="sdxl", sampler="checkpoint", negative_prompt="blurry"),
    "sdxl-guess": case(
        TREE, **SQUARE, **SHOWN, model="sdxl", sampler="euler", guess_mode=True, count=2
    ),
    "sdxl-two-nets": case(
        **SQUARE, **TWO, model="sdxl", sampler="dpmpp-2m", control_scale=0.5, control_end=0.7
    ),
    "sdxl-image": case(
        **PHOTO, **SHOWN, model="sdxl", sampler="dpmpp-2m", strength=0.6, control_start=0.2
    ),
}
PICTURES = {k: {"model": "sd15", "controlnets": ["first"]} | v for k, v in PICTURES.items()}
CONTROL_WORDS = {
    "control_scale": "controlnet_conditioning_scale",
    "control_start": "control_guidance_start",
    "control_end": "control_guidance_end",
    "guess_mode": "guess_mode",
}


KINDS = {  # for Stable Diffusion, for SDXL
    "text": (StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline),
    "image": (StableDiffusionControlNetImg2ImgPipeline, StableDiffusionXLControlNetImg2ImgPipeline),
    "mask": (StableDiffusionControlNetInpaintPipeline, StableDiffusionXLControlNetInpaintPipeline),
}


def controlnet(model: str, name: str) -> ControlNetModel:
    """One of the ControlNets of control_files, in diffusers."""
    seed, changes = NETS[name]
    config = controlnet_config(model, **changes)
    net = ControlNetModel.from_config(config).eval()
    tensors = controlnet_tensors(config, seed)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=True)
    return net


@lru_cache
def loaded(model: str) -> Any:
    """A model in diffusers, with its own sampler."""
    return load(model, {})


def scheduler(own: Any, arguments: dict[str, Any]) -> Any:
    """The sampler of a case; ``own`` is the config of the model's own."""
    name = arguments["sampler"]
    if name == "checkpoint":
        return getattr(diffusers, own["_class_name"]).from_config(own)
    kind, settings = CLASSES[name]
    return kind.from_config(own, **settings)


def run(arguments: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents (B, h, w, C) and uint8 pictures (B, H, W, 3) as diffusers' pipeline makes them."""
    model = arguments["model"]
    base = loaded(model)
    to_image, xl = "image" in arguments, model == "sdxl"
    task = "mask" if "mask" in arguments else "image" if to_image else "text"
    nets = [controlnet(model, name) for name in arguments["controlnets"]]
    parts = dict(base.components)
    parts["scheduler"] = scheduler(base.scheduler.config, arguments)
    parts["add_watermarker" if xl else "requires_safety_checker"] = False
    pipe = KINDS[task][xl](controlnet=nets if len(nets) > 1 else nets[0], **parts)
    pipe.set_progress_bar_config(disable=True)
    shown: Any = [Image.fromarray(photo(*size)) for size in arguments["control_image"]]
    shown = [p if i == 0 else p.transpose(Image.Transpose.ROTATE_180) for i, p in enumerate(shown)]
    shown = shown if len(nets) > 1 else shown[0]
    words = {k: v for k, v in WORDS.items() if k != "count"}
    given = {theirs: arguments[ours] for ours, theirs in words.items() if ours in arguments}
    given |= {
        theirs: arguments[ours] for ours, theirs in CONTROL_WORDS.items() if ours in arguments
    }
    given.setdefault("controlnet_conditioning_scale", 1.0)  # diffusers' own is 0.8 for img2img
    if task == "mask":
        given["mask_image"] = Image.fromarray(mask(*arguments["mask"]))
        given.setdefault("strength", 1.0)
    if to_image:
        given |= {"image": Image.fromarray(photo(*arguments["image"])), "control_image": shown}
        height, width = arguments["image"]
        given |= {"height": height, "width": width}
    else:
        given |= {side: arguments[side] for side in ("width", "height")} | {"image": shown}
    given["generator"] = torch.Generator("cpu").manual_seed(seed)
    last: dict[str, torch.Tensor] = {}

    def keep(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        last.update(state)
        return state

    images = pipe(arguments["prompt"], callback_on_step_end=keep, output_type="np", **given).images
    return nhwc(last["latents"]), (images * 255).round().astype(np.uint8)


@torch.no_grad()
def main() -> None:
    """Write cases.json and pictures.npz."""
    folder = HERE / "control"
    folder.mkdir(exist_ok=True)
    document = {"prompts": [CIRCLE, TREE], "pictures": PICTURES}
    (folder / "cases.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    pictures: dict[str, np.ndarray] = {}
    for label, arguments in PICTURES.items():
        # One at a time: of several, the pipelines that inpaint encode the image with one generator.
        seeds = range(arguments["seed"], arguments["seed"] + arguments.get("count", 1))
        drawn = [run(arguments, seed) for seed in seeds]
        latents, image = (np.concatenate(part) for part in zip(*drawn, strict=True))
        pictures[f"{label}/latents"], pictures[f"{label}/image"] = latents, image
        print(f"{label}: contrast {image.std():.0f}", flush=True)
    np.savez_compressed(folder / "pictures.npz", **pictures)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
