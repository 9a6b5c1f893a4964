"""Write pixels of a model that draws pixels, with diffusers' dynamic thresholding: thresholds.npz.

python tests/golden/make_threshold_goldens.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler

HERE = Path(__file__).resolve().parent
LIMITS = {"thresholding": True, "dynamic_thresholding_ratio": 0.9}
# Sampler -> diffusers' class, and the largest threshold.
CASES: dict[str, tuple[Any, float]] = {
    "ddpm": (DDPMScheduler, 1.5),
    "ddim": (DDIMScheduler, 1e5),
    "dpmpp-2m": (DPMSolverMultistepScheduler, 1.5),
}


def main() -> None:
    arrays = {}
    pipe = DDPMPipeline.from_pretrained(HERE / "ddpm" / "checkpoint")
    for name, (kind, most) in CASES.items():
        last: list[torch.Tensor] = []
        scheduler = kind.from_config(pipe.scheduler.config, **LIMITS, sample_max_value=most)
        step = scheduler.step

        def kept(*args: Any, _step: Any = step, _last: Any = last, **given: Any) -> Any:
            out = _step(*args, **given)
            _last[:] = [out.prev_sample]
            return out

        scheduler.step = kept
        drawer = DDPMPipeline(pipe.unet, scheduler)
        drawer(generator=torch.Generator().manual_seed(3), num_inference_steps=12)
        arrays[name] = last[0].permute(0, 2, 3, 1).numpy()
        print(name, float(arrays[name].std()), float(np.abs(arrays[name]).max()))
    np.savez_compressed(HERE / "thresholds.npz", **arrays)


if __name__ == "__main__":
    main()
