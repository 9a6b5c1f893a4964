"""Time one step of a full-size Stable Diffusion U-Net: NumPy against diffusers.

    python benchmarks/numpy_unet_step.py [--model sd15] [--threads 1] [--size 64] [--batch 2]
        [--rounds 2] [--steps 2]

Both sides compute the same step in float32 with the same random weights, made here. Nothing is
downloaded. They take turns. Each runs in its own process with the same number of threads, so other
load slows both alike. Each does one step to warm up, then the timed steps. The output gives wall
time and CPU time; with one thread the CPU time is the more stable one. Prints a table and a line of
JSON. diffusers needs mlxdiff[parity].
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.networks.config import UNet2DConditionConfig
from mlxdiff.networks.params import expected_parameters

# Differences of each published config from diffusers' defaults.
MODELS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
}
SIDES = ("mlxdiff", "diffusers")
VERSIONS = {"mlxdiff": ("mlxdiff", "numpy"), "diffusers": ("diffusers", "torch")}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def weights(model: str) -> Iterator[tuple[str, np.ndarray]]:
    """Return random weights in our layout that keep activations near unit size; always the same."""
    random = np.random.default_rng(0)
    config = UNet2DConditionConfig.from_dict(MODELS[model])
    for name, shape in expected_parameters(config).items():
        values = random.standard_normal(shape, np.float32)
        if len(shape) == 1:
            values *= 0.1
            values += float("norm" in name and name.endswith("weight"))
        else:
            values *= float(np.prod(shape[1:])) ** -0.5
        yield name, values


def inputs(model: str, size: int, batch: int) -> dict[str, np.ndarray]:
    """Return latents (B, size, size, 4), text states (B, 77, D); for SDXL, pooled text, sizes."""
    random = np.random.default_rng(1)
    width = MODELS[model]["cross_attention_dim"]
    given = {
        "sample": random.standard_normal((batch, size, size, 4), np.float32),
        "text": random.standard_normal((batch, 77, width), np.float32),
    }
    if model == "sdxl":
        sizes = [8 * size, 8 * size, 0, 0, 8 * size, 8 * size]
        given["text_embeds"] = random.standard_normal((batch, 1280), np.float32)
        given["time_ids"] = np.tile(np.array(sizes, np.float32), (batch, 1))
    return given


def mlxdiff_step(model: str, size: int, batch: int) -> Callable[[], np.ndarray]:
    from mlxdiff.backends.numpy import nn
    from mlxdiff.networks.unet import UNet2DConditionModel

    unet = UNet2DConditionModel(nn, UNet2DConditionConfig.from_dict(MODELS[model]))
    unet.load_weights(list(weights(model)))
    given = inputs(model, size, batch)
    sample, text = given.pop("sample"), given.pop("text")
    return lambda: unet(sample, 501, text, **given)


def diffusers_step(model: str, size: int, batch: int) -> Callable[[], np.ndarray]:
    import torch
    from diffusers import UNet2DConditionModel

    def nchw(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x)

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS[model]).eval()
    unet.load_state_dict({name: nchw(value) for name, value in weights(model)}, assign=True)
    given = {name: nchw(x) for name, x in inputs(model, size, batch).items()}
    sample, text = given.pop("sample"), given.pop("text")

    @torch.no_grad()
    def step() -> np.ndarray:
        out = unet(sample, 501, text, added_cond_kwargs=given).sample
        return out.numpy().transpose(0, 2, 3, 1)

    return step


def measure(side: str, model: str, size: int, batch: int, steps: int, file: str) -> None:
    """Time one side in this process. Write the output to the file, print the times as JSON."""
    step = {"mlxdiff": mlxdiff_step, "diffusers": diffusers_step}[side](model, size, batch)
    np.save(file, step())
    walls, cpus = [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    print(json.dumps({"wall": walls, "cpu": cpus}))


def take_turns(options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides, round by round. Return the values of the JSON line."""
    environment = os.environ | dict.fromkeys(THREADS, str(options.threads))
    times: dict[str, dict[str, list[float]]] = {side: {"wall": [], "cpu": []} for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        files = {side: str(Path(folder) / f"{side}.npy") for side in SIDES}
        numbers = [str(n) for n in (options.size, options.batch, options.steps)]
        for number in range(options.rounds):
            for side in SIDES:
                print(f"round {number + 1} of {options.rounds}: {side}", file=sys.stderr)
                done = subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        "--measure",
                        side,
                        options.model,
                        *numbers,
                        files[side],
                    ],
                    env=environment,
                    check=True,
                    stdout=subprocess.PIPE,
                )
                for kind, values in json.loads(done.stdout.splitlines()[-1]).items():
                    times[side][kind] += values
        ours, theirs = (np.load(files[side]) for side in SIDES)
    median = {
        side: {kind: statistics.median(values) for kind, values in kinds.items()}
        for side, kinds in times.items()
    }
    return {
        "benchmark": "numpy_unet_step",
        "model": options.model,
        "threads": options.threads,
        "size": options.size,
        "batch": options.batch,
        "seconds": times,
        "median": median,
        "ratio": {
            kind: median["mlxdiff"][kind] / median["diffusers"][kind] for kind in ("wall", "cpu")
        },
        "largest_difference": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for names in VERSIONS.values() for name in names},
    }


def processor() -> str:
    """Return the name of the processor, as far as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(
        f"U-Net of {result['model']}, one step in float32: batch {result['batch']}, latents "
        f"{result['size']}x{result['size']}, {result['threads']} thread(s)\n"
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}\n\n"
        f"{'':24}{'wall':>9}{'CPU':>9}   median of {len(result['seconds']['mlxdiff']['wall'])}"
    )
    for side in SIDES:
        label = ", ".join(
            f"{name} {result['versions'][name].partition('+')[0]}" for name in VERSIONS[side]
        )
        wall, cpu = (result["median"][side][kind] for kind in ("wall", "cpu"))
        print(f"{label:32.32}{wall:8.2f}s{cpu:8.2f}s")
    ratio = result["ratio"]
    print(f"{'ratio':32}{ratio['wall']:9.2f}{ratio['cpu']:9.2f}")
    print(f"largest difference of the outputs, relative: {result['largest_difference']:.1e}\n")
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="sd15", help="(default: sd15)")
    parser.add_argument("--threads", type=int, default=1, help="of each side (default: 1)")
    parser.add_argument("--size", type=int, default=64, help="side of the latents (default: 64)")
    parser.add_argument("--batch", type=int, default=2, help="(default: 2)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side (default: 2)")
    parser.add_argument("--steps", type=int, default=2, help="timed in each turn (default: 2)")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, model, size, batch, steps, file = options.measure
        measure(side, model, int(size), int(batch), int(steps), file)
    else:
        report(take_turns(options))


if __name__ == "__main__":
    main()
