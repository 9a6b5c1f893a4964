"""Write pictures that several additions have a part in: combinations/cases.json and pictures.npz.

    python tests/golden/make_combination_goldens.py [CASE ...]

Models, LoRAs, words, ControlNets and IP-Adapters are those of the other scripts of this folder;
what is new is that they meet. A guidance interval is made by changing the scale in the callback:
to 1, and the least bit more, so that the pipeline goes on to make both predictions. Of the classes
for ControlNet only that for text to image with SD 1 and 2 follows such a change.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)
from make_adapter_goldens import encoder, processor
from make_control_goldens import CONTROL_WORDS, controlnet, scheduler
from make_control_goldens import KINDS as WITH_CONTROL
from make_family_goldens import CIRCLE, TO_IMAGE, TREE, WORDS, case, load, nhwc
from make_prompt_goldens import TOYS, load_words
from make_prompt_goldens import WORDS as TOY_FILES
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from adapter_files import ADAPTERS, adapter_tensors  # noqa: E402
from golden_data import checkpoint, mask, photo  # noqa: E402
from lora_files import write as write_lora  # noqa: E402

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
    "sdxl-lora-control-image": case(
        image=[40, 56], **XL_STYLE, **CONTROL, sampler="dpmpp-2m", strength=0.6
    ),
    "sdxl-lora-inpaint": case(**WIDE, **REPAINT, **XL_STYLE, count=2),
    "sdxl-interval-lora-adapter": case(**WIDE, **SEEN, **XL_STYLE, guidance_interval=[0.3, 1.0]),
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
}
PICTURES = {label: {"model": "sd15"} | given for label, given in PICTURES.items()}
WORDS = WORDS | CONTROL_WORDS | {"image_guidance": "image_guidance_scale"}
del WORDS["count"]
BARELY = 1 + 1e-12  # guidance that changes nothing, in a pipeline that still guides


def pipeline(arguments: dict[str, Any], folder: Path) -> Any:
    """The pipeline for a case, with all that is added to it."""
    model, xl = arguments["model"], arguments["model"] == "sdxl"
    pipe = load(model, {})
    own = pipe.scheduler.config
    repaints, controlled = "mask" in arguments, "controlnets" in arguments
    if controlled:
        nets = [controlnet(model, name) for name in arguments["controlnets"]]
        task = "mask" if repaints else "image" if "image" in arguments else "text"
        parts = {k: v for k, v in pipe.components.items() if v is not None}
        parts["add_watermarker" if xl else "requires_safety_checker"] = False
        parts |= {} if xl else {"safety_checker": None, "feature_extractor": None}
        kind = WITH_CONTROL[task][xl]
        pipe = kind(controlnet=nets if len(nets) > 1 else nets[0], **parts)
    elif repaints:
        kind = StableDiffusionXLInpaintPipeline if xl else StableDiffusionInpaintPipeline
        pipe = kind.from_pipe(pipe)
    elif "image" in arguments and type(pipe) in TO_IMAGE:
        pipe = TO_IMAGE[type(pipe)].from_pipe(pipe)
    pipe.scheduler = scheduler(own, arguments)
    pipe.set_progress_bar_config(disable=True)
    names, scales = [], []
    for i, (file, scale) in enumerate(arguments.get("loras", [])):
        pipe.load_lora_weights(str(write_lora(file, folder)), adapter_name=f"lora_{i}")
        names.append(f"lora_{i}")
        scales.append(scale)
    if names:
        pipe.set_adapters(names, scales)
    load_words(pipe, arguments.get("embeddings", []))
    if "ip_adapters" in arguments:
        add_adapters(pipe, arguments)
    return pipe


def add_adapters(pipe: Any, arguments: dict[str, Any]) -> None:
    """IP-Adapters and their image encoder."""
    states = []
    for name in arguments["ip_adapters"]:
        kind, seed = ADAPTERS[name]
        state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, array in adapter_tensors(kind, checkpoint(arguments["model"]), seed).items():
            table, _, rest = key.partition(".")
            state[table][rest] = torch.from_numpy(array)
        states.append(state)
    pipe.register_modules(image_encoder=encoder(), feature_extractor=processor())
    pipe.load_ip_adapter(
        states, subfolder="", weight_name=[""] * len(states), image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(arguments.get("ip_scale", 1.0))


def run(arguments: dict[str, Any], seed: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Latents (1, h, w, C) and uint8 picture (1, H, W, 3) as diffusers' pipeline makes them."""
    pipe = pipeline(arguments, folder)
    given = {theirs: arguments[ours] for ours, theirs in WORDS.items() if ours in arguments}
    given |= {side: arguments[side] for side in ("width", "height") if side in arguments}
    given["generator"] = torch.Generator("cpu").manual_seed(seed)
    shown: Any = [Image.fromarray(photo(*size)) for size in arguments.get("control_image", [])]
    shown = [p if i == 0 else p.transpose(Image.Transpose.ROTATE_180) for i, p in enumerate(shown)]
    if shown:
        given.setdefault("controlnet_conditioning_scale", 1.0)  # its own is 0.8 for img2img
        name = "control_image" if "image" in arguments else "image"
        given[name] = shown if len(shown) > 1 else shown[0]
    if "image" in arguments:
        given["image"] = Image.fromarray(photo(*arguments["image"]))
        if "width" not in given and shown:
            given["height"], given["width"] = arguments["image"]
    if "mask" in arguments:
        given["mask_image"] = Image.fromarray(mask(*arguments["mask"]))
        given.setdefault("strength", 1.0)
    if "ip_image" in arguments:
        given["ip_adapter_image"] = [Image.fromarray(photo(*s)) for s in arguments["ip_image"]]
    last: dict[str, torch.Tensor] = {}
    steps, scale = arguments["steps"], given.get("guidance_scale", 7.5)
    first, end = (int(share * steps) for share in arguments.get("guidance_interval", (0, 1)))

    def scale_at(step: int) -> float:
        return scale if first <= step < end else BARELY

    def keep(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
        last.update(state)
        if "guidance_interval" in arguments:
            pipe._guidance_scale = scale_at(step + 1)
        return state

    if "guidance_interval" in arguments:
        given["guidance_scale"] = scale_at(0)
    images = pipe(arguments["prompt"], callback_on_step_end=keep, output_type="np", **given).images
    return nhwc(last["latents"]), (images * 255).round().astype(np.uint8)


@torch.no_grad()
def main(names: list[str]) -> None:
    """Write cases.json and pictures.npz."""
    target = HERE / "combinations"
    target.mkdir(exist_ok=True)
    document = {"prompts": [CIRCLE, TREE], "pictures": PICTURES}
    (target / "cases.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    pictures: dict[str, np.ndarray] = dict(np.load(target / "pictures.npz")) if names else {}
    with tempfile.TemporaryDirectory() as folder:
        for label in names or PICTURES:
            arguments = PICTURES[label]
            seeds = range(arguments["seed"], arguments["seed"] + arguments.get("count", 1))
            drawn = [run(arguments, seed, Path(folder)) for seed in seeds]
            latents, image = (np.concatenate(part) for part in zip(*drawn, strict=True))
            pictures[f"{label}/latents"], pictures[f"{label}/image"] = latents, image
            print(f"{label}: contrast {image.std():.0f}", flush=True)
    np.savez_compressed(target / "pictures.npz", **pictures)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(sys.argv[1:])
