"""Name everything in a picture: the judge of the built-in model.

    seen = look(picture)                      # background, objects with color, shape, size, place
    verdict = check(picture, "a small red circle left of a large blue square")
    verdict.right, verdict["shape"]           # all attributes are right; one attribute

Only attributes that the prompt names are judged. Needs NumPy (and Pillow for files). It knows the
colors and shapes of `data.py`, and no model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    from . import data
except ImportError:  # for a script, Python puts this folder on the path
    import data

ATTRIBUTES = ("background", "count", "color", "shape", "size", "place", "relation")

SPECK = 6  # pixels: smaller patches are not objects
SHAPE_MATCH = 0.80  # least overlap (intersection over union) with the ideal shape
FLAT = 60.0  # largest distance (Euclidean, RGB levels) from a color of the palette
LARGE = 0.1725  # radius from which an object is large
CENTER = 0.13  # half-width of the zone that counts as the center
GRID = 24  # shapes are compared on a grid of this size


@dataclass(frozen=True)
class Object:
    """An object in a picture. x, y and r are fractions of the side. `None`: nothing known fits."""

    shape: str | None
    color: str | None
    size: str
    x: float
    y: float
    r: float
    match: float  # overlap with the ideal shape
    mass: tuple[float, float, float]  # x and y of its middle weighted by area, and its area


@dataclass(frozen=True)
class Seen:
    background: str | None
    objects: tuple[Object, ...]


class Verdict(dict):
    """Attribute -> bool for every attribute in the prompt."""

    @property
    def right(self) -> bool:
        return all(self.values())


def _nearest(color: np.ndarray, names) -> str | None:
    distance = {name: float(np.linalg.norm(color - np.array(data.RGB[name]))) for name in names}
    best = min(distance, key=distance.get)
    return best if distance[best] <= FLAT else None


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Split a boolean mask into its connected patches (edges and corners connect)."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = np.pad(labels, 1)
        grown = functools.reduce(
            np.maximum,
            [
                grown[1 + dy : 1 + dy + mask.shape[0], 1 + dx : 1 + dx + mask.shape[1]]
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
            ],
        )
        grown = np.where(mask, grown, 0)
        # jump to the label at the position that the label names: long patches join in few rounds
        flat = np.append(0, grown.ravel())
        grown = flat[grown] if mask.any() else grown
        if np.array_equal(grown, labels):
            break
        labels = grown
    return [labels == label for label in np.unique(labels) if label]


def _resample(alpha: np.ndarray, x0: float, x1: float, y0: float, y1: float) -> np.ndarray:
    """Read the box [x0, x1] x [y0, y1] of an image on a GRID x GRID raster (bilinear)."""
    out = alpha
    for axis, (a, b) in enumerate(((y0, y1), (x0, x1))):
        at = a + (np.arange(GRID) + 0.5) / GRID * (b - a) - 0.5
        at = np.clip(at, 0, out.shape[axis] - 1)
        low = np.minimum(at.astype(int), out.shape[axis] - 2)
        part = (at - low)[:, None] if axis == 0 else (at - low)[None, :]
        out = np.take(out, low, axis) * (1 - part) + np.take(out, low + 1, axis) * part
    return out


def _bounds(alpha: np.ndarray) -> tuple[float, float, float, float]:
    """Return the box of an object to a fraction of a pixel: its profiles cross one half there."""
    box = []
    for axis in (0, 1):
        profile = np.sort(alpha, axis=axis)
        profile = profile[-2:].mean(0) if axis == 0 else profile[:, -2:].mean(1)
        inside = np.flatnonzero(profile >= 0.5)
        a, b = int(inside[0]), int(inside[-1])
        before = profile[a - 1] if a else 0.0
        after = profile[b + 1] if b + 1 < len(profile) else 0.0
        box += [a - min(before, 1.0), b + 1 + min(after, 1.0)]
    return box[0], box[1], box[2], box[3]


@functools.cache
def area_of(shape: str) -> float:
    """Return the area of a shape with r = 1."""
    u = (np.arange(480) + 0.5) / 480 * 2.2 - 1.1
    return float(data.inside(shape, u[None, :], u[:, None]).mean() * 2.2**2)


@functools.cache
def middle_of(shape: str) -> float:
    """Return y of a shape's middle, weighted by area, with r = 1. Its x is 0."""
    u = (np.arange(480) + 0.5) / 480 * 2.2 - 1.1
    inside = data.inside(shape, u[None, :], u[:, None])
    return float((inside * u[:, None]).sum() / inside.sum())


@functools.cache
def _ideal(shape: str, r: float) -> np.ndarray:
    """Draw an ideal shape of radius r (pixels), cut to its bounding box, on the raster."""
    side = max(int(2 * r) + 6, 16)
    thing = data.Thing(shape, "white", "small", 0.5, 0.5, r / side)
    picture = data.render(data.Spec("black", (thing,)), side)[..., 0].astype(np.float64)
    alpha = (picture - picture.min()) / (picture.max() - picture.min())
    return _resample(alpha, *_bounds(alpha))


def _recognize(alpha: np.ndarray, side: int, color: str | None) -> Object:
    x0, x1, y0, y1 = _bounds(alpha)
    seen = _resample(alpha, x0, x1, y0, y1)
    radii = {shape: float(np.sqrt(alpha.sum() / area_of(shape))) for shape in data.SHAPES}
    match = {}
    for shape in data.SHAPES:
        ideal = _ideal(shape, max(round(2 * radii[shape]) / 2, 3.0))
        match[shape] = float(np.minimum(seen, ideal).sum() / np.maximum(seen, ideal).sum())
    best = max(match, key=match.get)
    radius = radii[best] / side
    stretched = not 0.75 <= (x1 - x0) / (y1 - y0) <= 1.33
    shape = None if stretched or match[best] < SHAPE_MATCH else best
    size = "large" if radius >= LARGE else "small"
    x, y = float(x0 + x1) / 2 / side, float(y0 + y1) / 2 / side
    area, at = float(alpha.sum()), (np.arange(side) + 0.5) / side
    mass = float(alpha.sum(0) @ at) / area, float(alpha.sum(1) @ at) / area, area / side**2
    return Object(shape, color, size, x, y, radius, match[best], mass)


def look(picture) -> Seen:
    """Describe a picture: an (H, W, 3) uint8 array, a Pillow image or a file."""
    if isinstance(picture, str | Path):
        from PIL import Image

        picture = Image.open(picture).convert("RGB")
    pixels = np.asarray(picture).astype(np.float64)
    side = pixels.shape[0]
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    sides = np.concatenate([pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(np.concatenate([border, sides]), axis=0)
    objects = []
    for patch in components(np.linalg.norm(pixels - ground, axis=-1) > 50):
        if patch.sum() < SPECK * (side / data.SIDE) ** 2:
            continue
        # the object's color: the pixels furthest from the background
        distance = np.linalg.norm(pixels[patch] - ground, axis=-1)
        core = np.median(pixels[patch][distance >= np.quantile(distance, 0.4)], axis=0)
        axis = core - ground
        alpha = np.clip((pixels - ground) @ axis / (axis @ axis), 0, 1) * _grow(patch)
        if alpha.max() >= 0.5:
            objects.append(_recognize(alpha, side, _nearest(core, data.COLORS)))
    return Seen(_nearest(ground, data.BACKGROUNDS), tuple(objects))


def _grow(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    h, w = mask.shape
    shifts = [padded[dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)]
    return functools.reduce(np.logical_or, shifts)


def _place(thing: Object) -> str:
    dx, dy = thing.x - 0.5, thing.y - 0.5
    if max(abs(dx), abs(dy)) < CENTER:
        return "center"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _relation(a: Object, b: Object) -> str:
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _judge(seen: Seen, asked: data.Asked, objects: list[Object]) -> Verdict:
    """Judge with objects[i] as the i-th object of the prompt."""
    verdict = Verdict()
    if asked.background:
        verdict["background"] = seen.background == asked.background
    verdict["count"] = len(seen.objects) == len(asked.things)
    pairs = list(zip(objects, asked.things, strict=False))
    whole = len(pairs) == len(asked.things)
    verdict["color"] = whole and all(o.color == color for o, (_, color, _) in pairs)
    verdict["shape"] = whole and all(o.shape == shape for o, (shape, _, _) in pairs)
    if any(size for _, _, size in asked.things):
        verdict["size"] = whole and all(size in (None, o.size) for o, (_, _, size) in pairs)
    if asked.place:
        verdict["place"] = whole and _place(objects[0]) == asked.place
    if asked.relation:
        verdict["relation"] = whole and _relation(objects[0], objects[1]) == asked.relation
    return verdict


def match(seen: Seen, asked: data.Asked) -> tuple[Verdict, list[Object]]:
    """Return the verdict, and the objects of the picture in the order of the prompt.

    With two objects, the assignment with more right attributes counts.
    """
    objects = sorted(seen.objects, key=lambda o: -o.r)[: len(asked.things)]
    orders = [objects, objects[::-1]] if len(objects) == 2 else [objects]
    judged = [(_judge(seen, asked, order), order) for order in orders]
    return max(judged, key=lambda pair: sum(pair[0].values()))


def judge(seen: Seen, asked: data.Asked) -> Verdict:
    """Compare the objects in a picture with those of a prompt."""
    return match(seen, asked)[0]


def check(picture, asked: str | data.Spec | data.Asked) -> Verdict:
    """Judge a picture against a prompt, a `Spec` or an `Asked`."""
    if isinstance(asked, str):
        asked = data.parse(asked)
    elif isinstance(asked, data.Spec):
        asked = data.asked_of(asked)
    return judge(look(picture), asked)


def score(pictures, requests) -> dict[str, float]:
    """Return the right fractions over many pictures: 'right' (everything) and each attribute."""
    verdicts = [check(p, r) for p, r in zip(pictures, requests, strict=True)]
    result = {"right": float(np.mean([v.right for v in verdicts]))}
    for attribute in ATTRIBUTES:
        found = [v[attribute] for v in verdicts if attribute in v]
        if found:
            result[attribute] = float(np.mean(found))
    return result


def main() -> None:
    """Score the checker itself on true pictures."""
    rng = np.random.default_rng(12345)
    for count, kind in ((1, "train"), (1, "pair"), (2, "train"), (2, "pair"), (2, "combination")):
        specs = [data.random_spec(rng, count, kind) for _ in range(400)]
        result = score([data.render(s) for s in specs], specs)
        print(count, kind, " ".join(f"{k} {v:.4f}" for k, v in result.items()))


if __name__ == "__main__":
    main()
