"""Write the tiny models and pictures of what is made from a picture and more than img2img.

    python tests/golden/make_image_goldens.py [inpainting sd15-inpainting pix2pix ...]

As make_family_goldens.py does; a model differs from its base in its U-Net. The reference takes one
picture at a time here: of several it encodes the image with the first one's generator alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from drawing import (
    CIRCLE,
    HERE,
    TREE,
    Drawn,
    draw,
    generator,
    opened,
    pictures,
    prepare,
    words,
    write_pictures,
)
from drawing import case as plain_case
from golden_data import checkpoint, mask, photo
from make_checkpoints import make_unet, make_vae, write_json
from make_family_goldens import CROSS_DOWN, CROSS_UP, DOWN, SDXL, TO_IMAGE, UP
from PIL import Image
from sampler_cases import EDM_CONFIGS

# -------------------------------------------------------------------------------------- checkpoints

SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1}
SD1 = SMALL | {
    "down_block_types": [CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP],
    "attention_head_dim": 4,
}
SMALL_SDXL = (
    SDXL
    | SMALL
    | {
        "down_block_types": [DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, UP],
        "attention_head_dim": [1, 2],
    }
)
BASES = {
    "sd15-inpainting": "bk-sdm-tiny",
    "sdxl-inpainting": "segmind-vega",
    "pix2pix": "bk-sdm-tiny",
    "sdxl-pix2pix": "segmind-vega",
    "x4-upscaler": "sd21v",
    "cosxl-edit": "sdxl-pix2pix",
}
# As published: stabilityai/stable-diffusion-x4-upscaler, scheduler and low_res_scheduler.
UPSCALER_BETAS = {
    "_diffusers_version": "0.9.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
UPSCALER_DDIM = UPSCALER_BETAS | {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
UPSCALER_DDPM = UPSCALER_BETAS | {
    "_class_name": "DDPMScheduler",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
}


def make_model(name: str, folder: Path) -> None:
    """The files in which a model differs from its base: U-Net and pipeline class."""
    if name == "x4-upscaler":
        make_upscaler(folder)
        return
    if name == "cosxl-edit":
        make_cosxl_edit(folder)
        return
    sdxl = name.startswith("sdxl")
    unet = make_unet(
        200 + list(BASES).index(name),
        64 if sdxl else 32,
        in_channels=9 if "inpainting" in name else 8,
        **(SMALL_SDXL if sdxl else SD1),
    )
    unet.to(torch.float16).save_pretrained(folder / "unet")
    index = json.loads((checkpoint(BASES[name]) / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"_class_name": KINDS[name].__name__})


def make_cosxl_edit(folder: Path) -> None:
    """stabilityai/cosxl, cosxl_edit.safetensors, as diffusers' guide opens it: EDM's noise, and the
    picture's latents scaled."""
    config = EDM_CONFIGS["cosxl"]
    (folder / "scheduler").mkdir(parents=True)
    write_json(folder / "scheduler/scheduler_config.json", config)
    index = json.loads((checkpoint(BASES["cosxl-edit"]) / "model_index.json").read_text())
    own = {"scheduler": ["diffusers", config["_class_name"]], "is_cosxl_edit": True}
    write_json(folder / "model_index.json", index | own)


def make_upscaler(folder: Path) -> None:
    """stabilityai/stable-diffusion-x4-upscaler: SD 2's text encoder, the rest its own."""
    unet = make_unet(
        210,
        64,
        in_channels=7,
        sample_size=16,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=[DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
        up_block_types=[CROSS_UP, CROSS_UP, CROSS_UP, UP],
        layers_per_block=1,
        attention_head_dim=8,
        only_cross_attention=[True, True, True, False],
        use_linear_projection=True,
        num_class_embeds=1000,
    )
    unet.to(torch.float16).save_pretrained(folder / "unet")
    vae = make_vae(
        211,
        block_out_channels=[8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        sample_size=64,
        scaling_factor=0.08333,
    )
    vae.to(torch.float16).save_pretrained(folder / "vae")
    for part, config in (("scheduler", UPSCALER_DDIM), ("low_res_scheduler", UPSCALER_DDPM)):
        (folder / part).mkdir()
        write_json(folder / part / "scheduler_config.json", config)
    index = {
        "_class_name": "StableDiffusionUpscalePipeline",
        "_diffusers_version": "0.9.0.dev0",
        "low_res_scheduler": ["diffusers", "DDPMScheduler"],
        "max_noise_level": 350,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


# ------------------------------------------------------------------------------------- the pictures


def case(prompt: str = CIRCLE, **arguments: Any) -> dict[str, Any]:
    """As in make_family_goldens; image is a size of golden_data.photo, mask a kind and size of
    golden_data.mask."""
    size = {"width": 64, "height": 64, "image": [64, 64]}
    arguments = plain_case(prompt, **size | arguments)
    if "outpaint" not in arguments:
        arguments = {"mask": ["disc", 64, 64]} | arguments
    return arguments


def edit(prompt: str = CIRCLE, **arguments: Any) -> dict[str, Any]:
    """The same for a model that edits: no mask, the image's own size."""
    return plain_case(prompt, **{"image": [64, 64]} | arguments)


def upscale(prompt: str = CIRCLE, **arguments: Any) -> dict[str, Any]:
    """The same for the upscaler: the picture is small."""
    return plain_case(prompt, **{"image": [16, 16]} | arguments)


def hires(prompt: str = CIRCLE, **arguments: Any) -> dict[str, Any]:
    """The same for a run in two passes."""
    return plain_case(prompt, **{"width": 64, "height": 64, "hires": 2.0} | arguments)


SPLIT = {"refiner": "sdxl-refiner", "steps": 10, "denoising_end": 0.7, "guidance": 5.0}
FIVE = {"guidance": 5.0}
SAMPLERS = "dpmpp-2s", "dpm-2m", "unipc", "lms", "tcd"  # that no other case has
PICTURES: dict[str, dict[str, dict[str, Any]]] = {
    "inpainting": {
        **{
            f"sd15-{name}": case(TREE, model="bk-sdm-tiny", sampler=name, width=48, strength=0.8)
            for name in SAMPLERS
        },
        "sd15-checkpoint": case(sampler="checkpoint", negative_prompt="blurry"),
        "sd15-karras": case(sampler="dpmpp-2m", schedule="karras", mask=["half", 64, 64]),
        "sd15-weak": case(sampler="euler", strength=0.35),
        "sd15-heun-full": case(sampler="heun", steps=4),
        "sd15-ddpm": case(sampler="ddpm", strength=0.7, steps=8),
        "sd15-eta": case(sampler="ddim", eta=0.6),
        "sd15-two": case(sampler="euler-a", count=2, seed=11),
        "sd15-resized": case(
            TREE,
            image=[70, 101],
            mask=["soft", 50, 40],
            width=72,
            height=56,
            sampler="dpmpp-2m-sde",
            count=2,
        ),
        "sd15-taesd": case(sampler="euler-a", vae="taesd"),
        "sd15-outpaint": case(sampler="dpmpp-2m", outpaint=[5, 3, 19, 5], width=88, height=72),
        "sd15-outpaint-mask": case(
            sampler="euler",
            outpaint=[0, 16, 0, 0],
            mask=["disc", 64, 64],
            height=80,
            strength=0.9,
        ),
        "sd21v-checkpoint": case(TREE, model="sd21v", sampler="checkpoint"),
        "sd21v-dpmpp-2m": case(
            model="sd21v", sampler="dpmpp-2m", schedule="karras", strength=0.6, height=80
        ),
        "sd-turbo": case(model="sd-turbo", sampler="checkpoint", steps=4, guidance=0.0),
        "lcm-checkpoint": case(model="lcm", sampler="checkpoint", steps=4, guidance=8.5),
        "lcm-strength": case(
            model="lcm", sampler="checkpoint", steps=4, guidance=3.0, strength=0.5
        ),
        "sdxl-checkpoint": case(model="sdxl", sampler="checkpoint", **FIVE),
        "sdxl-wide": case(
            TREE,
            model="sdxl",
            sampler="euler-a",
            strength=0.7,
            width=96,
            mask=["soft", 64, 96],
            negative_prompt="blurry",
            **FIVE,
        ),
        "sdxl-rescale": case(model="sdxl", sampler="dpmpp-2m", guidance_rescale=0.7, **FIVE),
        "sdxl-end": case(model="sdxl", sampler="dpmpp-2m", denoising_end=0.6, **FIVE),
        "sdxl-from": case(model="sdxl", sampler="euler", denoising_start=0.4, **FIVE),
        "sdxl-between": case(
            model="sdxl", sampler="heun", denoising_start=0.2, denoising_end=0.8, **FIVE
        ),
        "sdxl-refined-two": case(model="sdxl", sampler="euler-a", count=2, seed=3, **SPLIT),
        "refiner-alone": case(model="sdxl-refiner", sampler="dpmpp-2m", strength=0.6, **FIVE),
    },
    "sd15-inpainting": {
        "checkpoint": case(sampler="checkpoint", negative_prompt="blurry"),
        "karras": case(TREE, sampler="dpmpp-2m", schedule="karras", mask=["half", 64, 64]),
        "ancestral-two": case(sampler="euler-a", count=2, seed=4),
        "strength": case(sampler="euler-a", strength=0.6),
        "no-guidance": case(sampler="unipc", guidance=1.0),
        "resized": case(
            TREE,
            image=[70, 101],
            mask=["soft", 50, 40],
            width=72,
            height=56,
            sampler="heun",
            strength=0.9,
        ),
        "taesd": case(sampler="dpmpp-2m-sde", vae="taesd"),
        "outpaint": case(sampler="dpmpp-2m", outpaint=[5, 3, 19, 5], width=88, height=72),
    },
    "sdxl-inpainting": {
        "checkpoint": case(sampler="checkpoint", **FIVE),
        "strength": case(TREE, sampler="euler-a", strength=0.6, width=96, **FIVE),
        "end": case(sampler="dpmpp-2m", denoising_end=0.6, **FIVE),
        "from": case(sampler="euler-a", denoising_start=0.4, **FIVE),
        "refined": case(sampler="euler-a", **SPLIT),
    },
}
ODD = {"image": [90, 121], "mask": ["soft", 90, 121]}
PICTURES["only-masked"] = {
    "sd15-disc": case(
        model="sd15", sampler="euler", only_masked=4, image=[96, 128], mask=["disc", 96, 128]
    ),
    "sd15-odd": case(
        TREE, model="sd15", sampler="dpmpp-2m", only_masked=0, width=72, height=48, **ODD
    ),
    "sd15-edge": case(
        model="sd15", sampler="euler-a", only_masked=50, strength=0.7, width=96, height=32, **ODD
    ),
    "inpainting": case(model="sd15-inpainting", sampler="euler", only_masked=8, **ODD),
    "sdxl": case(model="sdxl", sampler="dpmpp-2m", only_masked=8, width=48, **ODD, **FIVE),
}
PICTURES["edm-inpainting"] = {
    "cosxl-checkpoint": case(model="cosxl", sampler="checkpoint", **FIVE),
    "cosxl-strength": case(TREE, model="cosxl", sampler="dpmpp-2m", strength=0.7, **FIVE),
}
EDITS: dict[str, dict[str, dict[str, Any]]] = {
    "pix2pix": {
        "checkpoint": edit(sampler="checkpoint", negative_prompt="blurry"),
        "scales": edit(TREE, image=[64, 96], sampler="dpmpp-2m", guidance=9.0, image_guidance=1.1),
        "two": edit(sampler="euler-a", count=2, seed=4),
        "heun-odd": edit(image=[70, 61], sampler="heun", schedule="karras", image_guidance=2.5),
        "no-guidance": edit(sampler="unipc", guidance=1.0),
        "image-guidance-below-1": edit(sampler="ddim", image_guidance=0.9),
        "taesd": edit(sampler="dpmpp-2m-sde", vae="taesd"),
    },
    "sdxl-pix2pix": {
        "checkpoint": edit(sampler="checkpoint", **FIVE),
        "negative-two": edit(
            TREE, image=[64, 96], sampler="euler-a", negative_prompt="blurry", count=2, **FIVE
        ),
        "rescale": edit(sampler="dpmpp-2m", guidance_rescale=0.7, image_guidance=1.2, **FIVE),
        "end": edit(sampler="dpmpp-2m", denoising_end=0.6, **FIVE),
        "refined": edit(sampler="euler-a", **SPLIT),
    },
}
EDITS["cosxl-edit"] = {
    "checkpoint": edit(sampler="checkpoint", negative_prompt="blurry", **FIVE),
    "dpmpp-2m": edit(TREE, image=[64, 96], sampler="dpmpp-2m", image_guidance=1.2, **FIVE),
}
PICTURES |= EDITS
PICTURES["x4-upscaler"] = {
    "checkpoint": upscale(sampler="checkpoint", negative_prompt="blurry"),
    "ddim-clean": upscale(TREE, image=[16, 24], sampler="ddim", noise_level=0, guidance=4.0),
    "karras-two": upscale(
        sampler="dpmpp-2m", schedule="karras", noise_level=100, count=2, seed=4, guidance=5.0
    ),
    "ancestral-rounded": upscale(
        TREE, image=[22, 19], sampler="euler-a", negative_prompt="blurry", guidance=3.0
    ),
    "no-guidance": upscale(image=[20, 12], sampler="dpmpp-2m", noise_level=350, guidance=1.0),
    "sized": upscale(TREE, image=[40, 30], width=64, height=80, sampler="dpmpp-2m", guidance=3.0),
}
PICTURES["hires"] = {
    "sd15-checkpoint": hires(sampler="checkpoint", negative_prompt="blurry"),
    "sd15-nearest": hires(
        TREE,
        width=72,
        height=56,
        hires=1.5,
        hires_upscaler="latent-nearest",
        hires_strength=0.7,
        sampler="dpmpp-2m",
        schedule="karras",
    ),
    "sd15-bilinear-two": hires(
        sampler="euler-a", hires=1.25, hires_upscaler="latent-bilinear", count=2, seed=6
    ),
    "sd15-image": hires(image=[64, 48], width=48, strength=0.7, sampler="dpmpp-2m-sde", hires=1.5),
    "sd15-taesd": hires(sampler="heun", vae="taesd", hires=1.5),
    "sdxl-checkpoint": hires(model="segmind-vega", sampler="checkpoint", **FIVE),
    "sdxl-bilinear": hires(
        model="segmind-vega",
        sampler="dpmpp-2m",
        hires=1.6,
        hires_upscaler="latent-bilinear",
        hires_strength=0.6,
        original_size=[100, 100],
        crop=[8, 4],
        **FIVE,
    ),
    "lcm": hires(model="lcm", sampler="checkpoint", steps=4, guidance=8.5, hires=1.5),
}
for arguments in PICTURES["hires"].values():
    arguments.setdefault("model", "bk-sdm-tiny")
for arguments in PICTURES["inpainting"].values():
    arguments.setdefault("model", "sd15")
KINDS = {
    "sd15-inpainting": StableDiffusionInpaintPipeline,
    "sdxl-inpainting": StableDiffusionXLInpaintPipeline,
    "pix2pix": StableDiffusionInstructPix2PixPipeline,
    "sdxl-pix2pix": StableDiffusionXLInstructPix2PixPipeline,
    "cosxl-edit": StableDiffusionXLInstructPix2PixPipeline,
    "x4-upscaler": StableDiffusionUpscalePipeline,
}


def load(name: str, arguments: dict[str, Any], kind: Any = None) -> Any:
    """diffusers' pipeline for a case: of this class, or the model's own, or one that inpaints."""
    pipe, kind = opened(name), kind or KINDS.get(name)
    if kind is None:
        xl = hasattr(pipe, "text_encoder_2")
        kind = StableDiffusionXLInpaintPipeline if xl else StableDiffusionInpaintPipeline
    more = {"is_cosxl_edit": True} if name == "cosxl-edit" else {}
    return prepare(kind.from_pipe(pipe, **more), arguments)


def outpainted(arguments: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    """Picture and mask on a wider canvas: whole latents, the edge repeated."""
    left, top, right, bottom = arguments["outpaint"]
    image = photo(*arguments["image"])
    height, width = image.shape[:2]
    known = np.zeros((height + top + bottom, width + left + right), bool)
    known[top : top + height, left : left + width] = True
    for rows in range(0, known.shape[0], 8):
        for columns in range(0, known.shape[1], 8):
            cell = known[rows : rows + 8, columns : columns + 8]
            cell[:] = cell.all()
    repaint = np.where(known, 0, 255).astype(np.uint8)
    if "mask" in arguments:
        given = mask(*arguments["mask"])[..., 0]
        part = repaint[top : top + height, left : left + width]
        part[:] = np.maximum(part, given)
    image = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="edge")
    crop = slice(arguments["height"]), slice(arguments["width"])
    assert image.shape[:2] == repaint[crop].shape, "no resizing here"
    return Image.fromarray(image), Image.fromarray(repaint)


def run(family: str, arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture, as diffusers' pipeline makes it."""
    pipe, prompt = load(arguments.get("model", family), arguments), arguments["prompt"]
    given = words(arguments) | {"generator": generator(seed)}
    (image,) = pictures(photo, [arguments["image"]])
    repaints = family not in (*EDITS, "x4-upscaler")
    if family == "x4-upscaler" and "width" in arguments:
        size = arguments["width"] // 4, arguments["height"] // 4
        image = image.resize(size, Image.Resampling.BICUBIC)
    if "outpaint" in arguments:
        image, given["mask_image"] = outpainted(arguments)
    elif repaints:
        (given["mask_image"],) = pictures(mask, [arguments["mask"]])
    given["image"] = image
    if "only_masked" in arguments:
        given["padding_mask_crop"] = arguments["only_masked"]
    if repaints:
        given |= {side: arguments[side] for side in ("width", "height")}
        # The SDXL class needs less than 1 with denoising_start, and ignores it.
        given.setdefault("strength", 0.9999 if "denoising_start" in arguments else 1.0)
    elif family in ("sdxl-pix2pix", "cosxl-edit"):
        given |= {"width": image.width, "height": image.height}
    if "refiner" not in arguments:
        return draw(pipe, prompt, **given)
    half = draw(pipe, prompt, output_type="latent", **given)
    # A plain model's kept part is put back by the refiner too; an inpainting model's is not.
    plain = pipe.unet.config.in_channels == 4
    kind = StableDiffusionXLInpaintPipeline if plain else StableDiffusionXLImg2ImgPipeline
    refiner = load(arguments["refiner"], arguments, kind)
    refiner.vae = pipe.vae
    start = given.pop("denoising_end")
    given |= {"image": half, "denoising_start": start, "strength": 0.9999}
    if not plain:
        for word in ("mask_image", "width", "height", "image_guidance_scale"):
            given.pop(word, None)
    return draw(refiner, prompt, **given)


UPSCALERS = {"latent-nearest": "nearest", "latent-bilinear": "bilinear"}


def run_hires(arguments: dict[str, Any], seed: int) -> Drawn:
    """The same for two passes: text or image to image, then image to image on the larger result."""
    name = arguments["model"]
    plain = type(opened(name))
    second = load(name, arguments, TO_IMAGE[plain])
    first = second if "image" in arguments else load(name, arguments, plain)
    given = words(arguments, "strength") | {"generator": generator(seed)}
    if "crop" in arguments:
        given["original_size"] = tuple(arguments["original_size"])
        given["crops_coords_top_left"] = tuple(arguments["crop"])
    prompt, size = arguments["prompt"], (arguments["width"], arguments["height"])
    width, height = (int(side * arguments["hires"] / 8 + 0.5) * 8 for side in size)
    upscaler = UPSCALERS.get(arguments.get("hires_upscaler", ""))
    start: dict[str, Any] = dict(zip(("width", "height"), size, strict=True))
    if "image" in arguments:
        (picture,) = pictures(photo, [arguments["image"]])
        assert picture.size == size
        start = {"image": picture, "strength": arguments["strength"]}
    if upscaler:
        half = draw(first, prompt, output_type="latent", **start, **given)
        shape = height // 8, width // 8
        larger: Any = torch.nn.functional.interpolate(half, shape, mode=upscaler)
    else:  # not rounded to 8 bits
        half = first(prompt, output_type="np", **start, **given).images
        planes = [Image.fromarray(half[0, :, :, i]) for i in range(3)]
        planes = [p.resize((width, height), Image.Resampling.LANCZOS) for p in planes]
        larger = np.clip(np.stack([np.asarray(p) for p in planes], axis=-1), 0, 1)[None]
    strength = arguments.get("hires_strength", 0.5)
    return draw(second, prompt, image=larger, strength=strength, **given)


@torch.no_grad()
def main(names: list[str]) -> None:
    """Write each model's checkpoint, pictures.npz and cases.json."""
    for name in names or list(PICTURES):
        folder, more = HERE / name, {}
        if name in BASES:
            more = {"base": BASES[name]}
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            make_model(name, folder / "checkpoint")
        one = run_hires if name == "hires" else partial(run, name)
        write_pictures(folder, PICTURES[name], one, **more)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(sys.argv[1:])
