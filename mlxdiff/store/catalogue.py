"""Short names of well-known models: `-m sd15` for `-m stable-diffusion-v1-5/...`.

Licences and repositories are those of the model cards. If a publisher withdrew a repository, the
entry names a mirror and the reason. Sizes are those of the converted copy in float16, computed from
the shapes of all tensors (tests/test_catalogue.py).
"""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("mlxdiff")


@dataclass(frozen=True)
class Known:
    """A well-known model.

    Attributes:
        name: the short name.
        repo: `org/name` on the hub.
        family: "sd1", "sd2", "sdxl", "sdxl-refiner", "svd" or "ddpm"; "vae" for a VAE alone.
        megabytes: size of the converted copy in float16.
        licence: name of the licence on its model card.
        note: the use that it is best at.
    """

    name: str
    repo: str
    family: str
    megabytes: int
    licence: str
    note: str


_RAIL = "creativeml-openrail-m"
_RAIL_PP = "openrail++"
_SAI = "Stability AI community licence: see the model card"
_CARD = "see the model card"
_SD2 = "sd2-community"  # a mirror: Stability AI withdrew stable-diffusion-2* in November 2025
_SD1 = "stable-diffusion-v1-5"  # a mirror: Runway withdrew its repository in August 2024

KNOWN: tuple[Known, ...] = (
    Known("sd15", f"{_SD1}/stable-diffusion-v1-5", "sd1", 2132, _RAIL,
          "512x512; the base of most fine-tunes, LoRAs and ControlNets"),
    Known("sd14", "CompVis/stable-diffusion-v1-4", "sd1", 2132, _RAIL,
          "512x512; the predecessor of sd15, to repeat old results"),
    Known("sd15-inpainting", f"{_SD1}/stable-diffusion-inpainting", "sd1", 2132, _RAIL,
          "512x512; repaints the area that a mask marks"),
    Known("instruct-pix2pix", "timbrooks/instruct-pix2pix", "sd1", 2132, "mit",
          "512x512; edits a picture by instruction"),
    Known("lcm", "SimianLuo/LCM_Dreamshaper_v7", "sd1", 2133, "mit",
          "768x768 in 4 to 8 steps"),
    Known("bk-sdm-small", "nota-ai/bk-sdm-small", "sd1", 1378, _RAIL,
          "512x512; sd15 with half of the U-Net, faster and smaller"),
    Known("bk-sdm-tiny", "nota-ai/bk-sdm-tiny", "sd1", 1060, _RAIL,
          "512x512; the smallest complete model in this list"),
    Known("sd21", f"{_SD2}/stable-diffusion-2-1", "sd2", 2580, _RAIL_PP,
          "768x768, v-prediction; a community mirror (withdrawn by its publisher)"),
    Known("sd21-base", f"{_SD2}/stable-diffusion-2-1-base", "sd2", 2580, _RAIL_PP,
          "512x512; a community mirror (withdrawn by its publisher)"),
    Known("sd-turbo", "stabilityai/sd-turbo", "sd2", 2580, _SAI,
          "512x512 in 1 to 4 steps, without guidance"),
    Known("x4-upscaler", "stabilityai/stable-diffusion-x4-upscaler", "sd2", 1738, _RAIL_PP,
          "enlarges a picture to four times its width and height"),
    Known("marigold", "prs-eth/marigold-depth-v1-1", "sd2", 2580, _CARD,
          "makes a depth map of a picture"),
    Known("marigold-normals", "prs-eth/marigold-normals-v1-1", "sd2", 2580, _CARD,
          "makes a map of surface normals of a picture"),
    Known("svd", "stabilityai/stable-video-diffusion-img2vid", "svd", 4509, _SAI,
          "1024x576; lets a picture move, 14 frames"),
    Known("svd-xt", "stabilityai/stable-video-diffusion-img2vid-xt", "svd", 4509, _SAI,
          "1024x576; lets a picture move, 25 frames"),
    Known("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", 6939, _RAIL_PP,
          "1024x1024; the best pictures in this list"),
    Known("sdxl-refiner", "stabilityai/stable-diffusion-xl-refiner-1.0", "sdxl-refiner", 6076,
          _RAIL_PP, "1024x1024; draws the last steps of an sdxl picture"),
    Known("sdxl-turbo", "stabilityai/sdxl-turbo", "sdxl", 6939, _SAI,
          "512x512 in 1 to 4 steps, without guidance"),
    Known("sdxl-inpainting", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", "sdxl", 6939,
          _RAIL_PP, "1024x1024; repaints the area that a mask marks"),
    Known("ssd-1b", "segmind/SSD-1B", "sdxl", 4466, "apache-2.0",
          "1024x1024; sdxl with half of the U-Net, faster"),
    Known("vega", "segmind/Segmind-Vega", "sdxl", 3294, "apache-2.0",
          "1024x1024; the smallest sdxl, a good first model for 8 GB of memory"),
    Known("ddpm-cifar10", "google/ddpm-cifar10-32", "ddpm", 71, "apache-2.0",
          "32x32 without a prompt; from the paper that started the field (Ho et al. 2020)"),
    Known("ddpm-celebahq", "google/ddpm-celebahq-256", "ddpm", 227, "apache-2.0",
          "256x256 faces without a prompt; from the same paper"),
    Known("taesd", "madebyollin/taesd", "vae", 5, "mit",
          "a VAE for sd1 and sd2: a tiny decoder, fast and slightly coarse"),
    Known("taesdxl", "madebyollin/taesdxl", "vae", 5, "mit",
          "a VAE for sdxl: a tiny decoder, fast and slightly coarse"),
    Known("sdxl-vae-fp16-fix", "madebyollin/sdxl-vae-fp16-fix", "vae", 167, "mit",
          "a VAE for sdxl: stays finite in float16"),
)  # fmt: skip
"""All well-known models, grouped by family."""

_OTHERS = (
    "flux",
    "sd3",
    "sd35",
    "sd3.5",
    "qwen",
    "z-image",
    "chroma",
    "hunyuan",
    "pixart",
    "kandinsky",
)
"""Beginnings of names of other architectures."""

_BY_NAME = {known.name: known for known in KNOWN}

_PACKAGE = Path(__file__).resolve().parent.parent
ABOUT = {
    "builtin": ("MIT", "64x64 shapes in nine colors; the model that draws where none is named"),
    "emoji": ("OFL-1.1", "64x64 emoji by name, on plain grounds and in small scenes"),
}
"""Licence and note of the models that the package holds, by short name."""
SHIPPED = {name: _PACKAGE / name for name in ABOUT}
"""Their folders."""


def expand(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Replace a short name (`sd15@REVISION` too) by its hub id, that of a model in the package by
    its folder. Return other names unchanged.

    If a file or folder has that name, it takes precedence, with a note.
    """
    if not isinstance(model, str):
        return model
    name, at, revision = model.partition("@")
    known = _BY_NAME.get(name)
    folder = SHIPPED.get(model)
    if known is None and folder is None:
        return model
    if os.path.exists(model):
        logger.warning(
            "%s: using the local %s of this name, not the well-known model (%s)",
            model,
            "folder" if Path(model).is_dir() else "file",
            "in the package" if known is None else known.repo,
        )
        return model
    if known is None:
        return str(folder)
    return f"{known.repo}{at}{revision}"


def suggestion(model: str) -> str:
    """Suggest the short name most similar to an unknown name: ' (did you mean sd15?)', or ''.

    Or say of a model that people know by name that it is none of these.
    """
    if model.lower().startswith(_OTHERS):
        return " (if you mean the model of that name: it is no Stable Diffusion 1.x, 2.x or SDXL)"
    near = difflib.get_close_matches(model.partition("@")[0].lower(), [*_BY_NAME, *SHIPPED], n=1)
    return f" (did you mean {near[0]}?)" if near else ""
