"""Small pictures of digits, a folder for each: what a new model learns to draw from noise.

    python digits.py digits                          # 600 pictures
    mlxdiff train unconditional digits -o drawer --classes ...      # see the README
    python digits.py --judge drawer                  # the table of the README
    python digits.py --judge drawer --sheet sheet.png

A picture has 8x8 pixels: a digit of 5x7 in one of two inks, anywhere on white paper. The judge
finds the digit whose picture is nearest. Needs mlxdiff only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import mlxdiff

SIDE = 8
PAPER = (250, 250, 250)
INKS = {"black": (20, 20, 20), "red": (210, 30, 40)}
FONT = """
01110 00100 01110 01110 00010 11111 00110 11111 01110 01110
10001 01100 10001 10001 00110 10000 01000 00001 10001 10001
10011 00100 00001 00001 01010 11110 10000 00010 10001 10001
10101 00100 00010 00110 10010 00001 11110 00100 01110 01111
11001 00100 00100 00001 11111 00001 10001 01000 10001 00001
10001 00100 01000 10001 00010 10001 10001 01000 10001 00010
01110 01110 11111 01110 00010 01110 01110 01000 01110 01100
"""
"""Lines of the digits 0 to 9, side by side."""
GLYPHS = [
    np.array([[int(bit) for bit in line.split()[digit]] for line in FONT.strip().split("\n")], bool)
    for digit in range(10)
]
PLACES = [(x, y) for y in range(SIDE - 6) for x in range(SIDE - 4)]
"""Where the upper left corner of a digit can be."""


def picture(digit: int, ink: str, place: tuple[int, int]) -> np.ndarray:
    """Draw a digit: (8, 8, 3) uint8."""
    found = np.full((SIDE, SIDE, 3), PAPER, np.uint8)
    x, y = place
    found[y : y + 7, x : x + 5][GLYPHS[digit]] = INKS[ink]
    return found


def pictures(to: Path, count: int, seed: int) -> None:
    """Write pictures of each digit into a folder of its name."""
    rng = np.random.default_rng(seed)
    for digit in range(10):
        (to / str(digit)).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            ink, place = rng.choice(list(INKS)), PLACES[int(rng.integers(len(PLACES)))]
            Image.fromarray(picture(digit, ink, place)).save(to / str(digit) / f"{i:03d}.png")


def read(drawn: np.ndarray) -> tuple[int, float]:
    """Return the digit whose picture is nearest, and the mean distance of a value (of 255)."""
    best = (0, 256.0)
    for digit in range(10):
        for ink in INKS:
            for place in PLACES:
                far = np.abs(picture(digit, ink, place).astype(float) - drawn).mean()
                best = min(best, (digit, float(far)), key=lambda pair: pair[1])
    return best


def drawings(model: Path, count: int, steps: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Draw each digit, with seeds from 0 on."""
    pipe = mlxdiff.load(model)
    for digit in range(10):
        found = pipe.generate(label=digit, seed=100 * digit, count=count, steps=steps)
        yield digit, [np.asarray(one) for one in found.images]


def judge(model: Path, count: int, steps: int) -> None:
    """Print how many pictures are the digit that was asked for, and how exact they are."""
    right, far = [], []
    for digit, found in drawings(model, count, steps):
        seen = [read(one) for one in found]
        right.append(np.mean([one == digit for one, _ in seen]))
        far += [distance for _, distance in seen]
        print(f"{digit}: {100 * right[-1]:.0f} % of {count}", flush=True)
    print(
        f"all: {100 * np.mean(right):.0f} %; mean distance from a true picture {np.mean(far):.1f}"
    )


def sheet(model: Path, to: Path, steps: int) -> None:
    """Draw a line of 16 unpicked pictures for each digit, at five times their size."""
    border = ((1, 1), (1, 1), (0, 0))
    lines = [
        np.concatenate([np.pad(one, border, constant_values=200) for one in found], axis=1)
        for _, found in drawings(model, 16, steps)
    ]
    whole = Image.fromarray(np.concatenate(lines))
    whole = whole.resize((5 * whole.width, 5 * whole.height), Image.Resampling.NEAREST)
    whole.quantize(64).save(to, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("to", type=Path, nargs="?", help="folder for the pictures")
    parser.add_argument("--count", type=int, default=60, help="pictures of each digit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=Path, metavar="MODEL")
    parser.add_argument("--sheet", type=Path, metavar="PNG")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    args = parser.parse_args()
    if args.judge is None:
        pictures(args.to, args.count, args.seed)
    elif args.sheet is None:
        judge(args.judge, args.count, args.steps)
    else:
        sheet(args.judge, args.sheet, args.steps)


if __name__ == "__main__":
    main()
