"""Draw what a noise schedule does to a picture: the forward process of three schedules.

    python benchmarks/forward_process.py docs/forward_process.png

At the top a picture as training sees it, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, at nine
timesteps of each schedule, with the same noise. Below, what is left of the picture (sqrt(a_t)) and
the ratio of signal to noise, over the timestep. Needs NumPy and Pillow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlxdiff.noise import Generator
from mlxdiff.samplers import forward_process

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.train_builtin import data

SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
"""Ho et al. 2020, Stable Diffusion, and Nichol and Dhariwal 2021."""
COLORS = {"linear": (200, 60, 40), "scaled linear": (40, 90, 200), "cosine": (30, 140, 70)}
TIMESTEPS = (0, 125, 250, 375, 500, 625, 750, 875, 999)
SIDE, LEFT, TOP, GAP = 96, 118, 30, 6
INK, GREY = (30, 30, 30), (205, 205, 205)
FONT = ImageFont.load_default(13)


def signal(config: dict[str, object]) -> np.ndarray:
    """Return a_t of every timestep: (T,) float64."""
    return forward_process({"_class_name": "DDPMScheduler", **config}).astype(np.float64)


def picture() -> np.ndarray:
    """Draw x_0: float32 (H, W, 3) in [-1, 1]."""
    things = (
        data.Thing("circle", "red", "small", 0.28, 0.52, 0.17),
        data.Thing("star", "blue", "large", 0.70, 0.48, 0.25),
    )
    spec = data.Spec("yellow", things, "left of")
    return data.render(spec, SIDE).astype(np.float32) / 127.5 - 1


def noised(x: np.ndarray, a: float, noise: np.ndarray) -> Image.Image:
    """Return x_t as a picture; values beyond black and white are cut."""
    values = np.sqrt(a) * x + np.sqrt(1 - a) * noise
    return Image.fromarray(((values + 1) * 127.5).round().clip(0, 255).astype(np.uint8))


def axes(
    pen: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    title: str,
    ticks: dict[float, str],
) -> None:
    """Draw a frame with its title and its ticks: height in the frame (0 to 1) -> label."""
    left, top, right, bottom = box
    pen.text((left, top - 22), title, INK, FONT)
    for share, label in ticks.items():
        y = bottom - share * (bottom - top)
        pen.line((left, y, right, y), GREY)
        pen.text((left - 6, y), label, INK, FONT, anchor="rm")
    for t in range(0, 1001, 250):
        x = left + t / 1000 * (right - left)
        pen.line((x, top, x, bottom), GREY)
        pen.text((x, bottom + 5), str(t), INK, FONT, anchor="ma")
    pen.rectangle(box, outline=INK)


def curve(
    pen: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    shares: np.ndarray,
    color: tuple[int, int, int],
) -> None:
    """Draw heights in a frame (0 to 1) over the timestep. Beyond the frame nothing is drawn."""
    left, top, right, bottom = box
    xs = left + np.arange(len(shares)) / len(shares) * (right - left)
    ys = bottom - shares * (bottom - top)
    inside = (shares >= 0) & (shares <= 1)
    pen.line([(x, y) for x, y, i in zip(xs, ys, inside, strict=True) if i], color, 3, "curve")


def draw() -> Image.Image:
    """Draw the strips and the plots."""
    x = picture()
    noise = np.moveaxis(Generator(0).randn((3, SIDE, SIDE)), 0, -1)
    width = LEFT + len(TIMESTEPS) * (SIDE + GAP) + 6
    strips = TOP + len(SCHEDULES) * (SIDE + GAP)
    sheet = Image.new("RGB", (width, strips + 300), "white")
    pen = ImageDraw.Draw(sheet)
    for column, t in enumerate(TIMESTEPS):
        middle = LEFT + column * (SIDE + GAP) + SIDE // 2
        pen.text((middle, TOP - 8), f"t = {t}", INK, FONT, anchor="ms")
    half = (width - LEFT) // 2
    share = (LEFT, strips + 38, LEFT + half - 60, strips + 270)
    snr = (LEFT + half + 20, strips + 38, width - 20, strips + 270)
    axes(pen, share, "left of the picture: sqrt(a_t)", {i / 4: f"{i / 4:g}" for i in range(5)})
    decades = {(e + 5) / 9: f"1e{e}" for e in (-4, -2, 0, 2, 4)}
    axes(pen, snr, "signal to noise: a_t / (1 - a_t)", decades)
    for row, (name, config) in enumerate(SCHEDULES.items()):
        a = signal(config)
        y = TOP + row * (SIDE + GAP)
        pen.text((LEFT - 10, y + SIDE // 2), name, COLORS[name], FONT, anchor="rm")
        for column, t in enumerate(TIMESTEPS):
            sheet.paste(noised(x, a[t], noise), (LEFT + column * (SIDE + GAP), y))
        curve(pen, share, np.sqrt(a), COLORS[name])
        curve(pen, snr, (np.log10(a / (1 - a)) + 5) / 9, COLORS[name])
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("to", type=Path, help="PNG to write")
    args = parser.parse_args()
    draw().quantize(128).save(args.to, optimize=True)
    print("| left of the picture, sqrt(a_t) | " + " | ".join(f"t = {t}" for t in TIMESTEPS) + " |")
    print("|---|" + "---|" * len(TIMESTEPS))
    for name, config in SCHEDULES.items():
        kept = np.sqrt(signal(config))
        print(f"| {name} | " + " | ".join(f"{kept[t]:.3f}" for t in TIMESTEPS) + " |")


if __name__ == "__main__":
    main()
