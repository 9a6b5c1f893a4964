"""Write the tiny models and pictures of depth: a model that sees a depth map, and Marigold's.

    python tests/golden/make_depth_goldens.py [sd2-depth marigold-depth marigold-normals]

As make_image_goldens.py does. A Marigold model makes a map of a picture: beside the pictures that
diffusers paints of it, the map itself is kept, float32 (1, H, W, C).
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    MarigoldDepthPipeline,
    MarigoldNormalsPipeline,
    StableDiffusionDepth2ImgPipeline,
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
from golden_data import checkpoint, photo
from make_checkpoints import BETAS, make_unet, write_json
from make_image_goldens import SD1

BASE = "sd21v"
KINDS: dict[str, Any] = {
    "sd2-depth": StableDiffusionDepth2ImgPipeline,
    "marigold-depth": MarigoldDepthPipeline,
    "marigold-normals": MarigoldNormalsPipeline,
}
# As published: stabilityai/stable-diffusion-2-depth; prs-eth/marigold-depth-v1-1 and -lcm-v1-0.
PNDM = BETAS | {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
DDIM = BETAS | {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
LCM = BETAS | {
    "_class_name": "LCMScheduler",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SCHEDULERS = {"sd2-depth": PNDM, "marigold-depth": DDIM, "marigold-normals": LCM}
SETTINGS: dict[str, dict[str, Any]] = {
    "sd2-depth": {"depth_estimator": ["transformers", "DPTForDepthEstimation"]},
    "marigold-depth": {
        "default_denoising_steps": 4,
        "default_processing_resolution": 64,
        "prediction_type": "depth",
        "scale_invariant": True,
        "shift_invariant": True,
    },
    "marigold-normals": {
        "default_denoising_steps": 3,
        "default_processing_resolution": 64,
        "prediction_type": "normals",
        "use_full_z_range": False,
    },
}


def make_model(name: str, folder: Path) -> None:
    """The files in which a model differs from its base: U-Net, scheduler, pipeline class."""
    depth = name == "sd2-depth"
    number = 300 + list(KINDS).index(name)
    unet = make_unet(number, 64, in_channels=5 if depth else 8, use_linear_projection=True, **SD1)
    unet.to(torch.float16).save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir(parents=True)
    scheduler = SCHEDULERS[name]
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    base = json.loads((checkpoint(BASE) / "model_index.json").read_text())
    parts = ("text_encoder", "tokenizer", "unet", "vae", "_diffusers_version")
    index = {key: base[key] for key in parts} | SETTINGS[name]
    index |= {"_class_name": KINDS[name].__name__}
    index |= {"scheduler": ["diffusers", scheduler["_class_name"]]}
    write_json(folder / "model_index.json", index)


# ------------------------------------------------------------------------------------- the pictures


def deep(prompt: str = CIRCLE, **arguments: Any) -> dict[str, Any]:
    """A case of the model that sees a depth map: image and depth_image are sizes of photo."""
    return plain_case(prompt, **{"image": [64, 64], "depth_image": [48, 80]} | arguments)


def mapped(**arguments: Any) -> dict[str, Any]:
    """A case of a Marigold model."""
    return {"image": [70, 101], "seed": 0} | arguments


PICTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sd2-depth": {
        "checkpoint": deep(sampler="checkpoint", negative_prompt="blurry"),
        "karras-two": deep(
            TREE, image=[64, 96], sampler="dpmpp-2m", schedule="karras", strength=0.6, count=2
        ),
        "full": deep(sampler="ddim", strength=1.0, guidance=1.0, depth_image=[8, 8]),
    },
    "marigold-depth": {
        "plain": mapped(),
        "own-size": mapped(image=[43, 61], processing_resolution=0, steps=2, seed=5),
        "larger": mapped(image=[30, 52], processing_resolution=72, steps=2),
    },
    "marigold-normals": {
        "plain": mapped(),
        "ensemble": mapped(ensemble=3, steps=2, sampler="ddim"),
    },
}


def run_depth(arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture of the model that sees a depth map."""
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(
        checkpoint("sd2-depth"), dtype=torch.float32, depth_estimator=None, feature_extractor=None
    )
    pipe = prepare(pipe, arguments)
    (image,) = pictures(photo, [arguments["image"]])
    depth = torch.from_numpy(photo(*arguments["depth_image"])[..., 0].astype(np.float32))[None]
    given = words(arguments) | {"generator": generator(seed), "image": image, "depth_map": depth}
    return draw(pipe, arguments["prompt"], **given)


def run_map(name: str, arguments: dict[str, Any], painted: bool) -> dict[str, np.ndarray]:
    """What a Marigold pipeline makes of a picture, and how diffusers paints it."""
    pipe = prepare(opened(name), arguments)
    (image,) = pictures(photo, [arguments["image"]])
    count = arguments.get("ensemble", 1)
    drawn = [generator(arguments["seed"] + i) for i in range(count)]
    out = pipe(
        image,
        num_inference_steps=arguments.get("steps"),
        processing_resolution=arguments.get("processing_resolution"),
        ensemble_size=count,
        generator=drawn if count > 1 else drawn[0],
        output_latent=True,
    )
    found = {"map": out.prediction, "latents": out.latent.permute(0, 2, 3, 1).numpy()}
    processor = pipe.image_processor
    if not painted:
        return found
    if name == "marigold-depth":
        # export_depth_to_16bit_png, which asks Pillow 13 for a mode that it no longer takes.
        found["grey"] = (out.prediction[0, ..., 0] * (2**16 - 1)).astype(np.uint16)
        near = processor.visualize_depth(out.prediction, color_map="binary")
        colors = processor.visualize_depth(out.prediction)
        found |= {"near": np.asarray(near[0]), "colors": np.asarray(colors[0])}
    else:
        found["colors"] = np.asarray(processor.visualize_normals(out.prediction)[0])
    return found


@torch.no_grad()
def main(names: list[str]) -> None:
    """Write each model's checkpoint, cases.json, and pictures.npz or maps.npz."""
    for name in names or list(PICTURES):
        folder = HERE / name
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        make_model(name, folder / "checkpoint")
        if name == "sd2-depth":
            document = {"prompts": [CIRCLE, TREE], "pictures": {}, "base": BASE}
            write_json(folder / "cases.json", document)  # `checkpoint` needs the base
            write_pictures(folder, PICTURES[name], run_depth, base=BASE)
            continue
        write_json(folder / "cases.json", {"pictures": PICTURES[name], "base": BASE})
        arrays = {
            f"{label}/{key}": value
            for label, arguments in PICTURES[name].items()
            for key, value in run_map(name, arguments, label == "plain").items()
        }
        for label in PICTURES[name]:
            values = arrays[f"{label}/map"]
            print(f"{name} {label}: {values.shape}, {values.min():.2f} to {values.max():.2f}")
        np.savez_compressed(folder / "maps.npz", **arrays)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(sys.argv[1:])
