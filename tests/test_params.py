"""The names and shapes that the configs imply are those of the real, full-size models."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_data import GOLDEN

from mlxdiff.networks.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    ComponentConfig,
    read_unet,
    read_vae,
)
from mlxdiff.networks.params import expected_parameters

CONFIGS: dict[str, Callable[[dict[str, Any]], ComponentConfig]] = {
    "unet": read_unet,
    "vae": read_vae,
    "text_encoder": CLIPTextConfig.from_dict,
    "image_encoder": CLIPVisionConfig.from_dict,
}
FILES = sorted((GOLDEN / "names").glob("*.json.gz"))


@pytest.mark.parametrize("path", FILES, ids=[path.name.split(".json")[0] for path in FILES])
def test_names_and_shapes_are_those_of_the_real_model(path: Path) -> None:
    golden = json.loads(gzip.decompress(path.read_bytes()))
    config = CONFIGS[golden["component"]](golden["config"])
    assert expected_parameters(config) == {k: ours(s) for k, s in golden["shapes"].items()}


def ours(shape: list[int]) -> tuple[int, ...]:
    """A shape of torch's in the layout of a converted folder: OIHW to OHWI."""
    if len(shape) == 4:
        outputs, inputs, height, width = shape
        return outputs, height, width, inputs
    if len(shape) == 5:  # among frames: a linear layer
        outputs, inputs, frames, _, _ = shape
        return outputs, frames * inputs
    return tuple(shape)


def test_every_kind_of_component_is_covered() -> None:
    kinds = {path.name.split(".")[0] for path in FILES}
    assert kinds == set(CONFIGS) and len(FILES) == 31


def test_the_order_is_that_of_the_file_format() -> None:
    """As the modules are declared: a converted folder's tensors are written in this order."""
    unet = "conv_in time_embedding add_embedding down_blocks mid_block up_blocks conv_norm_out"
    tops = {
        "unet.sdxl": f"{unet} conv_out",
        "vae.sd15": "encoder quant_conv post_quant_conv decoder",
    }
    for name, expected in tops.items():
        golden = json.loads(gzip.decompress((GOLDEN / f"names/{name}.json.gz").read_bytes()))
        names = expected_parameters(CONFIGS[golden["component"]](golden["config"]))
        assert list(dict.fromkeys(n.split(".")[0] for n in names)) == expected.split()
    inner = [n for n in names if n.startswith("decoder.up_blocks.2.resnets.0")]
    parts = "norm1 conv1 norm2 conv2 conv_shortcut".split()
    assert [n.split(".")[-2] for n in inner[::2]] == parts
