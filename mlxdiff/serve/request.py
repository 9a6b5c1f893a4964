"""Turn requests of clients into orders for the engine, with all checks before the queue."""

from __future__ import annotations

import base64
import binascii
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlxdiff.batch.jobs import Axis, check_axes, make_axis
from mlxdiff.batch.wildcards import Wildcards
from mlxdiff.errors import UsageError
from mlxdiff.pictures import encoded
from mlxdiff.pictures.hires import UPSCALERS
from mlxdiff.run.options import RunOptions
from mlxdiff.run.table import make
from mlxdiff.run.values import Flag, Number, Text, Unfit
from mlxdiff.serve.engine import Order
from mlxdiff.serve.schema import is_picture, options
from mlxdiff.serve.shelf import Shelf

_DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w=.-]+)*;base64,", re.ASCII)
MOST_STEPS = 1000
MOST_TEXT = 100_000
MODEL_SIDE = 1024
"""Pixels of a side that a request leaves to the model, for the limit: no model has more."""

_KINDS = {
    "loras": "loras",
    "embeddings": "embeddings",
    "vae": "vaes",
    "controlnets": "controlnets",
    "ip_adapters": "ip_adapters",
    "refiner": "models",
}


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for.

    Attributes:
        upload_pixels: of a picture that is sent.
        drawn_pixels: of a picture that is drawn.
        count: pictures of a request.
    """

    upload_pixels: int = 4096 * 4096
    drawn_pixels: int = 2048 * 2048
    count: int = 16


def picture_of(value: Any, name: str, limits: Limits) -> Any:
    """Decode a picture in base64, or a ``data:`` URL of one. Raises: UsageError."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is no text; expected a picture file in base64")
    if value.startswith(("http://", "https://", "file://")):
        raise UsageError(f"{name}: nothing is fetched from addresses; send the picture in base64")
    head = _DATA_URL.match(value[:200])
    try:
        data = base64.b64decode(value[head.end() :] if head else value, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{name}: is not base64; expected a picture file in base64") from None
    return encoded.decode(data, name, limits.upload_pixels)


def order_of(given: Mapping[str, Any], shelf: Shelf, limits: Limits) -> Order:
    """Check a request of our own form (``schema.request_schema``).

    Pictures may be Pillow images, too, where another interface has decoded them.
    Raises: UsageError, UnknownName.
    """
    run = {name: value for name, value in given.items() if value is not None}
    model = run.pop("model", shelf.default)
    place = shelf.find("models", model)
    additions = {
        name: _addition(name, run.pop(name), shelf, kind)
        for name, kind in _KINDS.items()
        if run.get(name) not in (None, [], "")
    }
    run = {name: value for name, value in run.items() if name not in _KINDS}
    save = _accepted(Flag(), "save", run.pop("save", True))
    axes = _axes(run.pop("vary_option", {}))
    fills = _accepted(Flag(), "wildcards", run.pop("wildcards", False))
    known = options()
    for name, value in run.items():
        if name in known and is_picture(known[name].kind):
            run[name] = _pictures(name, value, limits)
    if "noise" in run:
        raise UsageError("noise is not taken from requests; leave it out")
    asked = make(RunOptions, run)
    if asked.hires_upscaler is not None and asked.hires_upscaler not in UPSCALERS:
        raise UsageError(
            f"hires_upscaler is {asked.hires_upscaler!r}; expected one of {', '.join(UPSCALERS)}"
        )
    _check_limits(asked, limits)
    _check_axes(asked, axes, limits)
    run.pop("seed", None)
    run.pop("count", None)
    return Order(
        model=model,
        place=place,
        options=run,
        additions=additions,
        seed=None if asked.seed in (None, -1) else asked.seed,
        count=asked.count,
        axes=axes,
        wildcards=Wildcards(shelf.wildcards) if fills else None,
        save=save,
    )


def _axes(given: Any) -> list[Axis]:
    """Options that take several values: an object of lists. Raises: UsageError."""
    if not isinstance(given, dict):
        raise UsageError('vary_option: expected an object of lists, such as {"steps": [10, 20]}')
    axes = []
    known = options()
    for name, values in given.items():
        if name not in known or name in ("count", "variations") or is_picture(known[name].kind):
            raise UsageError(f"vary_option: {name!r} is no option that can vary")
        if not isinstance(values, list) or not values:
            raise UsageError(f"vary_option: {name} is {values!r}; expected a list of values")
        read = partial(_accepted, known[name].kind, name)
        axes.append(make_axis(name, values, read))
    check_axes(axes)
    return axes


def _check_axes(asked: RunOptions, axes: Sequence[Axis], limits: Limits) -> None:
    """Check each value of the axes as if it were given alone. Raises: UsageError."""
    pictures = asked.count * math.prod(len(axis.values) for axis in axes)
    if pictures > limits.count:
        raise UsageError(
            f"vary_option: {pictures} pictures; at most {limits.count} are drawn for a request"
        )
    for values in itertools.product(*(axis.values for axis in axes)):
        varied = dict(zip((axis.name for axis in axes), values, strict=True))
        _check_limits(replace(asked, **varied), limits)


def _pictures(name: str, value: Any, limits: Limits) -> Any:
    if isinstance(value, list):
        return [_pictures(f"{name}[{i}]", one, limits) for i, one in enumerate(value)]
    return picture_of(value, name, limits) if isinstance(value, (str, int, dict, bool)) else value


def _addition(name: str, value: Any, shelf: Shelf, kind: str) -> Any:
    """Return the arguments of the library for names of additions."""
    if name in ("vae", "refiner"):
        return shelf.find(kind, value)
    if not isinstance(value, list):
        raise UsageError(f"{name} is {value!r}; expected a list of names")
    return [_one(name, one, shelf, kind) for one in value]


def _one(name: str, value: Any, shelf: Shelf, kind: str) -> Any:
    second = {"loras": ("scale", Number()), "embeddings": ("word", Text())}.get(name)
    if second is None or not isinstance(value, dict):
        return shelf.find(kind, value)
    key, takes = second
    if extra := sorted(set(value) - {"name", key}):
        raise UsageError(f"{name}: there is no {extra[0]!r}; expected name and {key}")
    place = shelf.find(kind, value.get("name"))
    return place if value.get(key) is None else (place, _accepted(takes, key, value[key]))


def _accepted(kind: Any, name: str, value: Any) -> Any:
    try:
        return kind.accept(value)
    except Unfit as unfit:
        raise UsageError(f"{name} is {unfit}") from None


def _check_limits(asked: RunOptions, limits: Limits) -> None:
    """Refuse what would keep the server busy for hours, or fill its memory. Raises: UsageError."""
    if asked.count * asked.best_of * asked.ensemble > limits.count:
        many = f"count is {asked.count}" + f", best of {asked.best_of}" * (asked.best_of > 1)
        many += f", ensemble is {asked.ensemble}" * (asked.ensemble > 1)
        raise UsageError(f"{many}; at most {limits.count} are drawn for a request")
    if asked.steps is not None and asked.steps > MOST_STEPS:
        raise UsageError(f"steps is {asked.steps}; at most {MOST_STEPS} are taken")
    for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
        if len(getattr(asked, name) or "") > MOST_TEXT:
            raise UsageError(f"{name} is longer than {MOST_TEXT} characters")
    shown = getattr(asked.image, "size", (None, None))
    left, top, right, bottom = asked.outpaint or (0, 0, 0, 0)
    width = asked.width or (None if shown[0] is None else shown[0] + left + right)
    height = asked.height or (None if shown[1] is None else shown[1] + top + bottom)
    if width is None and height is None:
        return  # the model's own size
    sides = MODEL_SIDE if width is None else width, MODEL_SIDE if height is None else height
    larger = asked.hires or 1.0
    if sides[0] * sides[1] * larger**2 > limits.drawn_pixels:
        times = f", enlarged {larger:g} times," if larger > 1 else ""
        raise UsageError(
            f"width and height: {sides[0]}x{sides[1]}{times} is too large; at most "
            f"{limits.drawn_pixels} pixels are drawn"
        )
