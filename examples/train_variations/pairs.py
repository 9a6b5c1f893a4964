"""Pairs of pictures that show the same: what a variation is in the built-in model's world.

A variation has the same things (shape, color, size) on the same background. Where they stand, and
which of two is left or above, is drawn anew. Needs NumPy only.
"""

from __future__ import annotations

import dataclasses

import numpy as np

try:
    from ..train_builtin import data
except ImportError:  # run as a script
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
    import data

THING = (data.SHAPES, data.COLORS, data.SIZES)
NAMES = ("shape", "color", "size")
PATCH = 8  # pixels: side of the patches that the image encoder reads


def redrawn(spec: data.Spec, rng: np.random.Generator) -> data.Spec:
    """Return the same things on the same background, placed anew."""
    while True:
        like = data.random_spec(rng, len(spec.things))
        things = [spec.things[i] for i in rng.permutation(len(spec.things))]
        if [thing.size for thing in things] == [thing.size for thing in like.things]:
            break
    placed = tuple(
        dataclasses.replace(place, shape=thing.shape, color=thing.color)
        for place, thing in zip(like.things, things, strict=True)
    )
    return dataclasses.replace(like, background=spec.background, things=placed)


def facts(spec: data.Spec) -> tuple[int, list[list[int]]]:
    """Return what a variation keeps, as numbers: the background; shape, color, size of things."""
    things = [
        [words.index(getattr(thing, name)) for words, name in zip(THING, NAMES, strict=True)]
        for thing in spec.things
    ]
    return data.BACKGROUNDS.index(spec.background), things


def patches(spec: data.Spec) -> np.ndarray:
    """Return the number of the thing on each patch of a picture, row by row, or -1: (64,)."""
    middles = (np.arange(0, data.SIDE, PATCH) + PATCH / 2) / data.SIDE
    found = np.full((len(middles), len(middles)), -1)
    for i, thing in enumerate(spec.things):
        near = [np.abs(middles - at) < thing.r + 0.02 for at in (thing.x, thing.y)]
        found[near[1][:, None] & near[0][None, :]] = i
    return found.ravel()


def random_specs(rng: np.random.Generator, count: int, two: float = 0.6) -> list[data.Spec]:
    """Return pictures, most of them with two things (the harder ones)."""
    return [data.random_spec(rng, 1 + int(rng.random() < two)) for _ in range(count)]
