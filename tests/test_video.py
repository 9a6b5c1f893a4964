"""Videos (AnimateDiff) against diffusers; adapters, how they are opened, told and refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from golden_data import GOLDEN, assert_latents_close, assert_picture_close, photo
from golden_runs import Opened
from motion_files import motion_lora
from safetensors.numpy import save_file

CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "motion/cases.json").read_text())["videos"]
SMALL: dict[str, Any] = {"seed": 0, "width": 32, "height": 32, "steps": 2}


def given_video(kind: str, count: int) -> np.ndarray:
    """As the script of the goldens has it."""
    return np.stack([photo(32 + 4 * i * (kind == "video"), 32)[:32] for i in range(count)])


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "motion/videos.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("label", CASES)
def test_videos_equal_diffusers(
    label: str, backend: str, opened: Opened, goldens: dict[str, np.ndarray], tmp_path: Any
) -> None:
    arguments = dict(CASES[label])
    model = arguments.pop("model")
    named = {
        part: arguments.pop(part)
        for part in ("motion_adapter", "controlnets", "ip_adapters", "loras")
        if part in arguments
    }
    pipe = opened(model, backend, **named)
    if "motion_lora" in arguments:
        tensors = motion_lora(named["motion_adapter"], model)
        save_file(tensors, tmp_path / "zoom.safetensors")
        pipe.set_loras([(tmp_path / "zoom.safetensors", arguments.pop("motion_lora"))])
    if "image" in arguments:
        kind, count = arguments["image"]
        shown = given_video(kind, count)
        arguments["image"] = list(shown) if kind == "video" else shown[0]
    if "control_video" in arguments:
        frames = given_video("video", *arguments.pop("control_video"))
        arguments["control_image"] = frames[:, ::-1]
    if "ip_image" in arguments:
        arguments["ip_image"] = [photo(*size) for size in arguments["ip_image"]]
    result = pipe.generate(**arguments)
    assert_latents_close(result.latents, goldens[f"{label}/latents"][None])
    assert_picture_close(
        np.stack([np.asarray(frame) for frame in result.videos[0]]), goldens[f"{label}/frames"]
    )
