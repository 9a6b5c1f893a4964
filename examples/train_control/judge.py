"""Measure how well an edge ControlNet makes the built-in model follow a picture's edges.

    python judge.py edges                     # the table of the README
    python judge.py edges --sheet sheet.png   # its first pictures

The edges come from true pictures outside the training set. The prompt names other colors. mlxdiff
draws the pictures. They are judged without any network: by their edges, by the areas of their
objects, and by the built-in model's own checker.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import mlxdiff
from mlxdiff.pictures.preprocess import edges

try:
    from ..train_builtin import checker, data
except ImportError:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
    import checker
    import data

NEAR = 1  # distance in pixels, with corners, within which an edge counts as found


@dataclasses.dataclass(frozen=True)
class Task:
    """A true picture, the new colors of its prompt, and the words for them."""

    spec: data.Spec
    asked: data.Spec
    prompt: str

    @property
    def picture(self) -> np.ndarray:
        return data.render(self.spec)


def otherwise(spec: data.Spec, rng: np.random.Generator) -> data.Spec:
    """Return the same colors and places with other shapes and sizes."""
    things = []
    for thing in spec.things:
        shape = rng.choice([shape for shape in data.SHAPES if shape != thing.shape])
        things.append(dataclasses.replace(thing, shape=shape, size=rng.choice(data.SIZES)))
    return dataclasses.replace(spec, things=tuple(things))


def recolored(spec: data.Spec, rng: np.random.Generator) -> data.Spec:
    """Return the same shapes and places with all colors changed."""
    while True:
        like = data.random_spec(rng, len(spec.things))
        pairs = list(zip(spec.things, like.things, strict=True))
        if like.background != spec.background and all(a.color != b.color for a, b in pairs):
            things = tuple(dataclasses.replace(a, color=b.color) for a, b in pairs)
            return dataclasses.replace(spec, background=like.background, things=things)


def tasks(count: int, seed: int = 77) -> list[Task]:
    """Yield tasks with one object and with two objects in turn."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        spec = data.random_spec(rng, 1 + i % 2)
        asked = recolored(spec, rng)
        found.append(Task(spec, asked, data.caption(asked, rng, complete=True)))
    return found


def follows(drawn: np.ndarray, picture: np.ndarray) -> dict[str, float]:
    """Measure how well `drawn` follows the edges of `picture`, both uint8 (H, W, 3), as fractions.

    Returns: the found edges of the picture; the drawn edges that belong to it; the overlap
        (intersection over union) of the areas of the objects.
    """
    wanted, got = edges(picture)[..., 0] > 0, edges(drawn)[..., 0] > 0
    there, seen = _covered(picture), _covered(drawn)
    return {
        "edges found": float((wanted & _grown(got)).sum() / wanted.sum()),
        "edges that belong": float((got & _grown(wanted)).sum() / max(got.sum(), 1)),
        "overlap": float((there & seen).sum() / (there | seen).sum()),
    }


def _grown(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    padded, around = np.pad(mask, NEAR), range(2 * NEAR + 1)
    return np.any([padded[y : y + height, x : x + width] for y in around for x in around], axis=0)


def _covered(picture: np.ndarray) -> np.ndarray:
    """Return the area of the objects: all pixels that do not have the border's color."""
    pixels = picture.astype(np.float64)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    return np.linalg.norm(pixels - np.median(border, axis=0), axis=-1) > 50


def score(pictures: Sequence[np.ndarray], told: Sequence[Task]) -> dict[str, float]:
    """Return the means over all pictures: edges, overlap, and the checker's results."""
    pairs = list(zip(pictures, told, strict=True))
    followed = [follows(drawn, task.picture) for drawn, task in pairs]
    values = {name: float(np.mean([f[name] for f in followed])) for name in followed[0]}
    verdicts = [checker.check(drawn, task.asked) for drawn, task in pairs]
    for name in ("background", "color", "shape"):
        values[name] = float(np.mean([verdict[name] for verdict in verdicts]))
    return values


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in values.items())


Generate = Callable[[str, np.ndarray], np.ndarray]


def generator(controlnet: Path | None, steps: int, guidance: float) -> Generate:
    """Return a function that draws a prompt along a picture's edges, or freely without a net."""
    pipe = mlxdiff.load(controlnets=[controlnet] if controlnet else [])

    def generate(prompt: str, picture: np.ndarray) -> np.ndarray:
        along = {"control_image": Image.fromarray(picture), "control_preprocess": "edges"}
        told = {"steps": steps, "guidance": guidance, "seed": 1} | (along if controlnet else {})
        return np.asarray(pipe.generate(prompt, **told).images[0])

    return generate


def sheet(path: str, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Draw rows of pictures at twice their size."""
    picture = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("controlnet", type=Path)
    parser.add_argument("--pictures", type=int, default=64, help="in each row")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=4)
    parser.add_argument("--sheet", metavar="PNG", help="draw the first 8 instead")
    args = parser.parse_args()
    free = generator(None, args.steps, args.guidance)
    along = generator(args.controlnet, args.steps, args.guidance)
    told = tasks(8 if args.sheet else args.pictures)
    rng = np.random.default_rng(78)
    given, prompts = [task.picture for task in told], [task.prompt for task in told]
    others = [data.caption(otherwise(task.asked, rng), rng, complete=True) for task in told]
    rows = {
        "without the ControlNet": [free(*pair) for pair in zip(prompts, given, strict=True)],
        "the prompt": [along(*pair) for pair in zip(prompts, given, strict=True)],
        "other shapes in it": [
            along(o, task.picture) for o, task in zip(others, told, strict=True)
        ],
    }
    if args.sheet:
        sheet(args.sheet, [given, [edges(picture) for picture in given], *rows.values()])
        for pair in zip(prompts, others, strict=True):
            print(" / ".join(pair))
    else:
        rows["no prompt"] = [along("", picture) for picture in given]
        for name, drawn in rows.items():
            print(f"{name}: {shown(score(drawn, told))}", flush=True)


if __name__ == "__main__":
    main()
