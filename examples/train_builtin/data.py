"""The world of the built-in model: pictures drawn by a script, and captions that describe them.

A picture is a plain background with one object, or with two objects and a relation between them. A
`Spec` describes a picture completely. `render` draws it. `caption` describes it in words and omits
some facts. `parse` reads such a caption, or a user's prompt, back.

Needs NumPy only.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

SIDE = 64  # pixels
SUPERSAMPLE = 4

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("center", "left", "right", "top", "bottom")
RGB = {
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (255, 220, 40),
    "green": (30, 160, 60),
    "cyan": (120, 225, 240),
    "blue": (35, 80, 220),
    "purple": (130, 40, 170),
    "pink": (255, 140, 190),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white")
BACKGROUNDS = ("white", "black", "gray", "yellow", "green", "blue", "pink", "cyan")

# Radii as fractions of the side; every shape fits the square of that half-width.
RADII = {"small": (0.13, 0.145), "large": (0.20, 0.215)}
MARGIN, GAP = 0.03, 0.055

# Training never shows one color + shape pair of each shape ...
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "heart"),
        ("blue", "ring"),
        ("purple", "circle"),
        ("orange", "square"),
        ("white", "triangle"),
    }
)
# ... nor one in eight of the unordered combinations of two color + shape pairs.
HELD_OUT_COMBINATIONS = 8

KINDS = ("train", "pair", "combination")
"""Kinds of pictures: the training set, pictures with a held-out pair, and pictures whose pairs are
trained but whose combination is not (two objects only)."""


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y` (its centre, y down) and `r` are fractions of the side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    r: float

    @property
    def pair(self) -> tuple[str, str]:
        return (self.color, self.shape)


@dataclass(frozen=True)
class Spec:
    """A whole picture: things[0] `relation` things[1], or one thing at `place`."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Asked:
    """The content of a caption. None stands for every fact that the caption omits."""

    things: tuple[tuple[str, str, str | None], ...]  # (shape, color, size)
    background: str | None = None
    relation: str | None = None
    place: str | None = None


def combination_held_out(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Return True if training never shows these two color + shape pairs together."""
    key = "+".join(sorted(" ".join(pair) for pair in (a, b)))
    return zlib.crc32(key.encode()) % HELD_OUT_COMBINATIONS == 0


def _choice(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _pairs(rng: np.random.Generator, background: str, count: int, kind: str):
    """Draw color + shape pairs of the wanted kind (by rejection, which skews nothing else)."""
    while True:
        pairs = [(_choice(rng, COLORS), _choice(rng, SHAPES)) for _ in range(count)]
        if any(color == background for color, _ in pairs):
            continue
        unseen = sum(pair in HELD_OUT_PAIRS for pair in pairs)
        together = count == 2 and combination_held_out(*pairs)
        if kind == "train" and not unseen and not together:
            return pairs
        if kind == "pair" and unseen == 1:
            return pairs
        if kind == "combination" and not unseen and together:
            return pairs


def random_spec(rng: np.random.Generator, count: int = 1, kind: str = "train") -> Spec:
    """Return a random picture with one or two objects. `kind` is one of KINDS."""
    if kind not in KINDS or count not in (1, 2) or (kind == "combination" and count != 2):
        raise ValueError(f"no pictures of kind {kind!r} with {count} objects")
    background = _choice(rng, BACKGROUNDS)
    pairs = _pairs(rng, background, count, kind)
    sizes = [_choice(rng, SIZES) for _ in range(count)]
    radii = [rng.uniform(*RADII[size]) for size in sizes]

    if count == 1:
        place = _choice(rng, PLACES)
        r = radii[0]
        across, along = rng.uniform(-0.06, 0.06, 2)
        near = rng.uniform(r + MARGIN, 0.30)
        x, y = {
            "center": (0.5 + across, 0.5 + along),
            "left": (near, 0.5 + across),
            "right": (1 - near, 0.5 + across),
            "top": (0.5 + across, near),
            "bottom": (0.5 + across, 1 - near),
        }[place]
        color, shape = pairs[0]
        return Spec(background, (Thing(shape, color, sizes[0], x, y, r),), place=place)

    relation = _choice(rng, RELATIONS)
    first = 0 if relation in ("left of", "above") else 1  # the left or upper object
    ra, rb = radii[first], radii[1 - first]
    slack = 1 - 2 * (ra + rb + MARGIN) - GAP
    before, between, _ = rng.dirichlet((2.0, 1.0, 2.0)) * slack
    along = np.empty(2)
    along[first] = MARGIN + before + ra
    along[1 - first] = along[first] + ra + GAP + between + rb
    across = 0.5 + rng.uniform(-0.08, 0.08, 2)
    things = []
    for i, (color, shape) in enumerate(pairs):
        a, c = float(along[i]), float(across[i])
        x, y = (a, c) if relation in ("left of", "right of") else (c, a)
        things.append(Thing(shape, color, sizes[i], x, y, float(radii[i])))
    return Spec(background, tuple(things), relation=relation)


def dense_spec(rng: np.random.Generator) -> Spec:
    """Return three to six objects anywhere, with overlaps: many edges, to train the VAE."""
    things = []
    for _ in range(int(rng.integers(3, 7))):
        size = _choice(rng, SIZES)
        x, y = rng.uniform(0.08, 0.92, 2)
        shape, color = _choice(rng, SHAPES), _choice(rng, COLORS)
        things.append(Thing(shape, color, size, x, y, rng.uniform(*RADII[size])))
    return Spec(_choice(rng, BACKGROUNDS), tuple(things))


# --- drawing ---------------------------------------------------------------------------------


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return True for points of the square [-1, 1]^2 (v down) inside the shape."""
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.88
    if shape == "triangle":
        return (v <= 0.8) & (np.abs(u) <= (v + 0.95) / 1.75)
    if shape == "ring":
        rho = u * u + v * v
        return (rho <= 1) & (rho >= 0.5**2)
    if shape == "heart":
        x, y = 1.15 * u, 0.12 - 1.12 * v
        return (x * x + y * y - 1) ** 3 <= x * x * y**3
    if shape == "star":  # five points up; fold the angle into one half of a point
        inner = 0.45
        angle = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        rho = np.hypot(u, v)
        px, py = rho * np.cos(angle), rho * np.sin(angle)
        cx, cy = inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
        return (px - 1) * cy <= py * (cx - 1)
    raise ValueError(f"unknown shape {shape!r}")


def render(spec: Spec, side: int = SIDE) -> np.ndarray:
    """Draw a picture: (side, side, 3) uint8, edges smoothed by supersampling."""
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = RGB[spec.background]
    s = SUPERSAMPLE
    for thing in spec.things:
        x, y, r = thing.x * side, thing.y * side, thing.r * side
        x0, x1 = max(int(x - r) - 1, 0), min(int(x + r) + 2, side)
        y0, y1 = max(int(y - r) - 1, 0), min(int(y + r) + 2, side)
        u = ((np.arange(x0 * s, x1 * s, dtype=np.float32) + 0.5) / s - x) / r
        v = ((np.arange(y0 * s, y1 * s, dtype=np.float32) + 0.5) / s - y) / r
        mask = inside(thing.shape, u[None, :], v[:, None])
        alpha = mask.reshape(y1 - y0, s, x1 - x0, s).mean((1, 3), dtype=np.float32)[..., None]
        box = picture[y0:y1, x0:x1]
        box += alpha * (np.array(RGB[thing.color], np.float32) - box)
    return (picture + 0.5).astype(np.uint8)


# --- words -----------------------------------------------------------------------------------

_OPENINGS = ("a picture of ", "a drawing of ", "an image of ")
_WAYS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_WHERE = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}


def _name(thing: Thing, rng: np.random.Generator, complete: bool) -> str:
    words = [thing.color, thing.shape]
    if complete or rng.random() < 0.8:
        words.insert(0, thing.size)
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def caption(spec: Spec, rng: np.random.Generator, complete: bool = False) -> str:
    """Describe a picture in varying words.

    Size, place, relation and background are sometimes omitted, unless the caption is `complete`.
    """
    if len(spec.things) == 2:
        first, second = (_name(thing, rng, complete) for thing in spec.things)
        between = _choice(rng, _WAYS[spec.relation])
        if not complete and rng.random() < 0.07:
            between = "and"
        text = f"{first} {between} {second}"
    else:
        text = _name(spec.things[0], rng, complete)
        if complete or rng.random() < 0.6:
            text += " " + _choice(rng, _WHERE[spec.place])
    opening = _choice(rng, _OPENINGS) if rng.random() < 0.35 else ""
    ground = spec.background + " background"
    an = "an" if ground[0] in "aeiou" else "a"
    form = rng.uniform(0.10, 1) if complete else rng.random()
    if form < 0.10:
        return opening + text
    if form < 0.20:
        return f"on {an} {ground}, {opening}{text}"
    return f"{opening}{text} {'on' if form < 0.75 else 'with'} {an} {ground}"


def words() -> list[str]:
    """Return every word that the captions use, sorted. The model knows these words."""
    known = {"a", "an", "and", "background", "on", "with", *COLORS, *BACKGROUNDS, *SHAPES, *SIZES}
    for phrases in (_OPENINGS, *_WAYS.values(), *_WHERE.values()):
        for phrase in phrases:
            known.update(phrase.split())
    return sorted(known)


def _one_of(options) -> str:
    return "|".join(sorted(options, key=len, reverse=True))


_THING = rf"(?:({_one_of(SIZES)}) )?({_one_of(COLORS)}) ({_one_of(SHAPES)})"
_GROUND = rf"(?:on|with) an? ({_one_of(BACKGROUNDS)}) background,?"
_RELATION_OF = {way: name for name, ways in _WAYS.items() for way in ways}
_PLACE_OF = {way: name for name, ways in _WHERE.items() for way in ways}


def parse(text: str) -> Asked:
    """Read a caption or prompt of this grammar. Raise ValueError if it names no object."""
    rest = " ".join(text.lower().split())
    background = None
    if match := re.search(_GROUND, rest):
        background = match[1]
        rest = (rest[: match.start()] + rest[match.end() :]).strip()
    found = list(re.finditer(_THING, rest))
    if not 1 <= len(found) <= 2:
        raise ValueError(f"expected one or two objects in {text!r}, found {len(found)}")
    things = tuple((match[3], match[2], match[1]) for match in found)
    if len(found) == 1:
        after = rest[found[0].end() :].strip(" ,.")
        return Asked(things, background, place=_PLACE_OF.get(after))
    between = re.sub(r" an?$", "", rest[found[0].end() : found[1].start()].strip())
    return Asked(things, background, relation=_RELATION_OF.get(between))


def asked_of(spec: Spec) -> Asked:
    """Return the request that names everything in a picture."""
    things = tuple((thing.shape, thing.color, thing.size) for thing in spec.things)
    return Asked(things, spec.background, spec.relation, spec.place)
