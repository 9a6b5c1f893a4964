"""Dynamic thresholding of models that draw pixels, against diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_data import GOLDEN, assert_latents_close, checkpoint
from golden_runs import Opened

import mlxdiff
from mlxdiff.errors import UsageError

RUN: dict[str, Any] = {"seed": 3, "steps": 12, "schedule": "normal"}
CASES = {"ddpm": 1.5, "ddim": None, "dpmpp-2m": 1.5}


@pytest.mark.parametrize("sampler", CASES)
def test_pixels_equal_diffusers(sampler: str, backend: str) -> None:
    pipe = mlxdiff.load(checkpoint("ddpm"), backend=backend, dtype="float32")
    asked = RUN | {"sampler": sampler}
    got = pipe.generate(dynamic_threshold=0.9, threshold_max=CASES[sampler], **asked)
    expected = np.load(GOLDEN / "thresholds.npz")[sampler]
    assert_latents_close(got.latents, expected)
    plain = pipe.generate(**asked)  # which clips, or does nothing
    assert np.abs(plain.latents - expected).max() > 0.05
    said = got.metadata[0].extra
    assert said["dynamic_threshold"] == 0.9 and said.get("threshold_max") == CASES[sampler]


def test_what_cannot_be_honoured_is_refused(opened: Opened) -> None:
    pixels, latents = opened("ddpm"), opened("sd15")
    for pipe, given, says in (
        (latents, {"prompt": "a", "dynamic_threshold": 0.9}, "only models that draw pixels"),
        (pixels, {"dynamic_threshold": 0.9, "sampler": "euler"}, "euler does not threshold.*ddim"),
        (pixels, {"dynamic_threshold": 1.9}, "0 to 1"),
        (pixels, {"dynamic_threshold": 0.9, "threshold_max": 0.5}, "at least 1"),
        (pixels, {"threshold_max": 2.0}, "no effect without dynamic_threshold"),
    ):
        with pytest.raises(UsageError, match=says):
            pipe.generate(**{"steps": 2, **given})
