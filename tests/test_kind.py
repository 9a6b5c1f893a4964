"""Facts about a model are told without loading it, and what it lacks is said with a way out."""

from __future__ import annotations

import pytest
from golden_data import checkpoint

from mlxdiff.convert import open_source
from mlxdiff.errors import UsageError
from mlxdiff.run.kind import PARTS, Kind, LatentKind, PixelKind
from mlxdiff.run.map_model import MapKind, makes_maps

# Model -> the parts that it has.
HAS = {
    "sd15": "text prompt image mask hires controlnet t2i_adapter ip_adapter lora embedding vae "
    "upscaler judge motion",
    "sdxl": "text prompt prompt_2 sdxl target_size refiner image mask hires controlnet t2i_adapter "
    "ip_adapter lora embedding vae upscaler judge motion",
    "sdxl-refiner": "text prompt sdxl aesthetic_score refiner image mask hires controlnet "
    "t2i_adapter ip_adapter lora embedding vae upscaler judge",
    "sd15-inpainting": "text prompt image mask hires controlnet t2i_adapter ip_adapter lora "
    "embedding vae upscaler judge",
    "pix2pix": "text prompt image edits ip_adapter lora embedding vae upscaler judge",
    "x4-upscaler": "text prompt image upscales noised lora embedding vae upscaler judge",
    "sd2-depth": "text prompt image depth lora embedding vae upscaler judge",
    "marigold-depth": "image maps lora vae",
    "unclip": "text prompt image noised variations hires lora embedding vae upscaler judge",
    "variation": "text image variations hires vae upscaler",
    "zero123": "text image camera vae upscaler",
    "ddpm": "threshold upscaler",
    "ddpm-labels": "label threshold upscaler",
}


def kind_of(name: str) -> Kind:
    source = open_source(checkpoint(name))
    if makes_maps(source):
        return MapKind(source)
    return PixelKind(source) if source.family == "ddpm" else LatentKind(source)


@pytest.mark.parametrize("name", HAS)
def test_every_part_is_there_or_missed_with_a_reason(name: str) -> None:
    kind = kind_of(name)
    assert {part for part in PARTS if kind.lacks(part) is None} == set(HAS[name].split())
    for part in PARTS:
        reason = kind.lacks(part)
        assert reason is None or (reason and "{" not in reason and "\n" not in reason)
        if reason is not None:
            with pytest.raises(UsageError) as caught:
                kind.require(part, "a word")
            assert str(caught.value) == f"a word: {reason}"
    with pytest.raises(KeyError):
        kind.lacks("wings")
