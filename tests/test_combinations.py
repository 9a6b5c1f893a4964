"""What is added to a model, several at once: LoRA, words, ControlNet, IP-Adapter, masks."""

from __future__ import annotations

import pytest
from golden_data import cases
from golden_runs import Opened, assert_drawn_again

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
    assert set(pipe.model._loaded) == {"vae"}
    pipe.save_memory(False)
