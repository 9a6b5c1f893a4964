"""Measure how far the variations of a picture show the same things, and whether they are others.

    python judge.py like                     # the table of the README
    python judge.py like --sheet sheet.png   # unpicked pictures, each with four variations

The given pictures are drawn by the script that drew the training's, with another seed. mlxdiff
draws the variations. The checker of the built-in model, which knows no network, compares both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import mlxdiff

try:
    from ..train_builtin import checker, data
    from . import pairs
except ImportError:  # run as a script; pairs puts the folder of the others on the path
    import pairs

    import checker  # isort: skip
    import data  # isort: skip

KEPT = ("background", "count", "color", "shape", "size")
DIFFERENT = 50  # RGB distance from which a pixel is another one, as in the checker


def asked(spec: data.Spec) -> data.Asked:
    """Return what a variation of a picture must show: all but where the things stand."""
    things = tuple((thing.shape, thing.color, thing.size) for thing in spec.things)
    return data.Asked(things, spec.background)


def compare(given: data.Spec, drawn: np.ndarray) -> dict[str, float]:
    """Compare a picture (64, 64, 3) uint8 with the given one.

    Returns: 1 or 0 for each fact of KEPT and for all of them ("right"); the share of "pixels" that
        differ; how far things "moved" on average, in pixels (NaN if the count is wrong).
    """
    verdict, objects = checker.match(checker.look(drawn), asked(given))
    off = np.linalg.norm(drawn.astype(float) - data.render(given), axis=-1)
    steps = [
        data.SIDE * np.hypot(seen.x - thing.x, seen.y - thing.y)
        for seen, thing in zip(objects, given.things, strict=False)
    ]
    return {
        "right": float(verdict.right),
        **{name: float(verdict[name]) for name in KEPT},
        "pixels": float((off > DIFFERENT).mean()),
        "moved": float(np.mean(steps)) if verdict["count"] else float("nan"),
    }


def score(given: Sequence[data.Spec], drawn: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the means over many pictures."""
    rows = [compare(*pair) for pair in zip(given, drawn, strict=True)]
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}


def shown(values: dict[str, float], count: int) -> str:
    error = 100 * (values["right"] * (1 - values["right"]) / count) ** 0.5
    facts = " ".join(f"{name} {100 * values[name]:.1f}" for name in ("right", *KEPT))
    return (
        f"{facts} s.e. {error:.1f}; {100 * values['pixels']:.1f} % other pixels, "
        f"moved by {values['moved']:.1f}, n {count}"
    )


Vary = Callable[[data.Spec, int, int], list[np.ndarray]]


def drawer(model: Path, steps: int, guidance: float | None) -> Vary:
    """Return a function that draws variations: (picture, seed, how many) -> pictures."""
    pipe = mlxdiff.load(model)

    def vary(spec: data.Spec, seed: int, count: int) -> list[np.ndarray]:
        picture = Image.fromarray(data.render(spec))
        told = {"seed": seed, "steps": steps, "guidance": guidance}
        drawn = pipe.generate(image=picture, variations=count, **told)
        return [np.asarray(image) for image in drawn.images]

    return vary


def sheet(path: str, rows: Sequence[Sequence[np.ndarray]], columns: int = 2) -> None:
    """Write rows of pictures at their size: the given one, a gap, its variations."""
    wide, gap = data.SIDE + 4, 8
    width = len(rows[0]) * wide + gap
    down = -(-len(rows) // columns)
    whole = Image.new("RGB", (columns * (width + 2 * gap) - 2 * gap - 4, down * wide - 4), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            x = (i // down) * (width + 2 * gap) + j * wide + (gap if j else 0)
            whole.paste(Image.fromarray(picture), (x, (i % down) * wide))
    whole = whole.resize((whole.width * 3 // 2, whole.height * 3 // 2), Image.Resampling.BICUBIC)
    whole.save(path, optimize=True)


def given_pictures(count: int, things: int, kind: str = "train", seed: int = 79) -> list[data.Spec]:
    """Return pictures that the training did not draw."""
    rng = np.random.default_rng((seed, things, data.KINDS.index(kind)))
    return [data.random_spec(rng, things, kind) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=int, default=128, help="in each row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--sheet", metavar="PNG", help="draw 16 rows instead")
    args = parser.parse_args()
    vary = drawer(args.model, args.steps, args.guidance)
    if args.sheet:
        specs = given_pictures(8, 1) + given_pictures(8, 2)
        sheet(args.sheet, [[data.render(s), *vary(s, 100 * i, 4)] for i, s in enumerate(specs)])
        return
    rng = np.random.default_rng(80)
    for things, kind in ((1, "train"), (2, "train"), (1, "pair"), (2, "pair")):
        given = given_pictures(args.pictures, things, kind)
        rows = {
            "another picture": given_pictures(args.pictures, things, kind, seed=81),
            "a true variation": [pairs.redrawn(spec, rng) for spec in given],
        }
        drawn = {name: [data.render(spec) for spec in specs] for name, specs in rows.items()}
        drawn["the model"] = [vary(spec, seed, 1)[0] for seed, spec in enumerate(given)]
        for name, pictures in drawn.items():
            print(f"{things}, {kind}, {name}: {shown(score(given, pictures), len(given))}")


if __name__ == "__main__":
    main()
