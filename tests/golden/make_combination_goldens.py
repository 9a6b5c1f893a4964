"""Write pictures that several additions have a part in: combinations/cases.json and pictures.npz.

    python tests/golden/make_combination_goldens.py [CASE ...]

Models, LoRAs, words, ControlNets and IP-Adapters are those of the other scripts of this folder;
what is new is that they meet.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from additions import run
from drawing import HERE, TREE, case, write_pictures
from make_prompt_goldens import TOYS
from make_prompt_goldens import WORDS as TOY_FILES

SQUARE = {"width": 48, "height": 48, "sampler": "dpmpp-2m"}
WIDE = {"width": 56, "height": 40, "sampler": "dpmpp-2m"}
PHOTO = {"image": [48, 40]}
REPAINT = {**PHOTO, "mask": ["disc", 64, 64]}
CONTROL = {"controlnets": ["first"], "control_image": [[40, 90]]}
TWO = {"controlnets": ["first", "second"], "control_image": [[64, 64], [100, 70]]}
SEEN = {"ip_adapters": ["image"], "ip_image": [[40, 90]]}
PLUS = {"ip_adapters": ["plus"], "ip_image": [[61, 33]]}
STYLE = {"loras": [["sd15-kohya", 0.7]]}
STYLES = {"loras": [["sd15-peft", 0.8], ["sd15-kohya", -0.5]]}
TOY = {"prompt": TOYS, "embeddings": TOY_FILES, "negative_prompt": "dog-toy"}
XL_STYLE = {"model": "sdxl", "guidance": 5.0, "loras": [["sdxl-kohya", 0.7]]}
PICTURES: dict[str, dict[str, Any]] = {
    "lora-control-inpaint": case(**WIDE, **REPAINT, **STYLE, **CONTROL, count=2, seed=3),
    "loras-words": case(**WIDE, **STYLES, **TOY),
    "lora-adapter": case(TREE, **WIDE, **STYLE, **SEEN, ip_scale=0.6),
    "adapter-inpaint": case(**WIDE, **REPAINT, **PLUS, strength=0.8),
    "adapter-control-inpainting": case(
        **SQUARE, **REPAINT, **SEEN, **CONTROL, model="sd15-inpainting"
    ),
    "adapter-controls-guess": case(
        **WIDE, **PLUS, **TWO, guess_mode=True, guidance=4.0, control_end=0.7
    ),
    "loras-words-controls-image": case(
        **PHOTO, **STYLES, **TOY, **TWO, sampler="euler-a", strength=0.8, control_scale=[0.8, 0.4]
    ),
    "everything": case(
        **WIDE, **REPAINT, **STYLES, **TOY, **TWO, **PLUS, ip_scale=0.7, control_start=0.2, count=2
    ),
    "interval-control-adapter": case(
        **WIDE, **CONTROL, **SEEN, guidance_interval=[0.3, 0.8], negative_prompt="blurry"
    ),
    "interval-guess": case(**SQUARE, **CONTROL, guess_mode=True, guidance_interval=[0.0, 0.5]),
    "v-lora-control-adapter": case(
        **WIDE, **CONTROL, **SEEN, model="sd21v", loras=[["sd21v-kohya", 0.8]]
    ),
    "edit-adapter": case(**PHOTO, **SEEN, model="pix2pix", sampler="euler"),
    "edit-adapter-plus": case(
        TREE, image=[40, 64], **PLUS, model="pix2pix", sampler="dpmpp-2m", image_guidance=1.2
    ),
    "upscale-lora": case(
        image=[16, 20],
        model="x4-upscaler",
        sampler="dpmpp-2m",
        loras=[["x4-upscaler-peft", 0.8]],
        guidance=3.0,
    ),
    "sdxl-lora-control-image": case(
        image=[40, 56], **XL_STYLE, **CONTROL, sampler="dpmpp-2m", strength=0.6
    ),
    "sdxl-lora-inpaint": case(**WIDE, **REPAINT, **XL_STYLE, count=2),
    "sdxl-interval-lora-control-adapter": case(
        **WIDE, **SEEN, **CONTROL, **XL_STYLE, guidance_interval=[0.3, 1.0]
    ),
    "sdxl-everything": case(
        "a photo of xl-toy, mist",
        **SQUARE,
        **REPAINT,
        **XL_STYLE,
        **CONTROL,
        **SEEN,
        embeddings=["xl-toy.safetensors"],
        strength=0.9,
    ),
    "sdxl-refined": case(
        **WIDE, **CONTROL, **XL_STYLE, refiner="sdxl-refiner", steps=10, denoising_end=0.7
    ),
    "hires": case(
        width=40,
        height=32,
        **STYLE,
        **CONTROL,
        **SEEN,
        sampler="dpmpp-2m",
        hires=1.5,
        hires_upscaler="latent-nearest",
    ),
}
PICTURES = {label: {"model": "sd15"} | given for label, given in PICTURES.items()}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        write_pictures(HERE / "combinations", PICTURES, run, sys.argv[1:])
