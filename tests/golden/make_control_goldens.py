"""Write pictures that ControlNets have a part in: control/cases.json and control/pictures.npz.

    python tests/golden/make_control_goldens.py [CASE ...]

The models are the tiny ones of this folder; the ControlNets are made by tests/control_files.py, in
the tests as here, and are not stored. The control images are golden_data.photo, of another size
than the picture, and the same turned upside down for a second net.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from additions import run
from drawing import HERE, TREE, case, write_pictures

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


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        write_pictures(HERE / "control", PICTURES, run, sys.argv[1:])
