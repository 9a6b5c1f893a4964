"""What a picture of another program says: one record for all of them, and how to fill it.

A reader gets the texts of a picture and returns a record, or None if they are not its program's. It
knows the names and the habits of that program; ``translate`` alone knows ours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

T = TypeVar("T")
UNNAMED = "(not named)"
"""Name of a picture that was used and is not named."""

_LONGEST_DOCUMENT = 4 << 20  # characters, of all texts of a picture together
_MOST_NAMED = 100
COMPEL = re.compile(r"[\w)][+-]{1,9}(?=[\s,.)]|$)|\)[0-9]*\.?[0-9]+|\)\.(?:and|blend|swap)\(")
"""Signs of Compel's prompt syntax: ``word++``, ``(words)1.2``, ``("a", "b").blend(1, 1)``."""
_LONGEST_VALUE = 200


@dataclass
class AddedLora:
    """A LoRA that a program added beside the prompt.

    Attributes:
        name: of its file.
        scale, text_scale: for the U-Net and for the text encoders.
    """

    name: str
    scale: float = 1.0
    text_scale: float | None = None


@dataclass
class Record:
    """What a picture says. None: it does not say.

    Attributes:
        tool: the program, by the name that people know.
        version: of the program, as written.
        prompt, negative_prompt: the texts.
        prompt_2, negative_prompt_2: for the second text encoder of SDXL.
        syntax: of the prompts: "a1111" or "plain".
        seed, steps, guidance, width, height, eta, guidance_rescale: numbers that all have.
        sampler, schedule: in the program's own words.
        even: "Automatic", "normal" and no name at all mean steps that are even in time, as in
            k-diffusion; else the schedule of the model's own file.
        automatic: the schedule for the sampler that "Automatic" stands for; None: even steps.
        strength: how far the program went from an image.
        image, mask: names of the pictures it started from.
        hires, hires_upscaler, hires_strength, hires_steps: of a second pass.
        clip_skip: as A1111 counts: 1 takes the last layer.
        model, vae: names of files.
        loras: LoRAs that stand beside the prompt.
        rng, sampler_rng, noise_seed_delta, seed_order: which generator drew what
            (``run.options``).
        vary: (seed, strength) of a variation.
        noise_size: (height, width) that the seed was resized from.
        sigmas: levels of the steps in place of a schedule.
        seamless: edges that meet: "x", "y" or "xy".
        unread_prompt: where the prompt stands, if that is not read.
        named: everything else, by the program's own names.
    """

    tool: str
    version: str | None = None
    prompt: str = ""
    negative_prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    syntax: str = "a1111"
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float | None = None
    eta: float | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    even: bool = False
    automatic: str | None = None
    strength: float | None = None
    image: str | None = None
    mask: str | None = None
    hires: float | None = None
    hires_upscaler: str | None = None
    hires_strength: float | None = None
    hires_steps: int | None = None
    clip_skip: int | None = None
    model: str | None = None
    vae: str | None = None
    loras: list[AddedLora] = field(default_factory=list)
    rng: str | None = None
    sampler_rng: str | None = None
    noise_seed_delta: int | None = None
    seed_order: str | None = None
    vary: tuple[int, float] | None = None
    noise_size: tuple[int, int] | None = None
    sigmas: list[float] | None = None
    seamless: str | None = None
    unread_prompt: str | None = None
    named: dict[str, str] = field(default_factory=dict)

    def name_weights(self, sign: re.Pattern[str], words: str) -> None:
        """Name the weights of a prompt syntax that mlxdiff does not have, where a text has some."""
        if any(sign.search(text) for text in (self.prompt, self.negative_prompt or "")):
            self.name({"weights in the prompt": words})

    def name(self, values: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        """Name what is not honoured. A value that asks for nothing goes without saying.

        Args:
            values: by the program's own names.
            ignored: names that tell of the file, not of the picture: dates, durations.
        """
        for key, value in values.items():
            if key in ignored or value in (None, "", False, "None", "none") or value == []:
                continue
            if isinstance(value, dict) and not value:
                continue
            if len(self.named) >= _MOST_NAMED:
                return
            self.named[short(key)] = short(value)


def short(value: Any) -> str:
    """Write a value out, at most so long that it can stand in a note."""
    if isinstance(value, (dict, list)):
        kind = "entries" if isinstance(value, dict) else "values"
        value = f"({len(value)} {kind})" if len(value) > 8 else _compact(value)
    text = str(value) if not isinstance(value, str) else value
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _compact(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)[: 2 * _LONGEST_VALUE]
    except (ValueError, RecursionError):
        return "(nested values)"


class Fields:
    """Takes values out of a program's JSON or pairs, one name after the other.

    What nobody takes stays in ``left``. A value that is not what its name says stays there, too.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.left: dict[str, Any] = dict(values)

    def _take(self, kind: Callable[[Any], T | None], names: Collection[str]) -> T | None:
        for name in names:
            if name in self.left and (found := kind(self.left[name])) is not None:
                del self.left[name]
                return found
        return None

    def whole(self, *names: str) -> int | None:
        """Take a whole number, under the first of these names that has one."""
        return self._take(whole, names)

    def number(self, *names: str) -> float | None:
        """Take a finite number."""
        return self._take(number, names)

    def text(self, *names: str) -> str | None:
        """Take a text."""
        return self._take(lambda value: value if isinstance(value, str) else None, names)

    def size(self, *names: str) -> tuple[int, int] | None:
        """Take ``WIDTHxHEIGHT`` or a list of two, as (width, height)."""
        return self._take(size, names)

    def table(self, *names: str) -> dict[str, Any] | None:
        """Take a JSON object."""
        return self._take(lambda value: value if isinstance(value, dict) else None, names)

    def listed(self, *names: str) -> list[Any] | None:
        """Take a JSON list."""
        return self._take(lambda value: value if isinstance(value, list) else None, names)


def whole(value: Any) -> int | None:
    """Return a whole number that stands here as a number or as its text; None if none does."""
    if isinstance(value, str):
        text = value.strip()
        if not re.fullmatch(r"[+-]?\d{1,20}", text, re.ASCII):
            return None
        value = int(text)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value) if -(2**63) <= value < 2**64 else None


def number(value: Any) -> float | None:
    """Return a finite number that stands here as a number or as its text; None if none does."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and len(value) > 40:
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def size(value: Any) -> tuple[int, int] | None:
    """Return (width, height) of ``512x768``, ``(512, 768)`` or ``[512, 768]``; None for others."""
    if isinstance(value, str):
        match = re.fullmatch(
            r"\s*[(\[]?\s*(\d{1,9})\s*[xX×,*]\s*(\d{1,9})\s*[)\]]?\s*", value, re.ASCII
        )
        return None if match is None else (int(match[1]), int(match[2]))
    if isinstance(value, list) and len(value) == 2:
        sides = whole(value[0]), whole(value[1])
        if sides[0] is not None and sides[1] is not None:
            return sides[0], sides[1]
    return None


def document(text: str | None) -> Any:
    """Return the JSON value of a text; None if it is no JSON object or list."""
    if text is None or len(text) > _LONGEST_DOCUMENT:
        return None
    text = text.lstrip("\ufeff \t\r\n\0")
    if text[:1] not in ("{", "[", '"'):
        return None
    try:
        value = json.loads(text)
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # JSON inside JSON
            value = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


class Texts(dict[str, str]):
    """Texts of a picture by the names of their chunks or tags; JSON among them is read once."""

    @cached_property
    def values_of_json(self) -> dict[str, Any]:
        """The texts that are JSON objects or lists, by name."""
        found: dict[str, Any] = {}
        left = _LONGEST_DOCUMENT
        for name, text in self.items():
            if len(text) <= left and (value := document(text)) is not None:
                found[name] = value
                left -= len(text)
        return found

    @property
    def documents(self) -> dict[str, dict[str, Any]]:
        """The texts that are JSON objects, by name."""
        return {k: v for k, v in self.values_of_json.items() if isinstance(v, dict)}


def file_name(path: str | None) -> str | None:
    """Return the last part of a path of any system; None of an empty one."""
    if not path or path in ("None", "Automatic"):
        return None
    return PurePosixPath(PureWindowsPath(path).name).name or None


def without_brackets(text: str) -> str:
    """Escape what means something in A1111's syntax and nothing in ComfyUI's: square brackets."""
    return text.replace("[", "\\[").replace("]", "\\]")


def edges(said: str | None) -> str | None:
    """Return the edges that meet, in our words: "x", "y", "xy"; None: none."""
    plain = (said or "").lower().replace("-only", "").replace("_", "")
    return {"true": "xy", "xy": "xy", "x": "x", "y": "y"}.get(plain)
