"""The world of the motion module: shapes that move to the place that their caption names, or grow.

A video of the built-in model's world (../train_builtin/data.py). Its caption is that of its last
frame: "a small red circle on the left" begins on the right and moves to the left. In the center a
large shape grows and a small one shrinks.

Needs NumPy only.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
import data

FRAMES = 8
KINDS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks")
PLACES = {"left": 0, "right": 1, "top": 2, "bottom": 3}


def kind_of(spec: data.Spec) -> str:
    """What the video does that ends with this picture."""
    (thing,) = spec.things
    if spec.place == "center":
        return "grows" if thing.size == "large" else "shrinks"
    return KINDS[PLACES[spec.place]]


def random_video(
    rng: np.random.Generator, frames: int = FRAMES
) -> tuple[data.Spec, list[data.Spec]]:
    """A picture, and the pictures of the video that ends with it; each kind is as likely."""
    kind, spec = KINDS[rng.integers(len(KINDS))], data.random_spec(rng)
    while kind_of(spec) != kind:
        spec = data.random_spec(rng)
    return spec, [at(spec, i / (frames - 1)) for i in range(frames)]


def at(spec: data.Spec, share: float) -> data.Spec:
    """The picture at this share of the video, 0 to 1."""
    (thing,) = spec.things
    if spec.place == "center":
        other = data.RADII["small" if thing.size == "large" else "large"]
        begin = replace(thing, r=float(np.mean(other)))
    elif spec.place in ("left", "right"):
        begin = replace(thing, x=1 - thing.x)
    else:
        begin = replace(thing, y=1 - thing.y)
    now = {
        name: (1 - share) * getattr(begin, name) + share * getattr(thing, name) for name in "xyr"
    }
    return replace(spec, things=(replace(thing, **now),))


def render(specs: list[data.Spec]) -> np.ndarray:
    """Draw a video: (F, 64, 64, 3) uint8."""
    return np.stack([data.render(spec) for spec in specs])
