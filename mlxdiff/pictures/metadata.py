"""Metadata of pictures: their settings, for people, for other programs and for replay.

A PNG of ours carries two text chunks. `parameters` is the text that AUTOMATIC1111's web UI writes
and most programs and sites read. `mlxdiff` is JSON of a versioned schema with all that is needed to
make the picture again. Neither names a folder of the machine it was made on. JPEG, WebP and AVIF
files carry the first in EXIF's UserComment, as A1111's do, and the second in EXIF's MakerNote, the
field for data of the maker.

Source: stable-diffusion-webui, modules/processing.py (create_infotext) and
modules/infotext_utils.py (parse_generation_parameters, quote); sampler and schedule names:
modules/sd_samplers_kdiffusion.py, modules/sd_schedulers.py; EXIF 2.32, section 4.6.5.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from mlxdiff.errors import UsageError, one_line, quoted
from mlxdiff.pictures.image import open_picture
from mlxdiff.samplers.names import SAMPLER_NAMES, SCHEDULE_NAMES, find_sampler, find_schedule

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("mlxdiff")

SCHEMA = "mlxdiff.image/1"
PARAMETERS_KEY, JSON_KEY = "parameters", "mlxdiff"

UPSCALER_NAMES = {
    "lanczos": "Lanczos",
    "latent-nearest": "Latent (nearest)",
    "latent-bilinear": "Latent",
}
"""Our ids of what enlarges a picture -> A1111's "Hires upscaler"."""

_KEY = re.compile(r"\w[\w \-/]+")
_VALUE = re.compile(r'\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})")
_NEGATIVE = "Negative prompt:"

_EXIF_IFD, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C
_MAKER = b"mlxdiff\0"


@dataclass(frozen=True)
class Metadata:
    """Settings of one picture; None: not used or, in a file from elsewhere, not known.

    Attributes:
        prompt, negative_prompt: the text; a negative prompt of None and of "" differ where the
            model's do.
        prompt_2, negative_prompt_2: for the second text encoder of SDXL.
        seed: of this picture (not of the batch).
        width, height: pixels.
        steps, guidance, guidance_rescale: as given to the pipeline.
        sampler, schedule: ids, resolved (never "auto" in a file of ours); a name that A1111 has and
            we have not is kept as it is written.
        clip_skip: as diffusers counts it: 0 or None takes the last layer (A1111 calls that 1).
        model: repo id, or name of the file or folder; a path is cut to its last part.
        revision: commit of the repo.
        dtype, backend: what computed it.
        version: of mlxdiff; None in files of other programs.
        extra: everything else, JSON values by option name.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    clip_skip: int | None = None
    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    backend: str | None = None
    version: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model is not None:
            object.__setattr__(self, "model", _public_name(self.model))
        clash = sorted({*FIELDS, "schema"} & set(self.extra))
        if clash:
            raise ValueError(f"extra must not repeat a field: {', '.join(clash)}")

    # Out

    def chunks(self) -> dict[str, str]:
        """The text chunks of a PNG, for `image.save_png`."""
        return {PARAMETERS_KEY: self.to_parameters(), JSON_KEY: self.to_json()}

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values: fields, absent ones as None, and `extra` beside them."""
        return {"schema": SCHEMA, **{k: getattr(self, k) for k in FIELDS}, **self.extra}

    def to_json(self) -> str:
        """The `mlxdiff` chunk: `to_dict` as JSON, in ASCII."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_parameters(self) -> str:
        """The `parameters` chunk: prompt, negative prompt, and a line of `Key: value, ...`."""
        pairs = {
            "Steps": self.steps,
            "Sampler": SAMPLER_NAMES.get(self.sampler or "", self.sampler),
            "Schedule type": SCHEDULE_NAMES.get(self.schedule or "", self.schedule),
            "CFG scale": _number(self.guidance),
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}" if self.width and self.height else None,
            "Denoising strength": self._extra_number("hires_strength"),
            "Hires upscale": self._extra_number("hires"),
            "Hires upscaler": UPSCALER_NAMES.get(str(self.extra.get("hires_upscaler"))),
            "Model": _stem(self.model),
            "RNG": "CPU" if self.version else None,
            "TI hashes": _ti_hashes(self.extra.get("embeddings")),
            "Lora hashes": _lora_hashes(self.extra.get("loras")),
            "Clip skip": self.clip_skip + 1 if self.clip_skip else None,
            "Version": f"mlxdiff {self.version}" if self.version else None,
        }
        line = ", ".join(f"{k}: {_quote(v)}" for k, v in pairs.items() if v is not None)
        negative = f"\n{_NEGATIVE} {self.negative_prompt}" if self.negative_prompt else ""
        # PNG text cannot hold NUL; the JSON chunk keeps it, escaped.
        return f"{self.prompt}{negative}\n{line}".strip().replace("\0", "")

    def _extra_number(self, name: str) -> str | None:
        """A number of `extra` as A1111 writes it; None where it is absent or no number."""
        value = self.extra.get(name)
        return _number(value) if _is_number(value) else None

    # In

    @classmethod
    def from_json(cls, text: str, where: str = JSON_KEY) -> Metadata:
        """Reads the `mlxdiff` chunk. Keys it does not know go to `extra`.

        Raises:
            UsageError: not JSON, of another schema, or a value of the wrong type.
        """
        try:
            values = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: its mlxdiff metadata is not JSON ({one_line(error)})"
            ) from None
        if not isinstance(values, dict):
            raise UsageError(f"{where}: its mlxdiff metadata is not a JSON object")
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise UsageError(
                f"{where}: its mlxdiff metadata has schema {quoted(schema)}, "
                f"this version reads {SCHEMA!r}; upgrade mlxdiff"
            )
        known = {name: values.pop(name) for name in FIELDS if name in values}
        for name, value in known.items():
            known[name] = _checked(name, value, where)
        return cls(**known, extra=values)

    @classmethod
    def from_parameters(cls, text: str) -> Metadata:
        """Reads A1111's text, whoever wrote it; what has no field goes to `extra["parameters"]`.

        The last line is taken for parameters only where it holds three pairs, the rule of A1111's
        own reader. Values that cannot be what their key says are left in `extra`.
        """
        lines = text.strip().split("\n")
        pairs = _pairs(lines[-1])
        if len(pairs) < 3:
            pairs = []
        else:
            lines.pop()
        prompts: tuple[list[str], list[str]] = ([], [])
        negative = False
        for line in map(str.strip, lines):
            if line.startswith(_NEGATIVE):
                negative, line = True, line[len(_NEGATIVE) :].strip()
            prompts[negative].append(line)
        rest = {key: _unquote(value) for key, value in pairs}

        def take(key: str, kind: type) -> Any:
            try:
                value = kind(rest[key])
            except (KeyError, ValueError):
                return None
            if kind is float and not math.isfinite(value):
                return None
            del rest[key]
            return value

        size = _SIZE.fullmatch(rest.get("Size", ""))
        if size:
            del rest["Size"]
        sampler, schedule = _sampler_and_schedule(take("Sampler", str), take("Schedule type", str))
        clip_skip = take("Clip skip", int)
        version = rest.get("Version", "")
        rest = {key: value for key, value in rest.items() if value is not None}
        return cls(
            # Empty lines at the beginning are lost on A1111's reader, and so here.
            prompt="\n".join(prompts[0]).lstrip("\n"),
            negative_prompt="\n".join(prompts[1]).lstrip("\n") if negative else None,
            seed=take("Seed", int),
            width=int(size[1]) if size else None,
            height=int(size[2]) if size else None,
            steps=take("Steps", int),
            guidance=take("CFG scale", float),
            sampler=sampler,
            schedule=schedule,
            clip_skip=None if clip_skip is None else max(clip_skip - 1, 0),
            model=take("Model", str),
            version=version[8:] if version.startswith("mlxdiff ") else None,
            extra={"parameters": rest} if rest else {},
        )


def read(path: str | os.PathLike[str]) -> Metadata:
    """Read the settings of a picture, from our JSON or else from A1111's text.

    A PNG carries them as text chunks; JPEG, WebP and AVIF carry them in EXIF.

    Raises:
        UsageError: no such picture, no such text in it, or a schema of another version.
    """
    with open_picture(path) as picture:
        return of_picture(picture, str(path))


def of_picture(picture: Image.Image, where: str) -> Metadata:
    """Do the same as ``read``, for a picture that Pillow has opened.

    Args:
        where: its name, for messages.
    """
    try:
        # Text after the pixels is seen only once they are read.
        texts: Mapping[Any, Any] = getattr(picture, "text", None) or picture.info
        comment, note = _exif_comment(picture), _exif_note(picture)
    except Exception as error:  # whatever a damaged file makes Pillow's many readers raise
        raise UsageError(f"{where}: cannot be decoded ({one_line(error)})") from error
    ours = texts.get(JSON_KEY) or note
    if isinstance(ours, str):
        return Metadata.from_json(ours, where=where)
    parameters = texts.get(PARAMETERS_KEY) or comment
    if not isinstance(parameters, str) or not parameters.strip():
        raise UsageError(
            f"{where}: says nothing about how it was made (neither an mlxdiff nor a parameters "
            "text)"
        )
    return Metadata.from_parameters(parameters)


FIELDS = tuple(f.name for f in dataclasses.fields(Metadata) if f.name != "extra")
"""Names that have a field of their own; all others are in `extra`."""
_INTEGERS = {"seed", "width", "height", "steps", "clip_skip"}
_FLOATS = {"guidance", "guidance_rescale"}


def _checked(name: str, value: Any, where: str) -> Any:
    """A value of the JSON chunk, if it is of its field's type: the file may come from anyone."""
    if value is None and name != "prompt":
        return None
    if name in _INTEGERS:
        kind, good = "an integer", type(value) is int
    elif name in _FLOATS:
        kind, good = "a number", _is_number(value)
    else:
        kind, good = "a text", type(value) is str
    if not good:
        raise UsageError(
            f"{where}: {name} in its mlxdiff metadata is {quoted(value)}, expected {kind}"
        )
    return float(value) if name in _FLOATS else value


def _is_number(value: Any) -> bool:
    """Return True for a finite number in the range of a float. JSON has others (1e999)."""
    return type(value) in (int, float) and abs(value) < 1e308


def _pairs(line: str) -> list[tuple[str, str]]:
    """Split ``Key: value, ...`` as A1111's regular expression does, in linear time.

    A key is what stands before a colon: word characters, blanks, hyphens and slashes, from the
    first word character on. A value ends at a comma, or is quoted.
    """
    pairs = []
    place, colon = 0, line.find(":")
    while colon >= 0:
        begin = colon
        while begin > place and (line[begin - 1].isalnum() or line[begin - 1] in "_ -/"):
            begin -= 1
        key = _KEY.search(line, begin, colon)
        if key is not None:
            value = _VALUE.match(line, colon + 1)
            assert value is not None  # it matches everywhere
            pairs.append((key[0], value[1]))
            place = value.end()
        colon = line.find(":", max(place, colon + 1))
    return pairs


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _public_name(model: str) -> str:
    """A repo id as it is, of a path the last part alone."""
    is_path = (
        model.startswith((".", "~", "/", "\\"))
        or PureWindowsPath(model).drive != ""
        or model.count("/") > 1
        or "\\" in model
    )
    return (PureWindowsPath(model).name or model.strip("/\\")) if is_path else model


def _stem(model: str | None) -> str | None:
    """A1111 names a checkpoint file without its ending."""
    if model is not None and model.endswith((".safetensors", ".ckpt")):
        return PurePosixPath(model).stem
    return model


def _ti_hashes(embeddings: Any) -> str | None:
    """A1111's ``name: hash, name: hash`` of textual inversions."""
    pairs = [
        f"{PurePosixPath(name).stem}: {digest[:12]}"
        for name, digest in _texts_of(embeddings, "name", "sha256")
    ]
    return ", ".join(pairs) or None


def _lora_hashes(loras: Any) -> str | None:
    """A1111's ``name: hash, name: hash``, by which it and Civitai find LoRAs."""
    pairs = [
        f"{PurePosixPath(name).stem}: {digest}"
        for name, digest in _texts_of(loras, "name", "short_hash")
    ]
    return ", ".join(pairs) or None


def _texts_of(entries: Any, first: str, second: str) -> list[tuple[str, str]]:
    """Two texts of each entry of a list that has both; the file may come from anyone."""
    found = [
        (one.get(first), one.get(second))
        for one in (entries if isinstance(entries, list) else [])
        if isinstance(one, dict)
    ]
    return [(a, b) for a, b in found if isinstance(a, str) and isinstance(b, str)]


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _quote(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text


def _unquote(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _sampler_and_schedule(name: str | None, kind: str | None) -> tuple[str | None, str | None]:
    """Return our ids of A1111's names. An unknown name stays as it is."""
    if name is None:
        return None, None if kind is None else find_schedule(kind) or kind
    sampler, own = find_sampler(name) or (name, None)
    if kind is None:
        return sampler, own or "auto"
    return sampler, find_schedule(kind) or kind


def exif(metadata: Metadata, most: int | None = None) -> bytes:
    """Encode metadata as EXIF: A1111's text as UserComment, our JSON as MakerNote.

    Args:
        most: bytes that fit; None: any number. What does not fit is left out with a warning, our
            JSON first.
    """
    comment = b"UNICODE\0" + metadata.to_parameters().encode("utf-16-be", "replace")
    note = _MAKER + metadata.to_json().encode()
    whole = _exif({_USER_COMMENT: comment, _MAKER_NOTE: note})
    if most is None or len(whole) <= most:
        return whole
    short = _exif({_USER_COMMENT: comment})
    lost = "a part of the settings" if len(short) <= most else "the settings"
    logger.warning("%s did not fit into the file (%d bytes); PNG takes any", lost, len(whole))
    return short if len(short) <= most else _exif({})


def _exif(fields: dict[int, bytes]) -> bytes:
    from PIL import Image

    made = Image.Exif()
    made.get_ifd(_EXIF_IFD).update(fields)
    return made.tobytes()


def _exif_note(picture: Image.Image) -> str | None:
    """Our JSON in EXIF's MakerNote."""
    note = picture.getexif().get_ifd(_EXIF_IFD).get(_MAKER_NOTE)
    if not isinstance(note, bytes) or not note.startswith(_MAKER):
        return None
    return note[len(_MAKER) :].decode("utf-8", "replace")


def _exif_comment(picture: Image.Image) -> str | None:
    """EXIF UserComment: eight bytes name the encoding, then the text."""
    comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes):
        return comment
    code, body = comment[:8], comment[8:]
    if code.startswith(b"UNICODE"):
        # Written as UTF-16 big-endian by A1111 whatever the file's byte order; by others as they
        # like.
        little = body.startswith(b"\xff\xfe") or body[1:2] == b"\0" != body[:1]
        return body.decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff")
    return body.decode("utf-8", "replace")
