"""Short names of well-known models: `-m sd15` for `-m stable-diffusion-v1-5/...`.

Licences and repositories are as the model cards gave them; where the publisher withdrew a
repository, the mirror is named with its reason. Sizes are those of the converted copy in float16,
computed from the shapes of all tensors (tests/test_known.py).
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
        family: "sd1", "sd2", "sdxl", "sdxl-refiner" or "ddpm"; "vae" for one to be given as --vae.
        megabytes: what the converted copy takes in float16.
        licence: as its model card calls it.
        note: what it is good at.
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
_SD2 = "sd2-community"  # Stability AI withdrew its own stable-diffusion-2* in November 2025
_SD1 = "stable-diffusion-v1-5"  # Runway withdrew its own in August 2024

KNOWN: tuple[Known, ...] = (
    Known("sd15", f"{_SD1}/stable-diffusion-v1-5", "sd1", 2132, _RAIL,
          "512x512; the base of most fine-tunes, LoRAs and ControlNets"),
    Known("sd14", "CompVis/stable-diffusion-v1-4", "sd1", 2132, _RAIL,
          "512x512; the model before sd15, for old results"),
    Known("sd15-inpainting", f"{_SD1}/stable-diffusion-inpainting", "sd1", 2132, _RAIL,
          "512x512; repaints what a mask marks"),
    Known("instruct-pix2pix", "timbrooks/instruct-pix2pix", "sd1", 2132, "mit",
          "512x512; edits a picture as told"),
    Known("lcm", "SimianLuo/LCM_Dreamshaper_v7", "sd1", 2133, "mit",
          "768x768 in 4 to 8 steps"),
    Known("bk-sdm-small", "nota-ai/bk-sdm-small", "sd1", 1378, _RAIL,
          "512x512; sd15 without half of its U-Net, faster and smaller"),
    Known("bk-sdm-tiny", "nota-ai/bk-sdm-tiny", "sd1", 1060, _RAIL,
          "512x512; the smallest whole model here"),
    Known("sd21", f"{_SD2}/stable-diffusion-2-1", "sd2", 2580, _RAIL_PP,
          "768x768, v-prediction; a community mirror (withdrawn by its publisher)"),
    Known("sd21-base", f"{_SD2}/stable-diffusion-2-1-base", "sd2", 2580, _RAIL_PP,
          "512x512; a community mirror (withdrawn by its publisher)"),
    Known("sd-turbo", "stabilityai/sd-turbo", "sd2", 2580, _SAI,
          "512x512 in 1 to 4 steps, without guidance"),
    Known("x4-upscaler", "stabilityai/stable-diffusion-x4-upscaler", "sd2", 1738, _RAIL_PP,
          "enlarges a picture four times (--image)"),
    Known("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", 6939, _RAIL_PP,
          "1024x1024; the best pictures here"),
    Known("sdxl-refiner", "stabilityai/stable-diffusion-xl-refiner-1.0", "sdxl-refiner", 6076,
          _RAIL_PP, "1024x1024; the last steps of an sdxl picture"),
    Known("sdxl-turbo", "stabilityai/sdxl-turbo", "sdxl", 6939, _SAI,
          "512x512 in 1 to 4 steps, without guidance"),
    Known("sdxl-inpainting", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", "sdxl", 6939,
          _RAIL_PP, "1024x1024; repaints what a mask marks"),
    Known("ssd-1b", "segmind/SSD-1B", "sdxl", 4466, "apache-2.0",
          "1024x1024; sdxl with half of its U-Net, faster"),
    Known("vega", "segmind/Segmind-Vega", "sdxl", 3294, "apache-2.0",
          "1024x1024; the smallest sdxl, a good first model for 8 GB of memory"),
    Known("ddpm-cifar10", "google/ddpm-cifar10-32", "ddpm", 71, "apache-2.0",
          "32x32 without a prompt; the model of the paper that began the field (Ho et al. 2020)"),
    Known("ddpm-celebahq", "google/ddpm-celebahq-256", "ddpm", 227, "apache-2.0",
          "256x256 faces without a prompt; the same paper"),
    Known("taesd", "madebyollin/taesd", "vae", 5, "mit",
          "--vae for sd1 and sd2: a tiny decoder, quick and a little coarse"),
    Known("taesdxl", "madebyollin/taesdxl", "vae", 5, "mit",
          "--vae for sdxl: a tiny decoder, quick and a little coarse"),
    Known("sdxl-vae-fp16-fix", "madebyollin/sdxl-vae-fp16-fix", "vae", 167, "mit",
          "--vae for sdxl: stays finite in float16"),
)  # fmt: skip
"""All of them, by family."""

_BY_NAME = {known.name: known for known in KNOWN}


def expand(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The hub id that a short name stands for (`sd15@REVISION` too); anything else as it is.

    A file or folder of that name wins, with a note.
    """
    if not isinstance(model, str):
        return model
    name, at, revision = model.partition("@")
    known = _BY_NAME.get(name)
    if known is None:
        return model
    if Path(model).exists():
        logger.warning(
            "%s: the %s here is taken, not the well-known model (%s)",
            model,
            "folder" if Path(model).is_dir() else "file",
            known.repo,
        )
        return model
    return f"{known.repo}{at}{revision}"


def suggestion(model: str) -> str:
    """The short name near to one that stands for nothing: ' (did you mean sd15?)', or ''."""
    near = difflib.get_close_matches(model.partition("@")[0].lower(), _BY_NAME, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
