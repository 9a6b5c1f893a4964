"""What is added to a model, several at once: LoRA, words, ControlNet, IP-Adapter, masks."""

from __future__ import annotations

import numpy as np
import pytest
from golden_data import assert_latents_close, cases
from golden_runs import Opened, assert_drawn_again

from mlxdiff.run.kind import Network

CASES = {case["case"]: case for case in cases("combinations")}


@pytest.mark.parametrize("case", CASES)
def test_pictures_equal_diffusers(case: str, backend: str, opened: Opened) -> None:
    assert_drawn_again(opened, CASES[case], backend)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_they_are_the_same_in_low_memory(model: str, backend: str, opened: Opened) -> None:
    """Networks that are changed and added come and go as the model's own do."""
    pipe = opened(model, backend)
    pipe.save_memory()
    assert_drawn_again(
        opened, CASES["everything" if model == "sd15" else "sdxl-everything"], backend
    )
    assert pipe.model.cache.loaded == {Network("vae")}
    pipe.save_memory(False)


@pytest.mark.mlx
@pytest.mark.parametrize("case", ["everything", "sdxl-everything"])
def test_they_go_with_a_quantized_model(case: str, opened: Opened) -> None:
    """The same on both backends, and near the picture of the whole model."""
    pytest.importorskip("mlx.core")
    drawn = [opened.draw(CASES[case], backend, quantize=8) for backend in ("numpy", "mlx")]
    assert_latents_close(drawn[1].latents, drawn[0].latents)
    exact = opened.draw(CASES[case], "numpy").latents
    assert 0.001 < np.std(drawn[0].latents - exact) / np.std(exact) < 0.05


@pytest.mark.mlx
@pytest.mark.parametrize("case", ["everything", "sdxl-everything"])
def test_they_go_with_the_a1111_syntax(case: str, opened: Opened) -> None:
    """The same picture where a prompt has none of it; long, changing prompts on both backends."""
    pytest.importorskip("mlx.core")

    def draw(prompt: str, syntax: str, backend: str = "numpy") -> np.ndarray:
        changed = {"prompt": prompt, "negative_prompt": "", "prompt_syntax": syntax}
        arguments = CASES[case]["arguments"] | changed
        return opened.draw(CASES[case] | {"arguments": arguments}, backend).latents

    prompt = "a photo, on a yellow background"
    plain = draw(prompt, "plain")
    np.testing.assert_array_equal(draw(prompt, "a1111"), plain)
    for text in (f"({prompt}:1.3) BREAK a lake", f"[{prompt}:a lake:0.5]"):
        drawn = draw(text, "a1111")
        assert_latents_close(draw(text, "a1111", "mlx"), drawn)
        assert np.std(drawn - plain) / np.std(plain) > 0.01
