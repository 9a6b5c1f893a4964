"""Write published/cases.json: tiny models as diffusers' slow tests draw and judge real ones.

    python tests/golden/make_published_goldens.py

Latents from NumPy, few steps, schedulers changed on the way, a 3x3 corner of the last channel (or
of latents) as the expectation: the cases of mlxdiff.report.published with models that the tests
have. Pictures are golden_data.photo and golden_data.mask; a size after them is what the picture is
resized to, by Pillow's default filter.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import torch
from additions import pipeline
from drawing import CIRCLE, HERE, TREE, generator, words
from golden_data import mask, photo
from PIL import Image

USUAL = {"seed": 0, "steps": 3, "guidance": 7.5, "width": 64, "height": 64, "sampler": "checkpoint"}
PHOTO = {"image": ["photo", 64, 64]}


def case(model: str = "sd15", prompt: str = CIRCLE, **more: Any) -> dict[str, Any]:
    """A case; arguments go over the usual ones, None leaves one out."""
    given = USUAL | {"prompt": prompt} | more.pop("arguments", {})
    return {"model": model, "arguments": {k: v for k, v in given.items() if v is not None}} | more


NO_SIZE = {"width": None, "height": None}
CASES: dict[str, dict[str, Any]] = {
    "pndm": case(noise=0),
    "ddim": case(noise=0, arguments={"sampler": "ddim"}),
    "lms": case(noise=0, arguments={"sampler": "lms", "height": 96}),
    "dpm": case(
        noise=0, arguments={"sampler": "dpmpp-2m"}, scheduler={"final_sigmas_type": "sigma_min"}
    ),
    "euler-start": case(
        prompt=TREE, noise=7, arguments={"sampler": "euler"}, rows=[None, 3],
        columns=[None, 3],
    ),
    "latents-1": case(noise=0, after=1),
    "latents-2": case(noise=0, after=2, dtype="float16"),
    "whole": case(noise=3, expects="picture"),
    "img2img": case(files=PHOTO, arguments=NO_SIZE | {"strength": 0.75}),
    "img2img-resized": case(
        files={"image": ["photo", 101, 70, 72, 56]},
        arguments=NO_SIZE | {"strength": 0.75, "sampler": "lms", "steps": 5},
        rows=[25, 28], columns=[38, 41],
    ),
    "img2img-latents": case(files=PHOTO, arguments=NO_SIZE | {"strength": 0.75}, after=1),
    "inpaint": case(files=PHOTO | {"mask": ["disc", 64, 64]}, rows=[25, 28], columns=[25, 28]),
    "inpainting-model": case(
        "sd15-inpainting", TREE, files=PHOTO | {"mask": ["half", 64, 64]}, rows=[25, 28],
        columns=[25, 28],
    ),
    "edit": case("pix2pix", files=PHOTO, arguments=NO_SIZE | {"image_guidance": 1.0}),
    "upscale": case(
        "x4-upscaler", files={"image": ["photo", 16, 16]}, expects="picture",
        arguments=NO_SIZE | {"guidance": 9.0, "noise_level": 20},
    ),
    "velocity": case("sd21v", TREE, arguments={"steps": 5}),
    "velocity-unflawed": case(
        "sd21v", TREE, measure="cosine", arguments={"sampler": "ddim", "guidance_rescale": 0.7},
        scheduler={"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ),
    "lcm-1": case("lcm", noise=0, arguments={"sampler": "lcm", "steps": 1}),
    "lcm-3": case("lcm", noise=0, arguments={"sampler": "lcm"}),
    "turbo": case("sdxl-turbo", arguments={"steps": 1, "guidance": 0.0}, dtype="float16"),
    "xl": case("sdxl", TREE, noise=1, arguments={"guidance": 5.0}),
    "guess": case(
        prompt="", controlnets=["first"], files={"control_image": ["photo", 64, 64]},
        arguments={"guidance": 3.0, "guess_mode": True, "sampler": "euler"},
    ),
    "shuffle": case(controlnets=["pooled"], files={"control_image": ["photo", 64, 64]}),
    "shown": case(
        ip_adapters=["plus"], files={"ip_image": ["photo", 40, 90]}, noise=33, measure="cosine",
        rows=[None, 3], columns=[None, 3], arguments={"negative_prompt": "blurry", "ip_scale": 0.7},
    ),
}  # fmt: skip


def picture(kind: str, height: int, width: int, *size: int) -> Image.Image:
    """A picture to give; resized where a size (width, height) is given."""
    made = photo(height, width) if kind == "photo" else mask(kind, height, width)
    image = Image.fromarray(made)
    return image.resize(size) if size else image


def expected(one: dict[str, Any]) -> np.ndarray:
    """What the test would publish: nine values, or the whole picture."""
    arguments, files = one["arguments"], one.get("files", {})
    task = "mask" if "mask" in files else "image" if "image" in files else "text"
    added = {key: one[key] for key in ("controlnets", "ip_adapters") if key in one}
    pipe = pipeline({"model": one["model"]} | arguments | added, task)
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, **one.get("scheduler", {})
    )
    given = words(arguments) | {"generator": generator(arguments["seed"])}
    given |= {key: arguments[key] for key in ("width", "height") if key in arguments}
    names = {"mask": "mask_image", "ip_image": "ip_adapter_image"}
    if "controlnets" in one:
        names["control_image"] = "image"
    given |= {names.get(name, name): picture(*how) for name, how in files.items()}
    if "noise" in one:
        shape = (1, 4, arguments["height"] // 8, arguments["width"] // 8)
        latents = np.random.RandomState(one["noise"]).standard_normal(shape)
        given["latents"] = torch.from_numpy(latents).to(torch.float32)
    kept: dict[int, np.ndarray] = {}
    if "after" in one:

        def keep(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
            kept[step] = state["latents"].numpy()
            return state

        given["callback_on_step_end"] = keep
    image = pipe(arguments["prompt"], output_type="np", **given).images
    rows, columns = (slice(*one.get(axis, [-3, None])) for axis in ("rows", "columns"))
    if "after" in one:
        return kept[one["after"]][0, -3:, rows, -1]
    return image[0] if one.get("expects") == "picture" else image[0, rows, columns, -1]


def main() -> None:
    folder, arrays = HERE / "published", {}
    folder.mkdir(exist_ok=True)
    written: dict[str, dict[str, Any]] = {}
    for name, one in CASES.items():
        values = expected(one)
        written[name] = dict(one)
        if one.get("expects") == "picture":
            arrays[name] = values.astype(np.float32)
        else:
            written[name]["expected"] = [round(float(v), 6) for v in values.ravel()]
        print(name, values.ravel()[:9].round(4), flush=True)
    text = json.dumps({"cases": written}, indent=1)
    (folder / "cases.json").write_text(text + "\n", encoding="utf-8")
    np.savez_compressed(folder / "pictures.npz", **arrays)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        main()
