"""Measure the peak memory of a whole picture with low_memory, on MLX's own counter.

    python benchmarks/peak_memory.py sd15 [-q 4] [--size 512] [--steps 1] [--folder FOLDER]
        [--frames 16] [--guidance 7.5]

The model has full size and random weights. If FOLDER does not exist, random_model.py makes it
first. The peak of a run does not depend on the number of steps. Prints a table by stage as the run
proceeds, and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from numpy_unet_step import processor
from random_model import MODELS, make, make_motion_adapter

import mlxdiff
from mlxdiff.report.bench import needed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("-q", "--quantize")
    parser.add_argument("--size", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--frames", type=int, help="draw a video with a random motion adapter")
    parser.add_argument("--guidance", type=float, default=7.5, help="1: one prediction a step")
    parser.add_argument("--dtype", help="computed in (default: float16 on a GPU, else float32)")
    options = parser.parse_args()
    import mlx.core as mx

    name = f"mlxdiff-random-{options.model}-{options.quantize or 'float16'}"
    folder = options.folder or Path(tempfile.gettempdir()) / name
    make(options.model, folder, quantize=options.quantize)
    pipe = mlxdiff.load(folder, backend="mlx", dtype=options.dtype, low_memory=True)
    if options.frames is not None:
        adapter = Path(tempfile.gettempdir()) / f"mlxdiff-random-motion-{options.model}"
        pipe.set_motion_adapter(make_motion_adapter(options.model, adapter))
    peaks: dict[str, int] = {}

    def note(stage: str) -> None:
        peaks[stage] = max(peaks.get(stage, 0), mx.get_peak_memory())
        print(f"{stage:14}{peaks[stage] / 2**30:8.3f} GiB", flush=True)
        mx.reset_peak_memory()

    mx.reset_peak_memory()
    start = time.perf_counter()
    size = {} if options.size is None else {"width": options.size, "height": options.size}
    if options.frames is not None:
        size["frames"] = options.frames
    result = pipe.generate(
        **needed(pipe.model, size),
        seed=0,
        steps=options.steps,
        guidance=options.guidance,
        **size,
        on_step=lambda step: note("text and U-Net"),
    )
    note("VAE")
    record = {
        "benchmark": "peak_memory",
        "model": options.model,
        "quantize": options.quantize,
        "size": [result.settings.width, result.settings.height],
        "dtype": pipe.backend.dtype,
        "steps": options.steps,
        "guidance": options.guidance,
        "frames": options.frames,
        "estimate": pipe.memory(result.settings).peak,
        "peak_bytes": max(peaks.values()),
        "stages": peaks,
        "seconds": time.perf_counter() - start,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": {name: version(name) for name in ("mlxdiff", "mlx")},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
