"""Write what diffusers' ControlNetUnionModel predicts, and pictures that it has a part in.

    python tests/golden/make_union_goldens.py

control/union.npz: outputs of the network. union/cases.json, union/pictures.npz: pictures of
diffusers' pipelines; two modes are the net twice. Its guess mode fails under guidance (0.42).
The net is the tiny one of tests/control_files.py for the tiny SDXL; its inputs are union_inputs
there. Both rows of the batch are alike, as they are in a run.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetUnionModel,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from drawing import (
    Drawn,
    case,
    draw,
    generator,
    opened,
    pictures,
    prepare,
    words,
    write_pictures,
)
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from control_files import UNION_MODES, union_config, union_inputs, write_union  # noqa: E402
from golden_data import photo  # noqa: E402

from mlxdiff.pictures.control_modes import MODES  # noqa: E402

WIDE = {"width": 72, "height": 56}
SHOWN = {"control_image": [[40, 90]]}
PICTURES: dict[str, dict[str, Any]] = {
    "depth": case(**WIDE, **SHOWN, sampler="euler", control_mode="depth", steps=4),
    "image": case(
        **SHOWN,
        image=[64, 64],
        strength=0.6,
        sampler="dpmpp-2m",
        control_mode="canny",
        control_scale=0.7,
    ),
    "two": case(
        **WIDE,
        controlnets=["union", "union"],
        control_image=[[64, 64], [100, 70]],
        control_mode=["normal", "openpose"],
        control_scale=[0.5, 0.6],
        control_end=0.8,
        sampler="dpmpp-2m",
    ),
}
PICTURES = {k: {"model": "sdxl", "controlnets": ["union"]} | v for k, v in PICTURES.items()}


def main(folder: Path) -> None:
    net = ControlNetUnionModel.from_pretrained(write_union(folder), torch_dtype=torch.float32)
    inputs = {name: torch.from_numpy(array) for name, array in union_inputs().items()}
    results = {}
    count = union_config()["num_control_type"]
    for mode in UNION_MODES:
        chosen = torch.zeros(1, count)
        chosen[0, mode] = 1
        with torch.no_grad():
            down, middle = net(
                inputs["sample"].permute(0, 3, 1, 2).repeat(2, 1, 1, 1),
                inputs["timesteps"].repeat(2),
                inputs["text"].repeat(2, 1, 1),
                [inputs["image"].permute(0, 3, 1, 2).repeat(2, 1, 1, 1)],
                chosen.repeat(2, 1),
                [mode],
                conditioning_scale=0.7,
                added_cond_kwargs={
                    "text_embeds": inputs["text_embeds"].repeat(2, 1),
                    "time_ids": inputs["time_ids"].repeat(2, 1),
                },
                return_dict=False,
            )
        for i, array in enumerate((*down, middle)):
            results[f"{mode}-{i}"] = array[:1].permute(0, 2, 3, 1).numpy()
    np.savez_compressed(HERE / "control" / "union.npz", **results)


def run(arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture."""
    with tempfile.TemporaryDirectory() as folder:
        net = ControlNetUnionModel.from_pretrained(write_union(Path(folder)), dtype=torch.float32)
    pipe, count = opened("sdxl"), len(arguments["controlnets"])
    shown = pictures(photo, arguments["control_image"])
    shown = [p if i == 0 else p.transpose(Image.Transpose.ROTATE_180) for i, p in enumerate(shown)]
    names = arguments["control_mode"]
    modes = [MODES.index(one) for one in ([names] if isinstance(names, str) else names)]
    many = count > 1
    task = "image" in arguments
    kind = (
        StableDiffusionXLControlNetUnionImg2ImgPipeline
        if task
        else StableDiffusionXLControlNetUnionPipeline
    )
    nets = MultiControlNetUnionModel([net] * count) if many else net
    pipe = prepare(kind(controlnet=nets, **pipe.components, add_watermarker=False), arguments)
    given = words(arguments) | {"generator": generator(seed)}
    given.setdefault("controlnet_conditioning_scale", [1.0] * count if many else 1.0)
    if many:
        for name in ("control_guidance_start", "control_guidance_end"):
            given[name] = [given.get(name, float(name.endswith("end")))] * count
    given |= {"control_image": shown, "control_mode": modes}
    if task:
        (given["image"],) = pictures(photo, [arguments["image"]])
        given |= dict(zip(("height", "width"), arguments["image"], strict=True))
    else:
        given |= {side: arguments[side] for side in ("width", "height")}
    return draw(pipe, arguments["prompt"], **given)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with torch.no_grad(), tempfile.TemporaryDirectory() as place:
        main(Path(place))
        write_pictures(HERE / "union", PICTURES, run, sys.argv[1:])
