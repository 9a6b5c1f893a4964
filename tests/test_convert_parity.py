"""What we open is what diffusers and transformers open: every value of the golden checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlxdiff.convert import open_source

CHECKPOINTS = sorted((Path(__file__).parent / "golden").glob("*/checkpoint"))
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: p.parent.name)
def test_same_values_as_the_reference_libraries(path: Path) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    model = open_source(path)
    for component in model.components:
        library = transformers if component.startswith("text") else diffusers
        kind = getattr(library, str(model.class_name(component)))
        reference = kind.from_pretrained(path / component, torch_dtype=torch.float32)
        tensors = model.tensors(component)
        for name, value in reference.named_parameters():
            # The spelling of the text encoder's names depends on the version of transformers.
            ours = name if name in tensors else f"text_model.{name}"
            values = tensors.pop(ours).read().astype(np.float32)
            want = value.detach().numpy()
            if want.ndim == 4:
                want = want.transpose(0, 2, 3, 1)
            np.testing.assert_array_equal(values, want, name)
        assert not tensors
