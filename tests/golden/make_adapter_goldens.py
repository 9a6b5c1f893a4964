"""Write pictures that IP-Adapters have a part in: ip-adapter/cases.json, pictures.npz and clip.npz.

    python tests/golden/make_adapter_goldens.py

The models are the tiny ones of this folder; adapters and image encoder are made by
tests/adapter_files.py, in the tests as here, and are not stored. The pictures that are shown are
golden_data.photo of several sizes; clip.npz has what transformers' CLIP makes of them.
"""

from __future__ import annotations

import json
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from make_control_goldens import controlnet, loaded, scheduler
from make_family_goldens import CIRCLE, TREE, WORDS, case, nhwc
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from adapter_files import ADAPTERS, ENCODER, adapter_tensors, encoder_tensors  # noqa: E402
from golden_data import checkpoint, photo  # noqa: E402

SQUARE = {"width": 64, "height": 64, "sampler": "dpmpp-2m"}
WIDE = {"width": 72, "height": 56, "sampler": "dpmpp-2m"}
SEEN = {"ip_image": [[40, 90]]}
PICTURES: dict[str, dict[str, Any]] = {
    "sd15": case(**WIDE, **SEEN),
    "sd15-unguided": case(**SQUARE, **SEEN, guidance=1.0),
    "sd15-scale": case(TREE, **SQUARE, **SEEN, ip_scale=0.4, negative_prompt="blurry", count=2),
    "sd15-three-pictures": case(**SQUARE, ip_image=[[40, 90], [28, 28], [61, 33]]),
    "sd15-image": case(image=[64, 64], sampler="euler", strength=0.7, **SEEN),
    "sd15-plus": case(**WIDE, **SEEN, ip_adapters=["plus"], ip_scale=0.8),
    "sd15-plus-unguided": case(**SQUARE, **SEEN, ip_adapters=["plus"], guidance=1.0),
    "sd15-full": case(**SQUARE, **SEEN, ip_adapters=["full"]),
    "sd15-two": case(
        **SQUARE, ip_adapters=["image", "plus"], ip_image=[[40, 90], [61, 33]], ip_scale=[0.7, 0.3]
    ),
    "sd21v": case(**SQUARE, **SEEN, model="sd21v"),
    "sdxl": case(**WIDE, **SEEN, model="sdxl"),
    "sdxl-plus": case(TREE, **SQUARE, **SEEN, model="sdxl", ip_adapters=["plus"], count=2),
}
PICTURES = {k: {"model": "sd15", "ip_adapters": ["image"]} | v for k, v in PICTURES.items()}
KINDS = {
    "plain": StableDiffusionPipeline,
    "image": StableDiffusionImg2ImgPipeline,
    "controlnet": StableDiffusionControlNetPipeline,
    "sdxl": StableDiffusionXLPipeline,
}


@lru_cache
def encoder() -> CLIPVisionModelWithProjection:
    """The image encoder of adapter_files, in transformers."""
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)).eval()
    tensors = {name: torch.from_numpy(array) for name, array in encoder_tensors().items()}
    model.load_state_dict(tensors, strict=True)
    return model


def processor() -> CLIPImageProcessorPil:
    """Pictures for it, as diffusers makes one that a model's folder has none of."""
    side = ENCODER["image_size"]
    return CLIPImageProcessorPil(size=side, crop_size=side)


def seen(arguments: dict[str, Any]) -> list[Image.Image]:
    """The pictures that are shown."""
    return [Image.fromarray(photo(*size)) for size in arguments["ip_image"]]


def run(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Latents (B, h, w, C) and uint8 pictures (B, H, W, 3) as diffusers' pipeline makes them."""
    model = arguments["model"]
    base = loaded(model)
    kind = next((k for k in ("image", "controlnet") if k in arguments or f"{k}s" in arguments), "")
    kind = kind or ("sdxl" if model == "sdxl" else "plain")
    parts = dict(base.components)
    parts |= {"scheduler": scheduler(base.scheduler.config, arguments)}
    parts |= {"image_encoder": encoder(), "feature_extractor": processor()}
    if kind == "controlnet":
        parts["controlnet"] = controlnet(model, arguments["controlnets"][0])
    parts["add_watermarker" if model == "sdxl" else "requires_safety_checker"] = False
    pipe = KINDS[kind](**parts)
    pipe.set_progress_bar_config(disable=True)
    states = []
    for name in arguments["ip_adapters"]:
        tensors = adapter_tensors(ADAPTERS[name][0], checkpoint(model), ADAPTERS[name][1])
        state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, array in tensors.items():
            table, _, rest = key.partition(".")
            state[table][rest] = torch.from_numpy(array)
        states.append(state)
    pipe.load_ip_adapter(
        states, subfolder="", weight_name=[""] * len(states), image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(arguments.get("ip_scale", 1.0))
    given = {theirs: arguments[ours] for ours, theirs in WORDS.items() if ours in arguments}
    shown: Any = seen(arguments)
    given["ip_adapter_image"] = shown if len(states) > 1 else [shown]
    if kind == "image":
        given["image"] = Image.fromarray(photo(*arguments["image"]))
    else:
        given |= {side: arguments[side] for side in ("width", "height")}
    if kind == "controlnet":
        given["image"] = Image.fromarray(photo(*arguments["control_image"][0]))
    seeds = range(arguments["seed"], arguments["seed"] + arguments.get("count", 1))
    given["generator"] = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    last: dict[str, torch.Tensor] = {}

    def keep(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        last.update(state)
        return state

    images = pipe(arguments["prompt"], callback_on_step_end=keep, output_type="np", **given).images
    pipe.unload_ip_adapter()
    return nhwc(last["latents"]), (images * 255).round().astype(np.uint8)


def clip_arrays() -> dict[str, np.ndarray]:
    """Pixels, embeddings and penultimate states of pictures of several sizes."""
    arrays = {}
    for height, width in ((40, 90), (61, 33), (28, 28), (15, 200)):
        pixels = processor()(Image.fromarray(photo(height, width)), return_tensors="pt")
        out = encoder()(pixels.pixel_values, output_hidden_states=True)
        arrays[f"{height}x{width}/pixels"] = nhwc(pixels.pixel_values)
        arrays[f"{height}x{width}/image_embeds"] = out.image_embeds.numpy()
        arrays[f"{height}x{width}/penultimate"] = out.hidden_states[-2].numpy()
    return arrays


@torch.no_grad()
def main() -> None:
    """Write cases.json, pictures.npz and clip.npz."""
    folder = HERE / "ip-adapter"
    folder.mkdir(exist_ok=True)
    document = {"prompts": [CIRCLE, TREE], "pictures": PICTURES}
    (folder / "cases.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(folder / "clip.npz", **clip_arrays())
    pictures: dict[str, np.ndarray] = {}
    for label, arguments in PICTURES.items():
        latents, image = run(arguments)
        pictures[f"{label}/latents"], pictures[f"{label}/image"] = latents, image
        print(f"{label}: contrast {image.std():.0f}", flush=True)
    np.savez_compressed(folder / "pictures.npz", **pictures)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
