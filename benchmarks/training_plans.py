"""Print memory and time of LoRA training on Macs, computed from counted work. Nothing is measured.

    python benchmarks/training_plans.py

Memory is that of mlxdiff.training.plan: frozen weights as stored, activations in half precision.
Time is arithmetic at 60 % of the peak in float32 (benchmarks/gpu_times.py): a forward pass, the
gradient of each input, and with checkpointing the forward pass again.
"""

from __future__ import annotations

from gpu_times import GPUS
from random_model import config

from mlxdiff.networks.cost import operations
from mlxdiff.networks.params import expected_parameters
from mlxdiff.training.plan import activation_bytes

# Title, model, side of the latents, bits of a frozen weight, checkpointing.
CASES = (
    ("SD 1.5, 512x512", "sd15", 64, 16.0, False),
    ("SD 1.5, 512x512, checkpointing", "sd15", 64, 16.0, True),
    ("SDXL, 1024x1024, checkpointing", "sdxl", 128, 16.0, True),
    ("SDXL, 1024x1024, -q 4, checkpointing", "sdxl", 128, 4.5, True),
    ("SDXL, 512x512, -q 4, checkpointing", "sdxl", 64, 4.5, True),
)


def main() -> None:
    print(f"| rank 8, batch 1 | memory | TFLOP | {' | '.join(GPUS)} |")
    print("|---" * (3 + len(GPUS)) + "|")
    for title, model, side, bits, again in CASES:
        unet = config(model, "unet")
        sizes = expected_parameters(unet).values()
        weights = 0.0
        for shape in sizes:
            count = 1
            for length in shape:
                count *= length
            weights += count * bits / 8
        memory = weights + activation_bytes(unet, (1, side, side, 4), 2, again)
        macs = sum(op.macs for op in operations(unet, side, side))
        flop = 2 * macs * (3 if again else 2) / 1e12
        times = " | ".join(f"{flop / (0.6 * peak):.2g} s" for peak, _ in GPUS.values())
        print(f"| {title} | {memory / 1e9:.1f} GB | {flop:.1f} | {times} |")


if __name__ == "__main__":
    main()
