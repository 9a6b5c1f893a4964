"""ControlNet-LLLite against kohya's formula; how it is opened, told and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import cases, checkpoint, photo
from golden_runs import Opened, assert_drawn_again
from lllite_files import lllite_tensors, places, write_lllite
from safetensors.numpy import save_file

import mlxdiff
from mlxdiff.convert import open_controlnet, open_source
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.networks.config import LLLiteConfig
from mlxdiff.report.info import describe

CASES = cases("lllite")
SMALL: dict[str, Any] = {"seed": 0, "width": 32, "height": 32, "steps": 2}


@pytest.mark.parametrize("case", CASES, ids=[c["case"] for c in CASES])
def test_pictures_equal_kohyas_formula(case: dict[str, Any], backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, case, backend)


def unet_of(model: str) -> Any:
    return open_source(checkpoint(model)).config("unet")


def test_a_file_is_opened_and_told(tmp_path: Path) -> None:
    path = write_lllite(tmp_path / "x.safetensors", "sdxl")
    found = open_controlnet(path, unet_of("sdxl"))
    config = found.config
    assert isinstance(config, LLLiteConfig)
    assert {one.target: one.depth for one in config.modules} == {
        layer: depth for layer, (_, depth) in places("sdxl").items()
    }
    assert config.factor == 32
    assert len(found.tensors()) == len(lllite_tensors("sdxl"))
    said = describe(str(path))
    assert said["kind"] == "a ControlNet-LLLite" and "controlnets" in said["use"]


@pytest.mark.parametrize("shape", [None, (), (2, 2), (7, 9, 3, 3)])
def test_damaged_files(shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    tensors, path, unet = lllite_tensors("sdxl"), tmp_path / "x.safetensors", unet_of("sdxl")
    for key in list(tensors)[:60:11]:
        other = {} if shape is None else {key: np.zeros(shape, np.float16)}
        save_file({k: v for k, v in tensors.items() if k != key} | other, path)
        with pytest.raises(CheckpointError) as refused:
            open_controlnet(path, unet)
        assert "\n" not in str(refused.value)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = write_lllite(tmp_path / "x.safetensors", "sdxl")
    with pytest.raises(CheckpointError, match=r"another kind of model|cannot change in this model"):
        mlxdiff.load(checkpoint("sd15"), backend="numpy", controlnets=path)
    other = {"lllite_unet_input_blocks_4_1_proj_in.down.0.weight": np.ones((2, 2), np.float16)}
    save_file(other, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="changes 1 layers that it cannot change"):
        open_controlnet(tmp_path / "y.safetensors", unet_of("sdxl"))


def test_sizes_and_modes(opened: Opened) -> None:
    pipe = opened("sdxl", controlnets=["lllite"])
    with pytest.raises(UsageError, match=r"width 40 is not a multiple of 32, which this Contr"):
        pipe.settings("a", control_image=photo(8, 8), width=40, height=32)
    with pytest.raises(UsageError, match="leave the mode out"):
        pipe.settings("a", control_image=photo(8, 8), control_mode="depth", width=32, height=32)


def test_beside_a_controlnet_in_low_memory(opened: Opened, backend: str) -> None:
    """In either order, each gets its own picture; low memory gives the same."""
    pictures, scales = [photo(32, 32), photo(50, 40)], [1.0, 0.5]
    drawn = []
    for order in (1, -1):
        pipe = opened("sdxl", backend, controlnets=["lllite", "first"][::order])
        run = SMALL | {"control_image": pictures[::order], "control_scale": scales[::order]}
        drawn.append(pipe.generate("a", **run).latents)
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5 * np.abs(drawn[0]).max())
    pipe.save_memory()
    low = pipe.generate("a", **run).latents
    pipe.save_memory(False)
    np.testing.assert_allclose(low, drawn[1], atol=2e-4 * np.abs(low).max())
    without = opened("sdxl", backend).generate("a", **SMALL).latents
    assert np.abs(without - drawn[0]).max() > 1e-3


def test_a_scale_of_zero_changes_nothing(opened: Opened) -> None:
    without = opened("sdxl").generate("a", **SMALL).latents
    pipe = opened("sdxl", controlnets=["lllite"])
    off = pipe.generate("a", control_image=photo(32, 32), control_scale=0, **SMALL)
    assert np.array_equal(off.latents, without)
    settings = pipe.settings("a", control_image=photo(32, 32), width=32, height=32)
    assert any(str(held) == "controlnet_0" for held in pipe.memory(settings).weights)
    assert off.metadata[0].extra["controlnet"] == ["lllite.safetensors"]
