"""Print memory and time of LoRA training and distillation on Macs, from counted work.

    python benchmarks/training_plans.py

Nothing is measured. Memory is that of mlxdiff.training.plan: frozen weights as stored, activations
in half precision.
Time is arithmetic at 60 % of the peak in float32 (benchmarks/gpu_times.py): a forward pass, the
gradient of each input, and with checkpointing the forward pass again. Distillation adds three
forward passes: two of the teacher, one of the target.
"""

from __future__ import annotations

import math
from typing import Any

from gpu_times import GPUS
from random_model import config

from mlxdiff.networks.cost import operations
from mlxdiff.networks.params import expected_parameters
from mlxdiff.training.lora import chosen
from mlxdiff.training.plan import activation_bytes

# Title, model, side of the latents, bits of a frozen weight, checkpointing.
CASES = (
    ("SD 1.5, 512x512", "sd15", 64, 16.0, False),
    ("SD 1.5, 512x512, checkpointing", "sd15", 64, 16.0, True),
    ("SDXL, 1024x1024, checkpointing", "sdxl", 128, 16.0, True),
    ("SDXL, 1024x1024, -q 4, checkpointing", "sdxl", 128, 4.5, True),
    ("SDXL, 512x512, -q 4, checkpointing", "sdxl", 64, 4.5, True),
)


DISTILLED = (
    ("SD 1.5, 512x512", "sd15", 64, 16.0, False),
    ("SD 1.5, 512x512, checkpointing", "sd15", 64, 16.0, True),
    ("SDXL, 1024x1024, checkpointing", "sdxl", 128, 16.0, True),
    ("SDXL, 1024x1024, -q 4, checkpointing", "sdxl", 128, 4.5, True),
)
RANK, TARGETS, UPDATES, SAMPLES = 64, "all", 1000, 16  # of LCM-LoRA; samples of an update


def frozen(unet: Any, bits: float) -> float:
    """Return the bytes of a U-Net's weights."""
    return sum(math.prod(shape) for shape in expected_parameters(unet).values()) * bits / 8


def adapters(unet: Any, rank: int, targets: str) -> int:
    """Return the values of a LoRA."""
    shapes = expected_parameters(unet)
    sides = (shapes[f"{name}.weight"] for name in chosen(shapes, targets))
    return sum(rank * (out + math.prod(inner)) for out, *inner in sides)


def distillation() -> None:
    print(f"| rank {RANK}, batch 1 | memory | TFLOP | {' | '.join(GPUS)} |")
    print("|---" * (3 + len(GPUS)) + "|")
    for title, model, side, bits, again in DISTILLED:
        unet = config(model, "unet")
        states = 16 * adapters(unet, RANK, TARGETS)  # weights, gradients, two of AdamW's
        memory = frozen(unet, bits) + states
        memory += activation_bytes(unet, (1, side, side, 4), 2, again)
        macs = sum(op.macs for op in operations(unet, side, side))
        flop = 2 * macs * (6 if again else 5) / 1e12
        hours = [flop / (0.6 * peak) * UPDATES * SAMPLES / 3600 for peak, _ in GPUS.values()]
        times = " | ".join(f"{one:.3g} h" for one in hours)
        print(f"| {title} | {memory / 1e9:.1f} GB | {flop:.1f} | {times} |")


def main() -> None:
    print(f"| rank 8, batch 1 | memory | TFLOP | {' | '.join(GPUS)} |")
    print("|---" * (3 + len(GPUS)) + "|")
    for title, model, side, bits, again in CASES:
        unet = config(model, "unet")
        memory = frozen(unet, bits) + activation_bytes(unet, (1, side, side, 4), 2, again)
        macs = sum(op.macs for op in operations(unet, side, side))
        flop = 2 * macs * (3 if again else 2) / 1e12
        times = " | ".join(f"{flop / (0.6 * peak):.2g} s" for peak, _ in GPUS.values())
        print(f"| {title} | {memory / 1e9:.1f} GB | {flop:.1f} | {times} |")
    print(f"\nDistillation: {UPDATES} updates of {SAMPLES} samples")
    distillation()


if __name__ == "__main__":
    main()
