"""The world of the emoji model: Noto Color Emoji on grounds, and captions as people type them.

A picture shows one emoji, large, or small and at a place, on a plain ground or in a simple scene.
A `Spec` describes a picture completely. `render` draws it. `caption` describes it in words and
usually omits facts.

Needs NumPy, Pillow with FreeType, and the font Noto Color Emoji in its form with bitmaps (Debian's
package is fonts-noto-color-emoji; NOTO_EMOJI names another file).
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import numpy as np

SIDE = 64  # pixels
FONT = os.environ.get("NOTO_EMOJI", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
BITMAP = 109  # the size of the font's only bitmaps

# The names of each emoji, the usual one first. A caption uses the first more often.
EMOJI: dict[str, tuple[str, ...]] = {
    line.split(" ", 1)[0]: tuple(line.split(" ", 1)[1].split(", "))
    for line in """
🐱 cat, kitten
🐶 dog, puppy
🐰 rabbit, bunny
🦊 fox
🐻 bear
🐼 panda
🐨 koala
🐯 tiger
🦁 lion
🐮 cow
🐷 pig
🐸 frog
🐵 monkey
🐧 penguin
🐤 chick
🦆 duck
🦉 owl
🐴 horse
🦄 unicorn
🐝 bee
🦋 butterfly
🐌 snail
🐞 ladybug
🐢 turtle
🐲 dragon
🐙 octopus
🦖 dinosaur
🐠 fish
🐳 whale
🦈 shark
🐘 elephant
🦒 giraffe
🦔 hedgehog
🐑 sheep
🍎 apple
🍐 pear
🍋 lemon
🍌 banana
🍉 watermelon
🍇 grapes
🍓 strawberry
🍑 peach
🍍 pineapple
🍅 tomato
🥑 avocado
🥕 carrot
🍄 mushroom
🥨 pretzel
🍳 egg, fried egg
🍔 burger, hamburger
🍕 pizza
🍟 fries
🍦 ice cream
🍩 donut
🍪 cookie
🎂 cake, birthday cake
🧁 cupcake
🍿 popcorn
☕ coffee, cup of coffee
🌵 cactus
🌳 tree
🎄 christmas tree
🌹 rose
🌻 sunflower
🍀 clover
🌞 sun
🌙 moon
⭐ star
🌈 rainbow
⚡ lightning
❄ snowflake
⛄ snowman
🔥 fire
🌍 earth, globe
😀 smiley, happy face
😍 face in love
😎 cool face
😭 crying face
😴 sleeping face
🤖 robot
👻 ghost
👽 alien
💀 skull
🎃 pumpkin
💩 poop
😈 devil
🚗 car
🚌 bus
🚂 train
🚜 tractor
✈ airplane, plane
🚀 rocket
⛵ sailboat, boat
⚽ soccer ball
🏀 basketball
🎸 guitar
💎 diamond
🎈 balloon
🎁 gift, present
👑 crown
🔑 key
☂ umbrella
🏠 house
🎩 hat
🏆 trophy
❤ heart, red heart
💙 blue heart
💚 green heart
💛 yellow heart
💜 purple heart
""".strip().splitlines()
}
KINDS = tuple(EMOJI)
NAMES = {name: kind for kind, names in EMOJI.items() for name in names}

RGB = {
    "white": (252, 252, 252),
    "yellow": (255, 221, 89),
    "orange": (250, 160, 60),
    "red": (226, 74, 74),
    "pink": (250, 175, 205),
    "purple": (150, 110, 205),
    "blue": (90, 150, 235),
    "green": (110, 190, 110),
    "gray": (160, 165, 172),
    "black": (28, 28, 34),
}
SCENES = {
    "night": ("in the night sky", "at night"),
    "meadow": ("in a meadow", "on the grass"),
    "beach": ("on the beach",),
    "sunset": ("at sunset", "in front of a sunset"),
    "snow": ("in the snow",),
    "sea": ("in the sea", "under water"),
}
GROUNDS = (*RGB, *SCENES)
PLACES = ("center", "left", "right", "top", "bottom")
WHERE = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
_OPENINGS = ("a picture of ", "a drawing of ", "an emoji of ")

SHARE_OF_SMALL = 0.2
LARGE, SMALL = (50, 54), (36, 39)  # pixels of the emoji's square, end excluded


@dataclass(frozen=True)
class Thing:
    """One emoji in a square of `size` pixels whose upper left corner is (x, y)."""

    kind: str
    size: int
    x: int
    y: int


@dataclass(frozen=True)
class Spec:
    """A whole picture: one thing, at a `place` if it is small."""

    ground: str
    things: tuple[Thing, ...]
    place: str | None = None

    @property
    def kind(self) -> str:
        return self.things[0].kind


def _choice(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def random_ground(rng: np.random.Generator) -> str:
    return _choice(rng, tuple(RGB) if rng.random() < 0.7 else tuple(SCENES))


def center_of(place: str | None) -> tuple[float, float]:
    """Return the center of an emoji in pixels, (x, y); None: a large one."""
    half, near = SIDE / 2, SIDE * 0.32
    return {
        "left": (near, half),
        "right": (SIDE - near, half),
        "top": (half, near),
        "bottom": (half, SIDE - near),
    }.get(place, (half, half))


def _around(rng: np.random.Generator, kind: str, sizes: tuple[int, int], x: float, y: float):
    size = int(rng.integers(*sizes))
    across, along = rng.integers(-1, 2, 2)
    return Thing(kind, size, int(x - size / 2 + across), int(y - size / 2 + along))


def random_spec(
    rng: np.random.Generator, small: bool | None = None, kind: str | None = None
) -> Spec:
    """Return a random picture of one emoji. A small one has a place."""
    ground = random_ground(rng)
    small = rng.random() < SHARE_OF_SMALL if small is None else small
    kind = kind or _choice(rng, KINDS)
    if not small:
        return Spec(ground, (_around(rng, kind, LARGE, *center_of(None)),))
    place = _choice(rng, PLACES)
    return Spec(ground, (_around(rng, kind, SMALL, *center_of(place)),), place)


def dense_spec(rng: np.random.Generator) -> Spec:
    """Return two to four emoji anywhere, with overlaps: many edges, to train the VAE."""
    things = []
    for _ in range(int(rng.integers(2, 5))):
        size = int(rng.integers(34, 54))
        x, y = rng.integers(-size // 3, SIDE - size // 2, 2)
        things.append(Thing(_choice(rng, KINDS), size, int(x), int(y)))
    return Spec(random_ground(rng), tuple(things))


# --- drawing ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _font():
    from PIL import ImageFont

    return ImageFont.truetype(FONT, BITMAP)


@functools.cache
def bitmap(kind: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an emoji's color times alpha, (size, size, 3), 0 to 255, and its alpha, with 1."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGBA", (136, 136), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((0, 4), kind, font=_font(), embedded_color=True, anchor="lt")
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"{FONT} has no bitmap for {kind!r}")
    drawn = canvas.crop(box)
    longer = max(drawn.size)
    square = Image.new("RGBA", (longer, longer), (0, 0, 0, 0))
    square.paste(drawn, ((longer - drawn.width) // 2, (longer - drawn.height) // 2))
    values = np.asarray(square.convert("RGBa").resize((size, size), Image.Resampling.BOX))
    return values[..., :3].astype(np.float32), values[..., 3:].astype(np.float32) / 255


@functools.cache
def _scene(ground: str) -> np.ndarray:
    """Return a ground without its random parts: (SIDE, SIDE, 3) float32."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    if ground in RGB:
        picture[:] = RGB[ground]
        return picture
    down = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]

    def blend(a, b):
        return np.asarray(a, np.float32) * (1 - down) + np.asarray(b, np.float32) * down

    x = np.arange(SIDE)[None, :]
    y = np.arange(SIDE)[:, None]
    if ground == "night":
        picture[:] = blend((16, 18, 58), (58, 48, 120))
    elif ground == "sunset":
        picture[:] = blend((120, 80, 170), (255, 170, 80))
    elif ground == "sea":
        picture[:] = blend((95, 200, 225), (15, 70, 150))
    elif ground == "meadow":
        picture[:] = blend((120, 195, 250), (215, 240, 255))
        picture[y[:, 0] > 42] = (108, 190, 80)
        picture[(y > 40 + 3 * np.cos(x / 10)) & (y > 36)] = (108, 190, 80)
    elif ground == "beach":
        picture[:] = blend((125, 205, 250), (200, 235, 250))
        picture[34:46] = (50, 150, 205)
        picture[46:] = (240, 215, 150)
    elif ground == "snow":
        picture[:] = blend((150, 185, 225), (205, 222, 240))
        picture[(y > 42 - 3 * np.cos(x / 12))] = (246, 249, 253)
    else:
        raise ValueError(f"unknown ground {ground!r}")
    return picture


STARS = (
    *((7, 9), (20, 5), (33, 8), (47, 4), (58, 12), (4, 27)),
    *((60, 30), (9, 46), (56, 50), (28, 60), (45, 59), (14, 58)),
)


def ground_of(ground: str) -> np.ndarray:
    """Draw a ground: (SIDE, SIDE, 3) float32, 0 to 255."""
    picture = _scene(ground).copy()
    if ground == "night":
        for x, y in STARS:
            picture[y, x] = (255, 250, 205)
            for dx, dy in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                at = (y + dy, x + dx)
                if max(at) < SIDE:
                    picture[at] = 0.6 * picture[at] + 0.4 * np.array((255, 250, 205), np.float32)
    return picture


def render(spec: Spec) -> np.ndarray:
    """Draw a picture: (SIDE, SIDE, 3) uint8."""
    picture = ground_of(spec.ground)
    for thing in spec.things:
        color, alpha = bitmap(thing.kind, thing.size)
        x0, y0 = max(thing.x, 0), max(thing.y, 0)
        x1, y1 = min(thing.x + thing.size, SIDE), min(thing.y + thing.size, SIDE)
        part = np.s_[y0 - thing.y : y1 - thing.y, x0 - thing.x : x1 - thing.x]
        box = picture[y0:y1, x0:x1]
        box *= 1 - alpha[part]
        box += color[part]
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


def batch_of(rng: np.random.Generator, size: int, dense: float = 0.5) -> np.ndarray:
    """Return pictures as float32 (B, 3, H, W) in [-1, 1], to train the VAE."""
    specs = [dense_spec(rng) if rng.random() < dense else random_spec(rng) for _ in range(size)]
    pictures = np.stack([render(spec) for spec in specs]).astype(np.float32)
    return (pictures / 127.5 - 1).transpose(0, 3, 1, 2)


# --- words -----------------------------------------------------------------------------------

PLURAL = frozenset({"grapes", "fries", "popcorn", "lightning", "fire"})  # without an article


def a(words: str) -> str:
    """Return the words with their article."""
    if words in PLURAL:
        return words
    return ("an " if words[0] in "aeio" or words.startswith("um") else "a ") + words


def name(kind: str, rng: np.random.Generator) -> str:
    names = EMOJI[kind]
    return names[0] if len(names) == 1 or rng.random() < 0.6 else _choice(rng, names[1:])


def ground_words(ground: str, rng: np.random.Generator) -> str:
    if ground in SCENES:
        return _choice(rng, SCENES[ground])
    return f"on {a(ground)} background" if rng.random() < 2 / 3 else f"on {ground}"


def caption(spec: Spec, rng: np.random.Generator, complete: bool = False) -> str:
    """Describe a picture in varying words. Many captions only name it, unless `complete`."""
    opening, form = "", rng.random()
    if form < 0.15:
        opening = _choice(rng, _OPENINGS)
    said = name(spec.kind, rng)
    small = spec.place is not None
    if small and (complete or rng.random() < 0.7):
        said = "small " + said
    bare = not opening and not complete and form > 0.75  # "fox"
    text = said if bare else a(said)
    if small and (complete or rng.random() < 0.8):
        text += " " + _choice(rng, WHERE[spec.place])
    if complete or rng.random() < 0.65:
        text += " " + ground_words(spec.ground, rng)
    return opening + text


def words() -> list[str]:
    """Return every word that the captions use, sorted. The model knows these words."""
    known = {"a", "an", "on", "background", "small", *RGB}
    for phrases in (_OPENINGS, NAMES, *WHERE.values(), *SCENES.values()):
        for phrase in phrases:
            known.update(phrase.split())
    return sorted(known)
