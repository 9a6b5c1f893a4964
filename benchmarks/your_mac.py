"""Compute what each Mac can draw: model, options, memory, seconds. Nothing is measured.

    python benchmarks/your_mac.py

Memory is mlxdiff's own estimate for a GPU in float16 (mlxdiff.run.memory), for guided steps.
Seconds are those of gpu_times.py, for 20 steps (SDXL: 25) and the decoder. A choice fits if it
takes at most the recommended working set: two thirds of the memory, three quarters above 36 GB.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import gpu_times
from random_model import RandomModel, config

from mlxdiff.networks.cost import operations
from mlxdiff.run.memory import PROCESS, Device, Work, band_bytes, estimate
from mlxdiff.store.recipes import find_recipe


class Mac(NamedTuple):
    """A Mac: memory in GB, peak TFLOP/s in float32 and GB/s (Apple's figures)."""

    name: str
    memory: int
    peak: float
    bandwidth: float


class Choice(NamedTuple):
    """A model and the options to draw with; steps, and pixels a side."""

    title: str
    flags: str
    model: str
    steps: int
    size: int
    recipe: str | None
    low_memory: bool


MACS = (
    Mac("M1, 8 GB", 8, 2.6, 68),
    Mac("M2, 16 GB", 16, 3.6, 100),
    Mac("M4, 16 GB", 16, 4.3, 120),
    Mac("M2 Pro, 32 GB", 32, 6.8, 200),
    Mac("M3 Max, 64 GB", 64, 14.2, 400),
    Mac("M4 Max, 64 GB", 64, 18.4, 546),
)
CHOICES = (
    Choice("SD 1.5, 512x512", "`-m sd15`", "sd15", 20, 512, None, False),
    Choice("SD 1.5, 4 bits", "`-m sd15 -q 4`", "sd15", 20, 512, "4", False),
    Choice("SDXL, 1024x1024", "`-m sdxl`", "sdxl", 25, 1024, None, False),
    Choice("SDXL, 8 bits", "`-m sdxl -q 8`", "sdxl", 25, 1024, "8", False),
    Choice("SDXL, 4 bits", "`-m sdxl -q 4`", "sdxl", 25, 1024, "4", False),
    Choice("SDXL, 4 bits, low memory", "`-m sdxl -q 4 --low-memory`", "sdxl", 25, 1024, "4", True),
)
GPU = Device("mlx", True, "float16")
NO_ADDITIONS = SimpleNamespace(networks={}, change=lambda name, own: own, work=lambda run: Work())


def working_set(mac: Mac) -> float:
    """Return the bytes that macOS recommends to keep on the GPU at most (reported by others)."""
    return mac.memory * 2**30 * (0.75 if mac.memory > 36 else 2 / 3)


def memory(choice: Choice, most: float) -> int:
    """Return the bytes that a picture takes, with the process around it."""
    source = RandomModel(choice.model)
    latent = choice.size // 8
    bands = band_bytes(
        config(choice.model, "vae"),
        GPU,
        latent,
        latent,
        memory=int(most),
        low_memory=choice.low_memory,
    )
    needed = estimate(
        SimpleNamespace(source=source, additions=NO_ADDITIONS),
        GPU,
        choice.size,
        choice.size,
        batch=2,
        low_memory=choice.low_memory,
        band_bytes=bands,
        recipe=None if choice.recipe is None else find_recipe(choice.recipe),
    )
    return needed.peak + PROCESS


def seconds(choice: Choice, mac: Mac) -> float:
    """Return the time of all steps and the decoder."""
    total = 0.0
    for title, (model, part, latent, size, counted) in gpu_times.COUNTED.items():
        if model != choice.model or "whole" in title:
            continue
        batch, times = (2, choice.steps) if part == "unet" else (1, 1)
        work = operations(config(model, part), latent, latent, batch=batch)
        flop, gigabytes = gpu_times.work_of(work, size, counted, model == "sd15")
        total += times * gpu_times.seconds(flop, gigabytes, mac.peak, mac.bandwidth)
    return total


def rounded(value: float) -> float:
    """Return a number with two digits that count."""
    return float(f"{value:.2g}")


def main() -> None:
    names = " | ".join(mac.name for mac in MACS)
    print(f"| model | options | memory | {names} |")
    print("|---" * (3 + len(MACS)) + "|")
    for choice in CHOICES:
        needs = [memory(choice, working_set(mac)) for mac in MACS]
        cells = []
        for mac, need in zip(MACS, needs, strict=True):
            fits = need <= working_set(mac)
            cells.append(f"{rounded(seconds(choice, mac)):g} s" if fits else "-")
        low, high = min(needs) / 1e9, max(needs) / 1e9
        size = f"{low:.1f} GB" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f} GB"
        print(f"| {choice.title} | {choice.flags} | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
