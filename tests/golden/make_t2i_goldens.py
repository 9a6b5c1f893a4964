"""Write pictures that T2I-Adapters have a part in: t2i-adapter/cases.json and pictures.npz.

    python tests/golden/make_t2i_goldens.py [CASE ...]

The adapters are made by tests/t2i_files.py. Adapter pipelines of diffusers draw from text. It has
none for other tasks; there its other pipelines draw, and each call of their U-Net gets the maps
(down_intrablock_additional_residuals).
"""

from __future__ import annotations

import inspect
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from additions import pipeline as other_pipeline
from diffusers import (
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
)
from drawing import (
    HERE,
    TREE,
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
from golden_data import mask, photo
from PIL import Image
from t2i_files import write_t2i_adapter

SQUARE = {"width": 64, "height": 64}
WIDE = {"width": 72, "height": 56}
TALL = {"width": 64, "height": 80}
SHOWN = {"control_image": [[40, 90]]}
TWO = {"control_image": [[64, 64], [100, 70]]}
PHOTO = {"image": [64, 64]}
XL: dict[str, Any] = {"model": "sdxl", "t2i_adapters": ["xl"]}
PICTURES: dict[str, dict[str, Any]] = {
    "sd15": case(**SQUARE, **SHOWN, sampler="checkpoint"),
    "sd15-light": case(
        TREE, **WIDE, **SHOWN, t2i_adapters=["light"], sampler="dpmpp-2m", count=2, seed=5
    ),
    "sd15-odd": case(**WIDE, **SHOWN, sampler="euler", control_scale=0.6, guidance=1.0),
    "sd15-grey": case(**SQUARE, **SHOWN, t2i_adapters=["grey"], sampler="dpmpp-2m"),
    "sd15-two": case(
        **SQUARE,
        **TWO,
        t2i_adapters=["full", "second"],
        sampler="dpmpp-2m",
        control_scale=[0.8, -0.4],
    ),
    "lcm": case(**SQUARE, **SHOWN, model="lcm", sampler="checkpoint", steps=4, guidance=8.5),
    "sdxl": case(**TALL, **SHOWN, **XL, sampler="checkpoint", negative_prompt="blurry"),
    "sdxl-part": case(
        TREE, **TALL, **SHOWN, **XL, sampler="euler", control_scale=0.7, control_end=0.5
    ),
    "sdxl-two": case(
        **SQUARE,
        **TWO,
        **XL | {"t2i_adapters": ["xl", "xl-second"]},
        sampler="dpmpp-2m",
        control_scale=[0.5, 0.3],
        control_end=0.8,
    ),
    "sd15-image": case(**PHOTO, **SHOWN, sampler="dpmpp-2m", strength=0.7),
    "sd15-inpaint-control-lora": case(
        **PHOTO,
        **SQUARE,
        mask=["disc", 64, 64],
        controlnets=["first"],
        control_image=[[64, 64], [100, 70]],
        loras=[["sd15-peft", 0.8]],
        sampler="dpmpp-2m",
        control_scale=[0.7, 0.5],
    ),
    "sdxl-image": case(**PHOTO, **SHOWN, **XL, sampler="dpmpp-2m", strength=0.6),
}
PICTURES = {k: {"model": "sd15", "t2i_adapters": ["full"]} | v for k, v in PICTURES.items()}
FILES = tempfile.TemporaryDirectory(prefix="mlxdiff-golden-")


def adapters(arguments: dict[str, Any]) -> list[T2IAdapter]:
    """The adapters of a case, in diffusers."""
    model, made = arguments["model"], []
    for name in arguments["t2i_adapters"]:
        folder = Path(FILES.name) / model / name
        if not folder.exists():
            write_t2i_adapter(folder, name, model)
        made.append(T2IAdapter.from_pretrained(folder, dtype=torch.float32).eval())
    return made


def shown(arguments: dict[str, Any]) -> list[Image.Image]:
    """The control pictures, all but the first upside down."""
    found = pictures(photo, arguments["control_image"])
    turned = [one.transpose(Image.Transpose.ROTATE_180) for one in found[1:]]
    return [found[0], *turned]


def seen(image: Image.Image, adapter: T2IAdapter, size: tuple[int, int]) -> Image.Image:
    """A picture of this size with the channels that an adapter takes."""
    image = image.resize(size, Image.Resampling.LANCZOS)
    return image.convert("L") if adapter.config.in_channels == 1 else image


def from_text(arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture by an adapter pipeline."""
    pipe, nets = opened(arguments["model"]), adapters(arguments)
    xl = hasattr(pipe, "text_encoder_2")
    kind = StableDiffusionXLAdapterPipeline if xl else StableDiffusionAdapterPipeline
    known = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in known}
    parts |= {} if xl else {"requires_safety_checker": False}
    pipe = prepare(kind(adapter=MultiAdapter(nets) if len(nets) > 1 else nets[0], **parts),
                   arguments)  # fmt: skip
    size = arguments["width"], arguments["height"]
    images = [seen(one, net, size) for one, net in zip(shown(arguments), nets, strict=True)]
    given = words(arguments, "control_scale", "control_end") | {
        "generator": generator(seed),
        "image": images if len(images) > 1 else images[0],
        "adapter_conditioning_scale": arguments.get("control_scale", [1.0] * len(nets))
        if len(nets) > 1
        else arguments.get("control_scale", 1.0),
    }
    if "control_end" in arguments:
        given["adapter_conditioning_factor"] = arguments["control_end"]
    given |= {side: arguments[side] for side in ("width", "height")}
    return draw(pipe, arguments["prompt"], **given)


def from_image(arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture by a pipeline without adapters, whose U-Net gets the feature maps."""
    task = "mask" if "mask" in arguments else "image"
    pipe, nets = other_pipeline(arguments, task), adapters(arguments)
    size = arguments.get("width", 64), arguments.get("height", 64)
    first = len(arguments.get("controlnets", []))
    images, scales = shown(arguments), arguments.get("control_scale", 1.0)
    scales = scales if isinstance(scales, list) else [scales] * len(images)
    sums: list[torch.Tensor] = []
    for net, image, scale in zip(nets, images[first:], scales[first:], strict=True):
        pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32) / 255
        maps = [scale * one for one in net(torch.from_numpy(pixels).permute(2, 0, 1)[None])]
        sums = [a + b for a, b in zip(sums, maps, strict=True)] if sums else maps
    forward = pipe.unet.forward

    def with_maps(sample: torch.Tensor, *more: Any, **named: Any) -> Any:
        maps = [one.repeat(len(sample), 1, 1, 1) for one in sums]
        return forward(sample, *more, down_intrablock_additional_residuals=maps, **named)

    pipe.unet.forward = with_maps
    given = words(arguments, "control_scale") | {"generator": generator(seed)}
    (given["image"],) = pictures(photo, [arguments["image"]])
    if task == "mask":
        (given["mask_image"],) = pictures(mask, [arguments["mask"]])
        given |= {"strength": 1.0} | {side: arguments[side] for side in ("width", "height")}
    if first:
        given |= {"control_image": images[0], "controlnet_conditioning_scale": scales[0]}
    return draw(pipe, arguments["prompt"], **given)


def run(arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture."""
    return (from_image if "image" in arguments else from_text)(arguments, seed)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        write_pictures(HERE / "t2i-adapter", PICTURES, run, sys.argv[1:])
