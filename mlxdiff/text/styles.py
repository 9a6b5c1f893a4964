"""Styles: texts that a prompt is put into, by name.

A user's own stand in a TOML file, a table for each::

    [ink]
    prompt = "{prompt}, ink drawing, bold black lines on white paper"
    negative = "color, shading"
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxdiff.errors import UsageError
from mlxdiff.machine.disk import read_document

PLACE = "{prompt}"
LARGEST = 1 << 20  # bytes of a file of styles


@dataclass(frozen=True)
class Style:
    """A style.

    Attributes:
        prompt: the text; the prompt takes the place of {prompt}, or comes before all.
        negative: what is added to the negative prompt.
    """

    prompt: str
    negative: str = ""

    def applied(self, prompt: str, negative: str | None) -> tuple[str, str | None]:
        """Return prompt and negative prompt in this style."""
        if PLACE in self.prompt:
            styled = self.prompt.replace(PLACE, prompt)
        else:
            styled = _joined(prompt, self.prompt)
        return styled, _joined(negative or "", self.negative) if self.negative else negative


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part.strip())


STYLES: dict[str, Style] = {
    "photo": Style(
        "photograph of {prompt}, natural light, 50 mm lens, sharp focus, fine detail",
        "drawing, painting, render, blurry, oversaturated",
    ),
    "cinema": Style(
        "film still of {prompt}, wide shot, dramatic light from one side, shallow depth of field, "
        "muted colors, film grain",
        "drawing, flat light, snapshot, text",
    ),
    "portrait": Style(
        "studio portrait of {prompt}, soft key light, plain dark background, 85 mm lens",
        "busy background, harsh shadows, cropped head, drawing",
    ),
    "macro": Style(
        "macro photograph of {prompt}, extreme close-up, very shallow depth of field",
        "wide shot, drawing, blurry subject",
    ),
    "watercolor": Style(
        "watercolor painting of {prompt}, wet washes, soft edges, white paper showing through",
        "photograph, hard outlines, glossy",
    ),
    "oil": Style(
        "oil painting of {prompt}, thick brush strokes, rich colors, canvas texture",
        "photograph, flat colors, smooth gradients",
    ),
    "ink": Style(
        "ink drawing of {prompt}, bold black lines, cross-hatching, white paper",
        "color, photograph, gray wash",
    ),
    "pencil": Style(
        "pencil sketch of {prompt}, graphite, fine hatching, light construction lines",
        "color, photograph, heavy outlines",
    ),
    "storybook": Style(
        "storybook illustration of {prompt}, warm gouache colors, simple shapes, gentle light",
        "photograph, gloomy, harsh contrast",
    ),
    "pixel": Style(
        "pixel art of {prompt}, 16 colors, crisp square pixels, no smoothing",
        "photograph, blurry, smooth gradients",
    ),
    "clay": Style(
        "clay model of {prompt}, hand-shaped, fingerprints in the clay, soft studio light",
        "drawing, flat, photograph of a person",
    ),
    "blueprint": Style(
        "blueprint of {prompt}, thin white lines on deep blue, technical drawing, dimensions",
        "photograph, shading, color",
    ),
    "isometric": Style(
        "isometric render of {prompt}, small diorama, soft shadows, plain background",
        "perspective, photograph, clutter",
    ),
    "poster": Style(
        "screen-printed poster of {prompt}, three flat colors, strong silhouette, large shapes",
        "photograph, gradients, small detail",
    ),
}
"""Styles that come with mlxdiff."""


def read_styles(path: str | os.PathLike[str]) -> dict[str, Style]:
    """Read a user's file of styles. Raises: UsageError."""
    try:
        text = read_document(path, LARGEST).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise UsageError(f"{path}: cannot be read ({why})") from None
    styles = {}
    for name, table in _toml(text, path).items():
        known = {"prompt", "negative"}
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise UsageError(f"{path}: {name} is no table of texts; expected [{name}] with prompt")
        if unknown := sorted(set(table) - known):
            raise UsageError(f"{path}: [{name}] has {unknown[0]!r}; expected prompt and negative")
        if not table:
            raise UsageError(f"{path}: [{name}] is empty; expected prompt, negative or both")
        styles[name] = Style(table.get("prompt", PLACE), table.get("negative", ""))
    return styles


def _toml(text: str, path: Any) -> Mapping[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise UsageError(
                f"{path}: is TOML, which Python 3.10 cannot read: pip install tomli, or use a "
                "later Python"
            ) from None
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is not TOML ({error})") from None


def apply(
    names: str, own: Mapping[str, Style], prompt: str, negative: str | None
) -> tuple[str, str | None]:
    """Put a prompt into styles, one after the other.

    Args:
        names: of the styles, with commas between them.
        own: styles of the user, which count before those of mlxdiff.
        prompt, negative: as given.
    Raises: UsageError for a style that is not there.
    """
    known = {**STYLES, **own}
    for name in (one.strip() for one in names.split(",")):
        if name not in known:
            raise UsageError(f"style {name!r} does not exist; there are {', '.join(known)}")
        prompt, negative = known[name].applied(prompt, negative)
    return prompt, negative
