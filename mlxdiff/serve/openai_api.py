"""The images interface of OpenAI: ``/v1/images/*`` and ``/v1/models``.

Source: OpenAI's API reference (images, models). Options of ours may stand beside its own fields;
``extra_body={"seed": 7, "steps": 4}`` sends them. A value that asks for what is not here is an
error that names the field.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlxdiff.errors import UsageError
from mlxdiff.pictures import encoded, formats
from mlxdiff.serve.desk import Desk, Endpoint, json_body
from mlxdiff.serve.engine import Job
from mlxdiff.serve.schema import is_picture, lacks, options
from mlxdiff.serve.shelf import UnknownName

VARIATION_STRENGTH = 0.6
"""Variations go this far from the picture, with an empty prompt; a model that a picture leads sees
it as a whole."""
PREFIX = "/v1/"

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
# Field -> values that ask for nothing. Clients send them as defaults.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "style": ("vivid",),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "input_fidelity": ("low",),
    "stream": (False, "false"),
    "partial_images": (0, "0"),
}


class Form(NamedTuple):
    """How a client wants the pictures.

    Attributes:
        is_url: as addresses in the gallery.
        ending: of the format, see ``pictures.formats``.
        quality: 1 to 100; None: the usual one.
    """

    is_url: bool
    ending: str
    quality: int | None


class OpenAIAPI:
    """Handlers of ``/v1``.

    Args:
        desk: of the server.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk, self.shelf = desk, desk.shelf
        self._started = int(time.time())

    def endpoints(self) -> list[Endpoint]:
        """All entries of the interface."""
        body = {"type": "object", "description": "as in OpenAI's API reference"}
        return [
            Endpoint("POST", "/v1/images/generations", self.generations,
                     "OpenAI: draw pictures from a prompt.", body),
            Endpoint("POST", "/v1/images/edits", self.edits,
                     "OpenAI: change a picture, or what a mask shows of it."),
            Endpoint("POST", "/v1/images/variations", self.variations,
                     "OpenAI: draw from a picture, at strength 0.6 with an empty prompt."),
            Endpoint("GET", "/v1/models", self.models, "OpenAI: list models."),
            Endpoint("GET", "/v1/models/{model:path}", self.model, "OpenAI: describe a model."),
        ]  # fmt: skip

    async def generations(self, request: Request) -> Response:
        given = await json_body(request)
        asked, form = _asked(given)
        if not isinstance(asked.get("prompt"), str):
            raise UsageError("prompt: no prompt is given")
        return await self._answer(await self.desk.draw(asked, request), form, request)

    async def edits(self, request: Request) -> Response:
        given, files = await self._form(request)
        asked, form = _asked(given)
        images = files.get("image", [])
        if len(images) != 1:
            raise UsageError(f"image: {len(images)} pictures are sent; expected one")
        image, mask = images[0], files.get("mask", [None])[0]
        transparent = encoded.mask_of_transparency(image if mask is None else mask)
        if mask is not None and transparent is None:
            raise UsageError("mask: is transparent nowhere; make it so where to draw")
        asked["image"] = encoded.opaque(image)
        if transparent is not None:
            asked["mask"] = transparent
            if "width" not in asked:
                asked["width"], asked["height"] = _rounded(image.size)
        return await self._answer(await self.desk.draw(asked, request), form, request)

    async def variations(self, request: Request) -> Response:
        given, files = await self._form(request)
        asked, form = _asked(given)
        images = files.get("image", [])
        if len(images) != 1:
            raise UsageError(f"image: {len(images)} pictures are sent; expected one")
        if asked.get("prompt"):
            raise UsageError("prompt: variations have an empty prompt; leave it out, or call edits")
        asked |= {"image": encoded.opaque(images[0]), "prompt": ""}
        place = self.shelf.find("models", asked.get("model", self.shelf.default))
        if not await asyncio.to_thread(_is_led, place):
            asked.setdefault("strength", VARIATION_STRENGTH)
        return await self._answer(await self.desk.draw(asked, request), form, request)

    async def models(self, request: Request) -> Response:
        names = await asyncio.to_thread(self.shelf.names, "models")
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        self.shelf.find("models", name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "mlxdiff"}

    async def _form(self, request: Request) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """Fields of a form, and its pictures, decoded. Raises: UsageError."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise UsageError("the request is not multipart/form-data")
        fields: dict[str, Any] = {}
        files: dict[str, list[Any]] = {}
        async with request.form(max_files=20, max_fields=200) as form:
            for name, value in form.multi_items():
                name = name.removesuffix("[]")
                if isinstance(value, UploadFile):
                    if name not in ("image", "mask"):
                        raise UsageError(f"{name}: is not a picture that this request takes")
                    data, most = await value.read(), self.desk.limits.upload_pixels
                    picture = await asyncio.to_thread(encoded.decode, data, name, most)
                    files.setdefault(name, []).append(picture)
                elif name in ("image", "mask"):
                    raise UsageError(f"{name}: is a text; send a file")
                else:
                    fields[name] = _typed(name, value)
        return fields, files

    async def _answer(self, job: Job, form: Form, request: Request) -> Response:
        data = []
        for one in job.drawn:
            if form.is_url and one.id is not None:
                value = {"url": str(request.url.replace(path=f"/api/pictures/{one.id}.png"))}
            else:
                file = await asyncio.to_thread(formats.reencode, one.png, form.ending, form.quality)
                value = {"b64_json": base64.b64encode(file).decode()}
            data.append(value | {"seed": one.seed})
        named = {} if form.ending == ".png" else {"output_format": form.ending[1:]}
        return JSONResponse({"created": int(job.created), "data": data} | named)


def _is_led(place: Any) -> bool:
    """Return True if a picture leads a model on this machine: none starts from the picture."""
    try:
        return lacks(place, "variations") is None or lacks(place, "prompt") is not None
    except UsageError:  # it will be fetched first
        return False


def _asked(given: Mapping[str, Any]) -> tuple[dict[str, Any], Form]:
    """A request in our own form, and the form of the answer. Raises: UsageError."""
    asked = {name: value for name, value in given.items() if value is not None}
    for name, neutral in _NEUTRAL.items():
        value = asked.pop(name, neutral[0])
        if value not in neutral:
            raise UsageError(f"{name} is {value!r}, which is not here; leave it out")
    user = asked.pop("user", "")  # names a person to OpenAI; asks for nothing
    if not isinstance(user, str):
        raise UsageError(f"user is {user!r}; expected a text")
    form = _form_of(asked)
    if (count := asked.pop("n", None)) is not None:
        asked["count"] = count
    size = asked.pop("size", "auto")
    if size != "auto":
        sides = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if sides is None:
            raise UsageError(f"size is {size!r}; expected WIDTHxHEIGHT, such as 512x768, or auto")
        asked["width"], asked["height"] = int(sides[1]), int(sides[2])
    for name, value in asked.items():
        if name in options() and is_picture(options()[name].kind) and not isinstance(value, str):
            raise UsageError(f"{name}: expected a picture file in base64")
    return asked, form


def _form_of(asked: dict[str, Any]) -> Form:
    """Take the form of the answer out of a request. Raises: UsageError."""
    kind = asked.pop("response_format", "b64_json")
    if kind not in ("url", "b64_json"):
        raise UsageError(f"response_format is {kind!r}; expected url or b64_json")
    name = asked.pop("output_format", "png")
    if name not in ("png", "jpeg", "webp", "avif"):
        raise UsageError(f"output_format is {name!r}; expected png, jpeg, webp or avif")
    if kind == "url" and name != "png":
        raise UsageError("output_format: a url gives PNG; ask for b64_json")
    given = asked.pop("output_compression", None)
    quality = int(given) if isinstance(given, str) and given.isdecimal() else given
    if quality is not None and (type(quality) is not int or not 0 <= quality <= 100):
        raise UsageError(f"output_compression is {given!r}; expected 0 to 100")
    return Form(kind == "url", f".{name}", None if quality is None else max(1, quality))


def _typed(name: str, value: str) -> Any:
    """A field of a form, which is always a text, as its option takes it."""
    if name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "model", "size"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _rounded(size: tuple[int, int]) -> tuple[int, int]:
    """A size that every model can draw: multiples of 8."""
    width, height = size
    return max(8, width // 8 * 8), max(8, height // 8 * 8)


def error(message: str, status: int, cause: Exception) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = {429: "rate_limit_exceeded"}.get(status)
    if isinstance(cause, UnknownName) and cause.kind == "models":
        code = "model_not_found"
    first = re.match(r"([a-z_]+2?)(?: is |:)", message)
    param = None if isinstance(cause, HTTPException) or first is None else first[1]
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
