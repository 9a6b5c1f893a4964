"""The names and shapes that the configs imply are those of the real, full-size models."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_data import GOLDEN

from mlxdiff.networks.config import AutoencoderKLConfig, CLIPTextConfig, ComponentConfig, read_unet
from mlxdiff.networks.params import expected_parameters

CONFIGS: dict[str, Callable[[dict[str, Any]], ComponentConfig]] = {
    "unet": read_unet,
    "vae": AutoencoderKLConfig.from_dict,
    "text_encoder": CLIPTextConfig.from_dict,
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
    return tuple(shape)


def test_every_kind_of_component_is_covered() -> None:
    kinds = {path.name.split(".")[0] for path in FILES}
    assert kinds == set(CONFIGS) and len(FILES) == 23
