"""Write pictures that a ControlNet-LLLite has a part in: lllite/cases.json and pictures.npz.

    python tests/golden/make_lllite_goldens.py [CASE ...]

diffusers has no LLLite. Its pipelines draw, and a hook changes the input of each layer by the
formula of kohya's sd-scripts (networks/control_net_lllite.py): x + up(mid([c, down(x)])), written
here with torch. The modules are made by tests/lllite_files.py.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from additions import pipeline
from drawing import HERE, Drawn, case, draw, generator, pictures, words, write_pictures
from golden_data import photo
from lllite_files import lllite_tensors, places
from PIL import Image

SIZE = {"width": 64, "height": 96}
SHOWN = {"control_image": [[40, 90]]}
PICTURES: dict[str, dict[str, Any]] = {
    "sdxl": case(**SIZE, **SHOWN, sampler="checkpoint", negative_prompt="blurry", steps=4),
    "sdxl-part": case(
        **SIZE, **SHOWN, sampler="euler", control_scale=0.7, control_start=0.2, control_end=0.6
    ),
    "sdxl-unguided-two": case(
        **SIZE,
        controlnets=["lllite", "lllite"],
        control_image=[[40, 90], [64, 64]],
        sampler="dpmpp-2m",
        guidance=1.0,
        control_scale=[0.5, -0.6],
    ),
    "sdxl-image-lora": case(
        image=[64, 64], **SHOWN, sampler="dpmpp-2m", strength=0.7, loras=[["sdxl-kohya", 0.8]]
    ),
}
PICTURES = {k: {"model": "sdxl", "controlnets": ["lllite"]} | v for k, v in PICTURES.items()}


def run(arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture."""
    task = "image" if "image" in arguments else "text"
    pipe = pipeline({k: v for k, v in arguments.items() if k != "controlnets"}, task)
    size = arguments.get("width", 64), arguments.get("height", 64)
    shown = pictures(photo, arguments["control_image"])
    shown = [p if i == 0 else p.transpose(Image.Transpose.ROTATE_180) for i, p in enumerate(shown)]
    scales = arguments.get("control_scale", 1.0)
    scales = scales if isinstance(scales, list) else [scales] * len(shown)
    weights = {n: torch.from_numpy(a) for n, a in lllite_tensors(arguments["model"]).items()}
    steps, now = len(range(arguments["steps"])), {"step": 0}
    first, end = arguments.get("control_start", 0.0), arguments.get("control_end", 1.0)

    def hook(name: str, embedded: list[torch.Tensor]) -> Any:
        def change(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x, step = inputs[0], now["step"]
            if step / steps < first or (step + 1) / steps > end:
                return inputs
            for one, scale in zip(embedded, scales, strict=True):
                rows = one.expand(len(x), -1, -1)
                down = F.relu(linear(name, "down.0", x))
                inner = F.relu(linear(name, "mid.0", torch.cat([rows, down], 2)))
                x = x + scale * linear(name, "up.0", inner)
            return (x,)

        return change

    def linear(name: str, part: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"])

    for layer, (name, depth) in places(arguments["model"]).items():
        embedded = []
        for image in shown:
            pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32) / 255
            x = torch.from_numpy(pixels).permute(2, 0, 1)[None] * 2 - 1
            for i in range(0, 5 if depth == 3 else 3, 2):
                key = f"{name}.conditioning1.{i}"
                kernel, bias = weights[f"{key}.weight"], weights[f"{key}.bias"]
                x = F.conv2d(F.relu(x) if i else x, kernel, bias, stride=kernel.shape[-1])
            embedded.append(x.flatten(2).transpose(1, 2))
        module = pipe.unet.get_submodule(layer)
        module.register_forward_pre_hook(hook(name, embedded))

    given = words(arguments, "control_scale", "control_start", "control_end")
    given |= {"generator": generator(seed)}
    if task == "image":
        (given["image"],) = pictures(photo, [arguments["image"]])
    else:
        given |= {side: arguments[side] for side in ("width", "height")}

    def after(pipe: Any, step: int) -> None:
        now["step"] = step + 1

    return draw(pipe, arguments["prompt"], after=after, **given)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        write_pictures(HERE / "lllite", PICTURES, run, sys.argv[1:])
