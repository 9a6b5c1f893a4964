"""diffusers' pipelines with what can be added to a model: LoRA, words, ControlNet, IP-Adapter.

The files are those of tests/lora_files.py, tests/control_files.py, tests/adapter_files.py and
prompts/, as the tests have them.
"""

from __future__ import annotations

import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from drawing import Drawn, draw, generator, opened, pictures, prepare, words
from make_prompt_goldens import load_words
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent.parent))
from adapter_files import ADAPTERS, ENCODER, adapter_tensors, encoder_tensors
from control_files import NETS, controlnet_config, controlnet_tensors
from golden_data import checkpoint, mask, photo
from lora_files import write as write_lora

OWN_TASK = StableDiffusionInstructPix2PixPipeline, StableDiffusionUpscalePipeline
LORAS = tempfile.TemporaryDirectory(prefix="mlxdiff-golden-")
KINDS = {  # (task, whether there is a ControlNet): for Stable Diffusion, for SDXL
    ("text", False): (StableDiffusionPipeline, StableDiffusionXLPipeline),
    ("image", False): (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline),
    ("mask", False): (StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline),
    ("text", True): (StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline),
    ("image", True): (
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
    ),
    ("mask", True): (
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
    ),
}


def controlnet(model: str, name: str) -> ControlNetModel:
    """One of the ControlNets of control_files, in diffusers."""
    seed, changes = NETS[name]
    config = controlnet_config(model, **changes)
    net = ControlNetModel.from_config(config).eval()
    tensors = controlnet_tensors(config, seed)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=True)
    return net


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


def pipeline(arguments: dict[str, Any], task: str) -> Any:
    """The pipeline for a case, with all that is added to it.

    Args:
        task: "text", "image" or "mask".
    """
    pipe = opened(arguments["model"])
    xl = hasattr(pipe, "text_encoder_2")
    kind = KINDS[task, "controlnets" in arguments][xl]
    if isinstance(pipe, OWN_TASK):
        pass
    elif "controlnets" in arguments:
        nets = [controlnet(arguments["model"], name) for name in arguments["controlnets"]]
        parts = pipe.components | {"add_watermarker" if xl else "requires_safety_checker": False}
        pipe = kind(controlnet=nets if len(nets) > 1 else nets[0], **parts)
    else:
        pipe = kind.from_pipe(pipe)
    pipe = prepare(pipe, arguments)
    names = []
    for file, _ in arguments.get("loras", []):
        names.append(f"lora_{len(names)}")
        path = write_lora(file, Path(LORAS.name))
        pipe.load_lora_weights(str(path), adapter_name=names[-1])
    if names:
        pipe.set_adapters(names, [scale for _, scale in arguments["loras"]])
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


class Scale(float):
    """A guidance scale that counts in an interval of the steps, and else is 1.

    The pipelines go on to make both predictions, and multiply their difference by it.
    """

    step = 0
    guided = range(0)

    def __mul__(self, difference: Any) -> Any:
        return (float(self) if self.step in self.guided else 1.0) * difference

    def after(self, pipe: Any, step: int) -> None:
        """Goes on to the next step."""
        self.step = step + 1


def run(arguments: dict[str, Any], seed: int) -> Drawn:
    """One picture, as diffusers' pipelines make it."""
    task = "mask" if "mask" in arguments else "image" if "image" in arguments else "text"
    pipe, prompt = pipeline(arguments, task), arguments["prompt"]
    shown = pictures(photo, arguments.get("control_image", []))
    shown = [p if i == 0 else p.transpose(Image.Transpose.ROTATE_180) for i, p in enumerate(shown)]
    control: Any = shown if len(shown) > 1 else shown[0] if shown else None
    given = words(arguments) | {"generator": generator(seed)}
    given |= {side: arguments[side] for side in ("width", "height") if side in arguments}
    if shown:
        given.setdefault("controlnet_conditioning_scale", 1.0)  # its own is 0.8 for img2img
        given["image" if task == "text" else "control_image"] = control
    if task != "text":
        (given["image"],) = pictures(photo, [arguments["image"]])
        if shown:  # whose size it would be
            given = dict(zip(("height", "width"), arguments["image"], strict=True)) | given
    if task == "mask":
        (given["mask_image"],) = pictures(mask, [arguments["mask"]])
        given.setdefault("strength", 1.0)
    if "ip_image" in arguments:
        seen = pictures(photo, arguments["ip_image"])
        given["ip_adapter_image"] = seen if len(arguments["ip_adapters"]) > 1 else [seen]
    if "guidance_interval" in arguments:
        scale, steps = Scale(given.get("guidance_scale", 7.5)), arguments["steps"]
        scale.guided = range(*(int(share * steps) for share in arguments["guidance_interval"]))
        return draw(pipe, prompt, after=scale.after, **given | {"guidance_scale": scale})
    if "refiner" in arguments:
        half = draw(pipe, prompt, output_type="latent", **given)
        return refined(pipe, arguments, half, given)
    if "hires" in arguments:
        half = draw(pipe, prompt, output_type="latent", **given)
        return enlarged(arguments, half, given, control)
    return draw(pipe, prompt, **given)


def refined(pipe: Any, arguments: dict[str, Any], half: Any, given: dict[str, Any]) -> Drawn:
    """The refiner's part, to which nothing is added."""
    refiner = pipeline({"model": arguments["refiner"], "sampler": arguments["sampler"]}, "image")
    refiner.vae = pipe.vae
    again = words(arguments, "denoising_end", "control_scale", "control_start", "control_end")
    again |= {"denoising_start": arguments["denoising_end"], "generator": given["generator"]}
    return draw(refiner, arguments["prompt"], image=half, **again)


def enlarged(arguments: dict[str, Any], half: Any, given: dict[str, Any], control: Any) -> Drawn:
    """The second pass of a hires run, its latents enlarged to the nearest."""
    assert arguments["hires_upscaler"] == "latent-nearest"
    size = {side: int(arguments[side] * arguments["hires"] / 8 + 0.5) * 8 for side in SIDES}
    shape = [size[side] // 8 for side in ("height", "width")]
    larger = torch.nn.functional.interpolate(half, shape, mode="nearest")
    given = given | {"image": larger, "strength": 0.5}
    given |= {} if control is None else {"control_image": control, **size}
    return draw(pipeline(arguments, "image"), arguments["prompt"], **given)


SIDES = ("width", "height")
