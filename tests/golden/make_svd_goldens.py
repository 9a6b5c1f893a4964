"""Write videos that diffusers' Stable Video Diffusion draws: golden/svd.

    python tests/golden/make_svd_goldens.py

The model is made by `tests/svd_files.py` from seeds, not stored.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from drawing import HERE, generator
from golden_data import photo
from make_checkpoints import write_json
from PIL import Image
from svd_files import write_svd

WORDS = {
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "max_guidance_scale",
    "min_guidance": "min_guidance_scale",
    "motion_bucket": "motion_bucket_id",
    "noise_augmentation": "noise_aug_strength",
    "decode_chunk": "decode_chunk_size",
    "fps": "fps",
    "width": "width",
    "height": "height",
}
SMALL = {"width": 64, "height": 48, "steps": 3, "seed": 0}
CASES: dict[str, dict[str, Any]] = {
    "plain": SMALL | {"image": [300, 420]},
    "numbers": SMALL
    | {
        "image": [48, 64],
        "frames": 3,
        "fps": 12,
        "guidance": 4.5,
        "min_guidance": 1.5,
        "motion_bucket": 40,
        "noise_augmentation": 0.3,
        "decode_chunk": 2,
        "seed": 5,
    },
    "no-guidance": SMALL | {"image": [64, 48], "guidance": 1.0, "frames": 2},
}


@torch.no_grad()
def main() -> None:
    """Write cases.json and videos.npz."""
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipe = StableVideoDiffusionPipeline.from_pretrained(
            write_svd(Path(folder)), dtype=torch.float32
        )
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    pipe.set_progress_bar_config(disable=True)
    for label, case in CASES.items():
        last: dict[str, torch.Tensor] = {}

        def keep(pipe: Any, step: int, time: Any, state: dict[str, Any], last: Any = last) -> Any:
            last.update(state)
            return state

        given = {WORDS[name]: value for name, value in case.items() if name in WORDS}
        frames = pipe(
            Image.fromarray(photo(*case["image"])),
            generator=generator(case["seed"]),
            output_type="np",
            callback_on_step_end=keep,
            **given,
        ).frames[0]
        arrays[f"{label}/latents"] = last["latents"][0].permute(0, 2, 3, 1).numpy()
        arrays[f"{label}/frames"] = (np.asarray(frames) * 255).round().astype(np.uint8)
        shown = arrays[f"{label}/frames"]
        print(f"svd {label}: {shown.shape}, contrast {shown.std():.0f}", flush=True)
    (HERE / "svd").mkdir(exist_ok=True)
    write_json(HERE / "svd/cases.json", CASES)
    np.savez_compressed(HERE / "svd/videos.npz", **arrays)


if __name__ == "__main__":
    main()
