"""What the built-in model is taught: a new shape, or a style. Training pictures, and a judge.

    python lessons.py pictures shape TO --count 192     # a folder for `mlxdiff train lora`
    python lessons.py judge shape cross.safetensors     # the table of the README
    python lessons.py sheet shape cross.safetensors --to sheet.png

Pictures and captions are those of the built-in model's world (examples/train_builtin), with one
difference. Lesson "shape" has crosses, a word that the model does not know. Lesson "style" draws
every shape hollow. The judge is the built-in model's own checker, which learns the same difference.
Needs mlxdiff only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

NEW = "cross"
RARE = ("green", "purple")
"""Colors that few crosses of the training pictures have: 7 of 183."""
HOLE = 0.62  # of the style, as a fraction of a shape's size
STEPS, GUIDANCE = 12, 4.0
_FILLED = data.inside
_SHAPES = data.SHAPES


def cross(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return True inside a shape of the world, in which there are crosses."""
    if shape != NEW:
        return _FILLED(shape, u, v)
    near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return (near <= 0.32) & (far <= 0.95)


def hollow(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return True inside the outline of a shape."""
    return _FILLED(shape, u, v) & ~_FILLED(shape, u / HOLE, v / HOLE)


@contextlib.contextmanager
def world(lesson: str) -> Iterator[None]:
    """Draw and judge as in a lesson; "" is the world as it was."""
    drawn = {"shape": cross, "style": hollow, "": _FILLED}[lesson]
    checker.area_of.cache_clear()
    checker.middle_of.cache_clear()
    checker._ideal.cache_clear()
    try:
        data.inside = drawn
        # A hollow circle is a ring, so there are no rings in the lesson of the style.
        hollows = tuple(shape for shape in _SHAPES if shape != "ring")
        data.SHAPES = {"shape": (*_SHAPES, NEW), "style": hollows, "": _SHAPES}[lesson]
        yield
    finally:
        data.inside, data.SHAPES = _FILLED, _SHAPES
        checker.area_of.cache_clear()
        checker.middle_of.cache_clear()
        checker._ideal.cache_clear()


def crosses(rng: np.random.Generator, count: int, colors: tuple[str, ...]) -> data.Spec:
    """Return a picture whose first object is a cross in one of these colors."""
    while True:
        spec = data.random_spec(rng, count)
        first = dataclasses.replace(
            spec.things[0], shape=NEW, color=colors[int(rng.integers(len(colors)))]
        )
        if first.color != spec.background:
            return dataclasses.replace(spec, things=(first, *spec.things[1:]))


def without_cross(rng: np.random.Generator, count: int) -> data.Spec:
    """Return a picture of the world as it was."""
    while True:
        spec = data.random_spec(rng, count)
        if all(thing.shape != NEW for thing in spec.things):
            return spec


def pictures(lesson: str, to: Path, count: int, seed: int) -> None:
    """Write pictures, each with its caption beside it."""
    rng = np.random.default_rng(seed)
    trained = tuple(color for color in data.COLORS if color not in RARE)
    to.mkdir(parents=True, exist_ok=True)
    with world(lesson):
        for i in range(count):
            objects = 2 if rng.random() < 0.4 else 1
            # Every third picture is any of the world: the model is to learn a word, not a habit.
            if lesson == "shape" and i % 3:
                spec = crosses(rng, objects, trained)
            else:
                spec = data.random_spec(rng, objects)
            Image.fromarray(data.render(spec)).save(to / f"{i:04d}.png")
            (to / f"{i:04d}.txt").write_text(data.caption(spec, rng), encoding="utf-8")


def rows(lesson: str, size: int) -> dict[str, list[tuple[str, data.Spec]]]:
    """Return prompts with what they ask for: lists by name, those of the lesson first."""
    rng = np.random.default_rng(99)
    trained = tuple(color for color in data.COLORS if color not in RARE)
    kinds = {
        "shape": {
            "a cross": lambda: crosses(rng, 1, trained),
            "a cross in a color that was rarely shown": lambda: crosses(rng, 1, RARE),
            "a cross and another object": lambda: crosses(rng, 2, trained),
            "other prompts, 1 object": lambda: without_cross(rng, 1),
            "other prompts, 2 objects": lambda: without_cross(rng, 2),
        },
        "style": {
            "1 object": lambda: data.random_spec(rng, 1),
            "1 object, a pair that was never shown": lambda: data.random_spec(rng, 1, "pair"),
            "2 objects": lambda: data.random_spec(rng, 2),
        },
    }[lesson]
    found = {}
    for name, make in kinds.items():
        specs = [make() for _ in range(size)]
        found[name] = [(data.caption(spec, rng, complete=True), spec) for spec in specs]
    return found


def drawn(pipe: mlxdiff.Pipeline, told: list[tuple[str, data.Spec]]) -> list[np.ndarray]:
    """Draw prompts, each with its place as the seed."""
    return [
        np.asarray(pipe.generate(text, seed=i, steps=STEPS, guidance=GUIDANCE).images[0])
        for i, (text, _) in enumerate(told)
    ]


def right(lesson: str, picture: np.ndarray, spec: data.Spec) -> tuple[bool, bool]:
    """Judge a picture: all that the prompt names is right; it follows the lesson.

    In the lesson of the style an object must have one hole. What it encloses is filled, and then
    judged as any object.
    """
    holes = len(spec.things)
    if lesson == "style":
        picture, holes = filled(picture)
    with world("shape" if lesson == "shape" else ""):
        verdict = checker.check(picture, spec)
    learnt = verdict["shape"] if lesson == "shape" else holes == len(spec.things)
    return verdict.right and learnt, learnt


def filled(picture: np.ndarray) -> tuple[np.ndarray, int]:
    """Fill what objects enclose with their color. Return the picture and the number of holes."""
    pixels = picture.astype(np.float64)
    ground = np.median(np.concatenate([pixels[:2], pixels[-2:]]).reshape(-1, 3), axis=0)
    empty = np.linalg.norm(pixels - ground, axis=-1) <= 50
    inside = np.pad(np.zeros_like(empty)[1:-1, 1:-1], 1, constant_values=True)
    holes = [p for p in checker.components(empty) if not (p & inside).any() and p.sum() >= 4]
    found = picture.copy()
    for hole in holes:
        wall = pixels[checker._grow(checker._grow(hole)) & ~empty]
        far = np.linalg.norm(wall - ground, axis=-1)
        # The purest color of the outline: its edges are mixed with the background.
        found[checker._grow(hole)] = np.median(wall[far >= np.quantile(far, 0.7)], axis=0)
    return found, len(holes)


def judge(lesson: str, lora: Path, size: int) -> None:
    """Print the share of right pictures before and after, a line for each row."""
    before, after = mlxdiff.load(), mlxdiff.load(loras=[lora])
    learnt = "shape" if lesson == "shape" else "hollow"
    print(f"| {size} prompts a row, in percent | right before | after | {learnt} before | after |")
    print("|---|---|---|---|---|")
    with world(lesson):
        told = rows(lesson, size)
    for name, row in told.items():
        scores = []
        for pipe in (before, after):
            found = [
                right(lesson, one, spec)
                for one, (_, spec) in zip(drawn(pipe, row), row, strict=True)
            ]
            scores.append(100 * np.mean(found, axis=0))
        cells = [f"{score[i]:.0f}" for i in (0, 1) for score in scores]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def sheet(lesson: str, lora: Path, to: Path) -> None:
    """Draw unpicked prompts without the LoRA (first line) and with it, line by line."""
    pipes = [mlxdiff.load(), mlxdiff.load(loras=[lora])]
    lines = []
    with world(lesson):
        rows_of = rows(lesson, 6)
    for told in rows_of.values():
        print(" / ".join(text for text, _ in told))
        lines += [np.concatenate(drawn(pipe, told), axis=1) for pipe in pipes]
    whole = Image.fromarray(np.concatenate(lines))
    whole = whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST)
    whole.quantize(64).save(to, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("pictures", "judge", "sheet"))
    parser.add_argument("lesson", choices=("shape", "style"))
    parser.add_argument("path", type=Path, help="folder of the pictures, or the LoRA")
    parser.add_argument("--count", type=int, default=192, help="pictures, or prompts a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=Path("sheet.png"))
    args = parser.parse_args()
    if args.what == "pictures":
        pictures(args.lesson, args.path, args.count, args.seed)
    elif args.what == "judge":
        judge(args.lesson, args.path, args.count)
    else:
        sheet(args.lesson, args.path, args.to)


if __name__ == "__main__":
    main()
