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
BATCH = 16  # pictures at once with diffusers
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


Vary = Callable[[Sequence[data.Spec], Sequence[int]], list[np.ndarray]]


def drawer(model: Path, steps: int, guidance: float | None) -> Vary:
    """Return a function that draws a variation of each picture with its seed."""
    pipe = mlxdiff.load(model)

    def vary(specs: Sequence[data.Spec], seeds: Sequence[int]) -> list[np.ndarray]:
        told = {"steps": steps, "guidance": guidance}
        return [
            np.asarray(pipe.generate(image=data.render(spec), seed=seed, **told).images[0])
            for spec, seed in zip(specs, seeds, strict=True)
        ]

    return vary


def torch_drawer(model: Path, steps: int, guidance: float | None) -> Vary:
    """Return the same function of diffusers' pipeline, which draws many at once on a CPU."""
    import torch
    from diffusers import StableDiffusionImageVariationPipeline

    torch.set_num_threads(1)
    pipe = StableDiffusionImageVariationPipeline.from_pretrained(model, safety_checker=None)
    pipe.to(torch.float32).set_progress_bar_config(disable=True)
    if guidance is None:
        guidance = pipe.scheduler.config["_mlxdiff_guidance"]

    def vary(specs: Sequence[data.Spec], seeds: Sequence[int]) -> list[np.ndarray]:
        drawn = []
        for start in range(0, len(specs), BATCH):
            here = slice(start, start + BATCH)
            drawn += pipe(
                [Image.fromarray(data.render(spec)) for spec in specs[here]],
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[here]],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=data.SIDE,
                width=data.SIDE,
            ).images
        return [np.asarray(image) for image in drawn]

    return vary


def sheet(path: str, rows: Sequence[Sequence[np.ndarray]], columns: int = 2) -> None:
    """Write rows of pictures at their size, in 64 colors: the given one, a gap, its variations."""
    wide, gap = data.SIDE + 4, 8
    width = len(rows[0]) * wide + gap
    down = -(-len(rows) // columns)
    whole = Image.new("RGB", (columns * (width + 2 * gap) - 2 * gap - 4, down * wide - 4), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            x = (i // down) * (width + 2 * gap) + j * wide + (gap if j else 0)
            whole.paste(Image.fromarray(picture), (x, (i % down) * wide))
    whole.quantize(64).save(path, optimize=True)


def given_pictures(count: int, things: int, seed: int = 79) -> list[data.Spec]:
    """Return pictures that the training did not draw."""
    rng = np.random.default_rng((seed, things))
    return [data.random_spec(rng, things) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=int, default=128, help="in each row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--sheet", metavar="PNG", help="draw 16 rows instead")
    parser.add_argument("--torch", action="store_true", help="draw with diffusers, many at once")
    args = parser.parse_args()
    vary = (torch_drawer if args.torch else drawer)(args.model, args.steps, args.guidance)
    if args.sheet:
        specs = given_pictures(8, 1) + given_pictures(8, 2)
        drawn = vary([s for s in specs for _ in range(4)], list(range(4 * len(specs))))
        sheet(args.sheet, [[data.render(s), *drawn[4 * i :][:4]] for i, s in enumerate(specs)])
        return
    rng = np.random.default_rng(80)
    for things in (1, 2):
        given = given_pictures(args.pictures, things)
        rows = {
            "another picture": given_pictures(args.pictures, things, seed=81),
            "a true variation": [pairs.redrawn(spec, rng) for spec in given],
        }
        drawn = {name: [data.render(spec) for spec in specs] for name, specs in rows.items()}
        drawn["the model"] = vary(given, list(range(len(given))))
        for name, pictures in drawn.items():
            print(f"{things}, {name}: {shown(score(given, pictures), len(given))}", flush=True)


if __name__ == "__main__":
    main()
