"""Measure an upscaler of the built-in model's pictures against the same pictures drawn large.

    python evaluate.py --upscaler shapes-x4.safetensors

Pictures that training never showed (another seed) are drawn at 64 and at 256 pixels; the small ones
are enlarged four times. Printed is the PSNR, the higher the better, of pixels repeated, of Pillow's
filters and of the network; also for small pictures that went through the built-in VAE. Needs only
mlxdiff.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import mlxdiff

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
import data


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 pictures, in dB."""
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "shapes-x4.safetensors"
    parser.add_argument("--upscaler", default=str(default))
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--backend", default="numpy")
    args = parser.parse_args()
    pipe = mlxdiff.load(backend=args.backend)
    upscaler = mlxdiff.load_upscaler(args.upscaler, backend=args.backend)
    rng = np.random.default_rng(99)
    specs = [data.random_spec(rng, 1 + i % 2) for i in range(args.pictures)]
    large = [data.render(spec, 256) for spec in specs]
    small = [data.render(spec) for spec in specs]
    through = [np.asarray(pipe.decode(pipe.encode_image(one))[0]) for one in small]
    ways = {
        "pixels repeated": lambda x: np.asarray(x).repeat(4, 0).repeat(4, 1),
        "bicubic": lambda x: np.asarray(
            Image.fromarray(x).resize((256, 256), Image.Resampling.BICUBIC)
        ),
        "Lanczos": lambda x: np.asarray(
            Image.fromarray(x).resize((256, 256), Image.Resampling.LANCZOS)
        ),
        "network": lambda x: np.asarray(upscaler.picture(x)),
    }
    print(f"{'PSNR of ' + str(args.pictures) + ' pictures':20} {'drawn':>8} {'VAE':>8}")
    for name, way in ways.items():
        values = [
            np.mean([psnr(way(a), b) for a, b in zip(inputs, large, strict=True)])
            for inputs in (small, through)
        ]
        print(f"{name:20} {values[0]:8.2f} {values[1]:8.2f}")


if __name__ == "__main__":
    main()
