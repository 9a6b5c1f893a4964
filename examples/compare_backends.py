"""Draw the same seed on both backends and print the difference of the pictures."""

import numpy as np

import mlxdiff

PROMPT = "a small green triangle above a large purple square"
pictures = {}
for backend in ("numpy", "mlx"):
    try:
        pipe = mlxdiff.load(backend=backend, dtype="float32")
    except mlxdiff.UsageError as error:  # no MLX on this machine
        print(f"{backend}: {error}")
        continue
    result = pipe.generate(PROMPT, seed=3, steps=10, guidance=4)
    pictures[backend] = np.asarray(result.images[0], dtype=np.int16)
    print(f"{backend}: {sum(result.timings['steps']):.2f} s in the U-Net")

if len(pictures) == 2:
    difference = np.abs(pictures["numpy"] - pictures["mlx"])
    print(f"largest difference {difference.max()} of 255, mean {difference.mean():.4f}")
