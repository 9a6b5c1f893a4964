"""mlxdiff reads every value of the golden checkpoints as diffusers and transformers do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden_data import checkpoint

from mlxdiff.convert import open_source

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(p.parents[1].name for p in GOLDEN.glob("*/checkpoint/model_index.json"))
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", NAMES)
def test_same_values_as_the_reference_libraries(name: str) -> None:
    path = checkpoint(name)
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    model = open_source(path)
    for component in model.components:
        library = transformers if component.startswith("text") else diffusers
        kind = getattr(library, str(model.class_name(component)))
        folder = path / component if (path / component).is_dir() else path
        reference = kind.from_pretrained(folder, torch_dtype=torch.float32)
        tensors = model.tensors(component)
        for key, value in reference.named_parameters():
            # The spelling of the text encoder's names depends on the version of transformers.
            ours = key if key in tensors else f"text_model.{key}"
            values = tensors.pop(ours).read().astype(np.float32)
            want = value.detach().numpy()
            if want.ndim == 4:
                want = want.transpose(0, 2, 3, 1)
            np.testing.assert_array_equal(values, want, key)
        assert not tensors
