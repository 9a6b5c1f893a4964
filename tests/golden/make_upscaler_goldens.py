"""Write what spandrel makes of a picture with the tiny upscalers of tests/upscaler_files.py.

Needs torch and spandrel (pip install spandrel). Run from the repository:

    PYTHONPATH=tests python tests/golden/make_upscaler_goldens.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from spandrel import ModelLoader
from upscaler_files import FORMS, weights_of

HERE = Path(__file__).resolve().parent


def main() -> None:
    picture = np.random.RandomState(0).rand(6, 9, 3).astype(np.float32)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None]
    expected = {"picture": picture}
    for name, form in FORMS.items():
        weights = {key: torch.from_numpy(value) for key, value in weights_of(form).items()}
        model = ModelLoader().load_from_state_dict(weights)
        with torch.no_grad():
            out = model.model.float()(x)
        assert model.scale == form.config.scale
        print(name, model.architecture.id, model.scale, model.tags, float(out.std()))
        expected[name] = out[0].permute(1, 2, 0).numpy()
    np.savez_compressed(HERE / "upscalers.npz", **expected)


if __name__ == "__main__":
    main()
