"""Small pictures of single shapes, a folder for each shape: what a new model learns to draw.

    python shapes.py shapes --count 200
    mlxdiff train unconditional shapes -o drawer --classes ...      # see the README
    python shapes.py --judge drawer                                  # the table of the README
    python shapes.py --judge drawer --sheet sheet.png

Drawn by the script of the built-in model's world (examples/train_builtin), 24x24 pixels. Its
checker also judges what the new model draws from noise. Needs mlxdiff only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import mlxdiff

try:
    from ..train_builtin import checker, data
except ImportError:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
    import checker
    import data

SIDE = 24
SHAPES = tuple(sorted(data.SHAPES))
"""In the order of the folders, so the place of a shape is its label."""


def pictures(to: Path, count: int, seed: int) -> None:
    """Write pictures of each shape into a folder of its name."""
    rng = np.random.default_rng(seed)
    for shape in SHAPES:
        (to / shape).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(picture(shape, rng)).save(to / shape / f"{i:04d}.png")


def picture(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a shape in a random color, size and place: (SIDE, SIDE, 3) uint8."""
    color, ground = rng.choice(data.COLORS), rng.choice(data.BACKGROUNDS)
    while color == ground:
        ground = rng.choice(data.BACKGROUNDS)
    r = float(rng.uniform(0.24, 0.36))
    x, y = rng.uniform(r + 0.05, 0.95 - r, 2)
    thing = data.Thing(shape, color, "large", float(x), float(y), r)
    return data.render(data.Spec(ground, (thing,)), SIDE)


def drawn(model: Path, count: int, steps: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Draw each class, with seeds from 0 on."""
    pipe = mlxdiff.load(model)
    for label, shape in enumerate(SHAPES):
        found = pipe.generate(label=label, seed=0, count=count, steps=steps, sampler="ddim")
        yield shape, [np.asarray(one) for one in found.images]


def judge(model: Path, count: int, steps: int) -> None:
    """Print how many pictures show one object, of a known color, and of the class's shape."""
    print(f"| {count} pictures a class, in percent | one object | a known color | the shape |")
    print("|---|---|---|---|")
    for shape, found in drawn(model, count, steps):
        seen = [checker.look(one).objects for one in found]
        ones = [objects[0] for objects in seen if len(objects) == 1]
        shares = (
            len(ones),
            sum(one.color is not None for one in ones),
            sum(one.shape == shape for one in ones),
        )
        print(f"| {shape} | " + " | ".join(f"{100 * n / count:.0f}" for n in shares) + " |")


def sheet(model: Path, to: Path, steps: int) -> None:
    """Draw a line of 12 unpicked pictures for each class, at twice their size."""
    lines = [np.concatenate(found, axis=1) for _, found in drawn(model, 12, steps)]
    whole = Image.fromarray(np.concatenate(lines))
    whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST).save(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("to", type=Path, nargs="?", help="folder for the pictures")
    parser.add_argument("--count", type=int, default=200, help="for each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=Path, metavar="MODEL")
    parser.add_argument("--sheet", type=Path, metavar="PNG")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    args = parser.parse_args()
    if args.judge is None:
        pictures(args.to, args.count, args.seed)
    elif args.sheet is None:
        judge(args.judge, args.count, args.steps)
    else:
        sheet(args.judge, args.sheet, args.steps)


if __name__ == "__main__":
    main()
