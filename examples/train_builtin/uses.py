"""Measure uses of the built-in model beyond a prompt, with the same checker.

    python uses.py                    # the built-in model; or MODEL, a converted folder
    python uses.py --prompts 64 --uses negative image

- negative: the prompt leaves the color open. The color of the picture becomes the negative prompt,
  and should not occur again.
- image: the run starts from a true picture, and the prompt names other colors. A right picture
  matches the prompt, with every object in its old place.
- inpaint: the same, but only the first object is masked (a box) and becomes another one.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np

try:
    from . import checker, data
    from .evaluate import error_of
except ImportError:  # for a script, Python puts this folder on the path
    import checker
    import data
    from evaluate import error_of

NEAR = 0.05  # fraction of the side within which an object counts as unmoved
BOX = 1.35  # half-width of a mask, in radii

Draw = Callable[..., np.ndarray]
"""A function from a prompt, a seed and options of `generate` to a picture, (H, W, 3) uint8."""


def through_mlxdiff(folder: str | None, steps: int, guidance: float, **load) -> Draw:
    """Draw with this package."""
    import mlxdiff

    pipe = mlxdiff.load(folder, **load)

    def draw(prompt: str, seed: int, **arguments) -> np.ndarray:
        given = {"steps": steps, "guidance": guidance} | arguments
        return np.asarray(pipe.generate(prompt, seed=seed, **given).images[0])

    return draw


def negative(draw: Draw, size: int) -> None:
    """Print how often a picture keeps its color when that color is the negative prompt."""
    rng, shown, still = np.random.default_rng(91), 0, 0
    for seed in range(size):
        spec = data.random_spec(rng)
        thing = spec.things[0]
        prompt = f"a {thing.size} {thing.shape} on a {spec.background} background"
        colors = {thing.color for thing in checker.look(draw(prompt, seed)).objects} - {None}
        if not colors:
            continue
        color = min(colors)
        seen = checker.look(draw(prompt, seed, negative_prompt=color))
        shown, still = shown + 1, still + any(thing.color == color for thing in seen.objects)
    result = f"{100 * still / shown:.1f} ± {error_of(still / shown, shown):.1f}"
    print(f"| color still there as the negative prompt, of {shown} | {result} |", flush=True)


def changed(rng: np.random.Generator, count: int, shapes: bool) -> tuple[data.Spec, data.Spec]:
    """Return a picture, and one with another color (and shape) for its first object, or for all."""
    while True:
        spec = data.random_spec(rng, count)
        things = list(spec.things)
        for i in range(1 if shapes else count):
            other = data.random_spec(rng).things[0]
            more = {"shape": other.shape} if shapes else {}
            things[i] = dataclasses.replace(things[i], color=other.color, **more)
        goal = dataclasses.replace(spec, things=tuple(things))
        if (
            all(
                new.color not in (spec.background, old.color)
                for old, new in zip(spec.things, goal.things, strict=True)
                if old != new
            )
            and goal.things[0] != spec.things[0]
        ):
            return spec, goal


def stays(picture: np.ndarray, spec: data.Spec) -> bool:
    """Return True if there is an object near each place of the spec."""
    objects = checker.look(picture).objects
    return all(any(np.hypot(o.x - t.x, o.y - t.y) < NEAR for o in objects) for t in spec.things)


def image(draw: Draw, size: int, strength: float = 0.8) -> None:
    """Print how often img2img recolors the objects of a picture in place."""
    for count in (1, 2):
        rng, right = np.random.default_rng((92, count)), 0
        for seed in range(size):
            spec, goal = changed(rng, count, shapes=False)
            prompt = data.caption(goal, rng, True)
            picture = draw(prompt, seed, image=data.render(spec), strength=strength)
            right += checker.check(picture, goal).right and stays(picture, goal)
        result = f"{100 * right / size:.1f} ± {error_of(right / size, size):.1f}"
        print(f"| img2img, strength {strength:g}, {count} recolored | {result} |", flush=True)


def box(thing: data.Thing) -> np.ndarray:
    """Return a mask (H, W) uint8: white at the thing and in a small margin around it."""
    at = (np.arange(data.SIDE) + 0.5) / data.SIDE
    x, y = (np.abs(at - c) <= BOX * thing.r for c in (thing.x, thing.y))
    return (255 * (y[:, None] & x[None, :])).astype(np.uint8)


def inpaint(draw: Draw, size: int) -> None:
    """Print how often a masked object becomes the object of the prompt while the other stays."""
    rng, right = np.random.default_rng(93), 0
    for seed in range(size):
        spec, goal = changed(rng, 2, shapes=True)
        prompt = data.caption(goal, rng, True)
        mask = box(spec.things[0])
        picture = draw(prompt, seed, image=data.render(spec), mask=mask)
        right += checker.check(picture, goal).right and stays(picture, goal)
    result = f"{100 * right / size:.1f} ± {error_of(right / size, size):.1f}"
    print(f"| inpainting, 1 of 2 becomes another | {result} |", flush=True)


USES = {"negative": negative, "image": image, "inpaint": inpaint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a converted folder (default: the built-in model)")
    parser.add_argument("--uses", nargs="+", choices=USES, default=list(USES))
    parser.add_argument("--prompts", type=int, default=256, help="for each line")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--backend", default="numpy")
    args = parser.parse_args()
    draw = through_mlxdiff(args.model, args.steps, args.guidance, backend=args.backend)
    print(f"| {args.prompts} pictures a line | percent |\n|---|---|", flush=True)
    for use in args.uses:
        USES[use](draw, args.prompts)


if __name__ == "__main__":
    main()
