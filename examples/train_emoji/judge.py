"""Measure how often the emoji model draws what its prompts ask for.

    python judge.py                          # true pictures: the judge itself
    python judge.py emoji                    # the shipped model: 440 prompts, each emoji four times
    python judge.py emoji --sheet sheet.png  # 48 unpicked prompts

The judge compares a picture with true pictures of all emoji, at all places and sizes of the
training, on the ground that it sees. The nearest one names the emoji and its place. Right: emoji,
ground and place are those of the prompt. No model is used.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import numpy as np

try:
    from . import world
except ImportError:  # for a script, Python puts this folder on the path
    import world

FAR = 40.0  # levels: pixels that differ more count the same


@dataclass(frozen=True)
class Seen:
    """What a picture shows. `decibels`: its likeness to the true picture."""

    kind: str
    ground: str
    place: str | None
    decibels: float


@functools.cache
def _ground(name: str) -> np.ndarray:
    return world.ground_of(name)


def look_at_ground(picture: np.ndarray) -> str:
    """Return the ground that most of the border shows."""
    border = np.ones(picture.shape[:2], bool)
    border[4:-4, 4:-4] = False
    seen = picture[border].astype(np.float32)

    def distance(name: str) -> float:
        off = np.abs(seen - _ground(name)[border]).mean(-1)
        return float(np.minimum(off, FAR).mean())

    return min(world.GROUNDS, key=distance)


def _draw(ground: str, kind: str, size: int, place: str | None, dx: int, dy: int) -> np.ndarray:
    x, y = world.center_of(place)
    thing = world.Thing(kind, size, int(x - size / 2 + dx), int(y - size / 2 + dy))
    return world.render(world.Spec(ground, (thing,), place))


@functools.lru_cache(maxsize=len(world.GROUNDS))
def _coarse(ground: str) -> tuple[list[tuple[str, str | None]], np.ndarray]:
    """Return every emoji at every place in its middle size, and their pictures."""
    keys, pictures = [], []
    for kind in world.KINDS:
        for place in (None, *world.PLACES):
            size = (world.LARGE if place is None else world.SMALL)[0] + 1
            keys.append((kind, place))
            pictures.append(_draw(ground, kind, size, place, 0, 0))
    return keys, np.stack(pictures)


def _off(pictures: np.ndarray, picture: np.ndarray) -> np.ndarray:
    off = pictures.astype(np.float32) - picture.astype(np.float32)
    return np.square(off).mean((-3, -2, -1))


def look(picture: np.ndarray) -> Seen:
    """Name what a picture (64, 64, 3) uint8 shows."""
    ground = look_at_ground(picture)
    keys, pictures = _coarse(ground)
    errors = _off(pictures, picture)
    best, least = keys[int(errors.argmin())], float(errors.min())
    for i in np.argsort(errors)[:6]:  # the likely ones at all their places
        kind, place = keys[int(i)]
        for size in range(*(world.LARGE if place is None else world.SMALL)):
            for dx in (-1, 0, 1):
                for dy in (-1, 0, 1):
                    error = float(_off(_draw(ground, kind, size, place, dx, dy), picture))
                    if error < least:
                        best, least = keys[int(i)], error
    return Seen(*best[:1], ground, best[1], 10 * np.log10(255**2 / max(least, 1e-3)))


def prompts(count: int, small: bool | None = None) -> list[tuple[str, world.Spec]]:
    """Return fixed prompts that name everything, in varying words; each emoji in turn."""
    rng = np.random.default_rng(78)
    order = [k for _ in range(-(-count // len(world.KINDS))) for k in rng.permutation(world.KINDS)]
    specs = [world.random_spec(rng, small, str(kind)) for kind in order[:count]]
    return [(world.caption(spec, rng, complete=True), spec) for spec in specs]


def short_prompts(count: int) -> list[tuple[str, world.Spec]]:
    """Return fixed prompts that only name an emoji, with and without its article."""
    rng = np.random.default_rng(79)
    order = [k for _ in range(-(-count // len(world.KINDS))) for k in rng.permutation(world.KINDS)]
    found = []
    for i, kind in enumerate(order[:count]):
        name = world.name(str(kind), rng)
        spec = world.random_spec(rng, False, str(kind))
        found.append((name if i % 2 else world.a(name), spec))
    return found


def score(pictures, asked, ground: bool = True) -> dict[str, float]:
    """Return fractions of pictures that are right, whole and by attribute, and mean decibels."""
    rows = []
    for picture, (_, spec) in zip(pictures, asked, strict=True):
        seen = look(np.asarray(picture))
        kind, place = seen.kind == spec.kind, seen.place == spec.place
        on = not ground or seen.ground == spec.ground
        rows.append((kind and place and on, kind, on, place, seen.decibels))
    names = ("right", "emoji", "ground", "place", "decibels")
    return dict(zip(names, np.mean(np.array(rows, float), 0).tolist(), strict=True))


def drawn(
    model: str, asked, steps: int, guidance: float | None, first_seed: int = 0
) -> list[np.ndarray]:
    import mlxdiff

    pipe = mlxdiff.load(model, backend="numpy")
    return [
        np.asarray(pipe.generate(text, seed=seed, steps=steps, guidance=guidance).images[0])
        for seed, (text, _) in enumerate(asked, first_seed)
    ]


def sheet(pictures: list[np.ndarray], texts: list[str], path: str, across: int = 12) -> None:
    """Write a sheet of pictures at twice their size. Print their prompts."""
    from PIL import Image

    for at in range(0, len(texts), across):
        print(" | ".join(texts[at : at + across]))
    side = 2 * world.SIDE
    rows = -(-len(pictures) // across)
    whole = Image.new("RGB", (across * (side + 4) - 4, rows * (side + 4) - 4), "white")
    for i, picture in enumerate(pictures):
        down, right = divmod(i, across)
        large = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
        whole.paste(large, (right * (side + 4), down * (side + 4)))
    whole.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="name or folder; none: true pictures")
    parser.add_argument("--count", type=int, default=4 * len(world.KINDS), help="prompts a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--sheet", metavar="PNG", help="draw 48 unpicked prompts instead")
    args = parser.parse_args()
    if args.sheet:
        asked = prompts(36) + short_prompts(12)
        pictures = drawn(args.model, asked, args.steps, args.guidance)
        sheet(pictures, [text for text, _ in asked], args.sheet)
        return
    rows = {
        "large": prompts(args.count, small=False),
        "small, at a place": prompts(args.count, small=True),
        "only a name": short_prompts(args.count),
    }
    for name, asked in rows.items():
        if args.model:
            pictures = drawn(args.model, asked, args.steps, args.guidance)
        else:
            pictures = [world.render(spec) for _, spec in asked]
        result = score(pictures, asked, ground=name != "only a name")
        error = 100 * (result["right"] * (1 - result["right"]) / len(asked)) ** 0.5
        shown = " ".join(f"{k} {100 * v:.1f}" for k, v in result.items() if k != "decibels")
        print(f"{name}: {shown} s.e. {error:.1f}, {result['decibels']:.1f} dB, n {len(asked)}")


if __name__ == "__main__":
    main()
