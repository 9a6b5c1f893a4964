"""Compute how long a step and a decode take on a Mac, from counted work. Nothing is measured.

    python benchmarks/gpu_times.py

Time is arithmetic / rate + bytes / bandwidth: neither hides the other. The rates are assumed: 60 %
of the peak in float32, 80 % of the bandwidth. Arithmetic is that of mlxdiff.networks.cost, by
Winograd's method where MLX uses it, with the zero padding of SD 1.5's heads of 40. Bytes are those
that tests/test_gpu_work.py counts, and the transforms of Winograd's method, written and read once.
"""

from __future__ import annotations

from collections.abc import Sequence

from random_model import config

from mlxdiff.networks.cost import operations
from mlxdiff.networks.recorder import Operation
from mlxdiff.run.memory import _winograd_bytes

# GPU -> peak TFLOP/s in float32, GB/s: Apple's figures.
GPUS = {"M1, 8 cores": (2.6, 68), "M2 Pro, 19": (6.8, 200), "M3 Max, 40": (14.2, 400),
        "M4 Max, 40": (18.4, 546)}  # fmt: skip
# Work -> model, network, latents, bytes a value, counted GB. Decoders are whole.
COUNTED = {
    "SD 1.5, 512x512: guided step, float16": ("sd15", "unet", 64, 2, 7.8),
    "SDXL, 1024x1024: guided step, float16": ("sdxl", "unet", 128, 2, 41.6),
    "SD 1.5, 512x512: decode, float16": ("sd15", "vae", 64, 2, 11.2),
    "SDXL, 1024x1024: decode in bands, float32": ("sdxl", "vae", 128, 4, 110.3),
    "SDXL, 1024x1024: decode whole, float32": ("sdxl", "vae", 128, 4, 89.3),
}
PADDED = 64 / 40  # heads of SD 1.5's first level, in attention's products
SAVED = 9 * 36 / 64  # direct multiplications over Winograd's, for tiles of 6x6 results


def arithmetic(work: Sequence[Operation], size: int, padded: bool) -> float:
    """Return floating-point operations."""
    total = 0.0
    for op in work:
        factor = 1 / SAVED if op.kind == "convolution" and _winograd_bytes(op, size) else 1.0
        if padded and op.kind == "attention" and op.row >= 4096:
            factor = PADDED
        total += 2 * op.macs * factor
    return total


def work_of(
    work: Sequence[Operation], size: int, counted: float, padded: bool
) -> tuple[float, float]:
    """Return TFLOP, and GB read and written with the transforms of Winograd's method."""
    moved = sum(_winograd_bytes(op, size) for op in work if op.kind == "convolution")
    return arithmetic(work, size, padded) / 1e12, counted + 2 * moved / 1e9


def seconds(flop: float, gigabytes: float, peak: float, bandwidth: float) -> float:
    """Return the time of so many TFLOP and GB on a GPU."""
    return flop / (0.6 * peak) + gigabytes / (0.8 * bandwidth)


def main() -> None:
    names = " | ".join(GPUS)
    print(f"| work | TFLOP | GB | {names} |")
    print("|---" * (3 + len(GPUS)) + "|")
    for title, (model, part, latent, size, counted) in COUNTED.items():
        batch = 2 if part == "unet" else 1
        work = operations(config(model, part), latent, latent, batch=batch)
        flop, gigabytes = work_of(work, size, counted, model == "sd15")
        times = [seconds(flop, gigabytes, peak, rate) for peak, rate in GPUS.values()]
        cells = " | ".join(f"{t:.2g} s" for t in times)
        print(f"| {title} | {flop:.2f} | {gigabytes:.0f} | {cells} |")


if __name__ == "__main__":
    main()
