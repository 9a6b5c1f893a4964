"""Metadata of pictures: their settings, for people, for other programs and for replay.

A PNG of ours carries two text chunks. `mlxdiff` is JSON of a versioned schema with all that is
needed to make the picture again. `parameters` is the text that AUTOMATIC1111's web UI writes and
most programs and sites read; it holds the same, so that a copy without the JSON can be made again,
too. Neither names a folder of the machine it was made on.

Pictures of other programs are read by `foreign`, and give the same `Metadata`.
JPEG, WebP and AVIF files carry the text in EXIF's UserComment, as A1111's do, and the JSON in
EXIF's MakerNote, the field for data of the maker (EXIF 2.32, section 4.6.5).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from mlxdiff.errors import UsageError, one_line, quoted
from mlxdiff.pictures import foreign
from mlxdiff.pictures.foreign import a1111, stealth, translate
from mlxdiff.pictures.foreign.a1111 import NEGATIVE
from mlxdiff.pictures.foreign.record import Fields, Record, Texts
from mlxdiff.pictures.foreign.texts import EXIF_PART, MAKER_NOTE, USER_COMMENT, texts_of
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

_UPSCALER_IDS = {name: kind for kind, name in UPSCALER_NAMES.items()}
_RNG_NAMES = {"cpu": "CPU", "gpu": "NV", "numpy": "NumPy"}
OWN_PLACES = (PARAMETERS_KEY, "UserComment", "comment", "Comment", "Description")
"""Where our own text may stand in a copy of a picture."""

_OWN_VERSION = "mlxdiff "
_OUR_KEY = re.compile(r"[a-z][a-z0-9_]{0,60}")
_OWN_FIELDS = ("prompt_2", "negative_prompt_2", "guidance_rescale", "revision")
_IN_A1111S_WORDS = frozenset(
    {
        "strength", "hires", "hires_strength", "hires_steps", "hires_upscaler", "hires_size",
        "vary", "noise_size", "noise_seed_delta", "rng", "loras", "vae", "tool", "parameters",
    }
)  # fmt: skip
_SCALE = r"(-?[0-9.]{1,30}(?:e-?[0-9]{1,3})?)"
_LORA_TAG = re.compile(rf"<lora:[^<>:]{{1,300}}:{_SCALE}(?::{_SCALE})?>$")

MAKER = "mlxdiff\0"
"""Begins our note in EXIF's MakerNote, and in the comment of a GIF."""
_LONG, _UNDEFINED = 4, 7  # types of EXIF


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
        """The `parameters` chunk: prompt, negative prompt, and a line of `Key: value, ...`.

        A1111's names come first. What A1111 has no name for stands behind them under ours, so that
        the text alone is enough to make the picture again.
        """
        extra, ours = self.extra, self.version is not None
        hires = self._number("hires") is not None
        vary, size = _pair_of(extra.get("vary")), _pair_of(extra.get("noise_size"))
        tags, added = _lora_tags(extra.get("loras"))
        pairs: dict[str, object] = {
            "Steps": self.steps,
            "Sampler": SAMPLER_NAMES.get(self.sampler or "", self.sampler),
            "Schedule type": SCHEDULE_NAMES.get(self.schedule or "", self.schedule),
            "CFG scale": _number(self.guidance),
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}" if self.width and self.height else None,
            "Denoising strength": self._number("hires_strength" if hires else "strength"),
            "Hires upscale": self._number("hires"),
            "Hires steps": self._number("hires_steps"),
            "Hires upscaler": self._upscaler(),
            "Model": _stem(self.model),
            "VAE": extra.get("vae") if isinstance(extra.get("vae"), str) else None,
            "Variation seed": None if vary is None else _number(vary[0]),
            "Variation seed strength": None if vary is None else _number(vary[1]),
            "Seed resize from": None if size is None else f"{size[1]:g}x{size[0]:g}",
            "ENSD": self._number("noise_seed_delta"),
            "RNG": _RNG_NAMES.get(str(extra.get("rng", "cpu"))) if ours else None,
            "TI hashes": _ti_hashes(extra.get("embeddings")),
            "Lora hashes": _lora_hashes(extra.get("loras")),
            "Clip skip": self.clip_skip + 1 if self.clip_skip else None,
        }
        if ours:
            pairs |= self._own_pairs(added, hires)
            pairs["Version"] = f"mlxdiff {self.version}"
        line = ", ".join(f"{k}: {_quote(v)}" for k, v in pairs.items() if v is not None)
        prompt = " ".join(filter(None, (self.prompt, tags)))
        negative = f"\n{NEGATIVE} {self.negative_prompt}" if self.negative_prompt else ""
        # PNG text cannot hold NUL; the JSON chunk keeps it, escaped.
        return f"{prompt}{negative}\n{line}".strip().replace("\0", "")

    def _own_pairs(self, added: list[str], hires: bool) -> dict[str, object]:
        """Pairs under our own names: all that A1111 has no name for."""
        said = {key: value for key, value in self.extra.items() if key not in _IN_A1111S_WORDS}
        said |= {name: getattr(self, name) for name in _OWN_FIELDS}
        if hires:
            said["strength"] = self.extra.get("strength")
        said |= {"added_loras": added or None}
        said["empty_negative_prompt"] = self.negative_prompt == "" or None
        said["prompt_syntax"] = self.extra.get("prompt_syntax", "plain")
        said["guidance_rescale"] = said["guidance_rescale"] or None
        return {
            key.replace("_", " ").capitalize(): _as_text(value)
            for key, value in said.items()
            if value is not None and _OUR_KEY.fullmatch(key)
        }

    def _upscaler(self) -> str | None:
        value = self.extra.get("hires_upscaler")
        return UPSCALER_NAMES.get(value, value) if isinstance(value, str) else None

    def _number(self, name: str) -> str | None:
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
        """Read A1111's text, whoever wrote it; what has no field goes to `extra`.

        The last line is taken for settings only where it holds three pairs, the rule of A1111's
        own reader, and one of them has a name of A1111's. Values that cannot be what their key
        says, and what mlxdiff cannot honour, are in `extra["parameters"]`.
        """
        parts = a1111.split(text)
        if parts.pairs.get("Version", "").startswith(_OWN_VERSION):
            return cls._from_own_text(parts)
        return cls.from_record(a1111.of_text(parts))

    @classmethod
    def from_record(cls, record: Record) -> Metadata:
        """Take what a picture of another program says."""
        fields, extra = translate.settings(record)
        return cls(**fields, extra=extra)

    @classmethod
    def _from_own_text(cls, parts: a1111.Text) -> Metadata:
        """Read our own text alone, as a JPEG or a web site keeps it."""
        taken = Fields(parts.pairs)
        version = (taken.text("Version") or "")[len(_OWN_VERSION) :]
        size = taken.size("Size") or (None, None)
        vary = taken.whole("Variation seed"), taken.number("Variation seed strength")
        noise = taken.size("Seed resize from")
        strength, hires = taken.number("Denoising strength"), taken.number("Hires upscale")
        skipped, hashes = taken.whole("Clip skip"), taken.text("Lora hashes") or ""
        upscaler, rng = taken.text("Hires upscaler"), taken.text("RNG") or ""
        kinds = {name: kind for kind, name in _RNG_NAMES.items()}
        fields: dict[str, Any] = {
            "negative_prompt": parts.negative_prompt,
            "seed": taken.whole("Seed"),
            "width": size[0],
            "height": size[1],
            "steps": taken.whole("Steps"),
            "guidance": taken.number("CFG scale"),
            "sampler": _known(find_sampler, taken.text("Sampler")),
            "schedule": _known(find_schedule, taken.text("Schedule type")),
            "clip_skip": None if skipped is None else max(skipped - 1, 0),
            "model": taken.text("Model"),
            "version": version,
        }
        extra: dict[str, Any] = {
            "vae": taken.text("VAE"),
            "hires": hires,
            "hires_steps": taken.whole("Hires steps"),
            "hires_strength" if hires is not None else "strength": strength,
            "hires_upscaler": _UPSCALER_IDS.get(upscaler or "", upscaler),
            "noise_seed_delta": taken.whole("ENSD"),
            "vary": None if None in vary else list(vary),
            "noise_size": None if noise is None else [noise[1], noise[0]],
            "rng": None if rng == _RNG_NAMES["cpu"] else kinds.get(rng, rng or None),
        }
        taken.text("TI hashes")  # the embeddings stand under our own name as well
        own = {key.lower().replace(" ", "_"): _from_text(v) for key, v in taken.left.items()}
        known = {name: own.pop(name) for name in _OWN_FIELDS if name in own}
        fields |= {name: _checked(name, value, "parameters") for name, value in known.items()}
        if own.pop("empty_negative_prompt", None) and fields["negative_prompt"] is None:
            fields["negative_prompt"] = ""
        fields["prompt"], loras = _without_tags(parts.prompt, own.pop("added_loras", None), hashes)
        extra |= {"loras": loras or None, "without_syntax": "prompt_syntax" not in own or None}
        own = {key: value for key, value in own.items() if key not in {*FIELDS, "schema"}}
        return cls(**fields, extra={k: v for k, v in {**extra, **own}.items() if v is not None})


def read(path: str | os.PathLike[str]) -> Metadata:
    """Read the settings of a picture, of mlxdiff or of another program (`foreign`).

    Raises:
        UsageError: no such picture, no settings in it, a schema of another version, or settings of
            a program that is not known.
    """
    with open_picture(path) as picture:
        return of_picture(picture, str(path))


def of_picture(picture: Image.Image, where: str) -> Metadata:
    """Do the same as ``read``, for a picture that Pillow has opened.

    Args:
        where: its name, for messages.
    """
    try:
        texts = texts_of(picture)
        for note in (texts.pop("MakerNote", ""), texts.get("comment", "")):
            if note.startswith(MAKER):
                texts.setdefault(JSON_KEY, note.removeprefix(MAKER))
    except Exception as error:  # whatever a damaged file makes Pillow's many readers raise
        raise UsageError(f"{where}: cannot be decoded ({one_line(error)})") from error
    if JSON_KEY in texts:
        return Metadata.from_json(texts[JSON_KEY], where=where)
    if (found := _of_texts(texts)) is not None:
        return _with_size(found, picture)
    try:
        hidden = stealth.texts_of(picture)
    except Exception as error:
        raise UsageError(f"{where}: cannot be decoded ({one_line(error)})") from error
    if (found := _of_texts(hidden)) is not None:
        return _with_size(found, picture)
    if keys := foreign.unknown_keys(texts) or foreign.unknown_keys(hidden):
        raise UsageError(
            f"{where}: holds JSON of a program that mlxdiff does not read (with {keys}); give the "
            "settings as options"
        )
    raise UsageError(f"{where}: says nothing about how it was made (nothing that mlxdiff reads)")


def _with_size(found: Metadata, picture: Image.Image) -> Metadata:
    """Take the size of the picture where settings of another program name none."""
    if found.width or found.height or found.seed is None or found.version is not None:
        return found
    if "image" in found.extra or any(side % 8 for side in picture.size):
        return found
    return dataclasses.replace(found, width=picture.width, height=picture.height)


def _of_texts(texts: Texts) -> Metadata | None:
    """Read our own text, or those of other programs; None: there are none."""
    for place in OWN_PLACES:
        if _OWN_VERSION in texts.get(place, ""):
            parts = a1111.split(texts[place])
            if parts.pairs.get("Version", "").startswith(_OWN_VERSION):
                return Metadata._from_own_text(parts)
    record = foreign.read(texts)
    return None if record is None else Metadata.from_record(record)


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
    plain = not re.search("[,:\n]", text) and text == text.strip() and text[:1] != '"'
    return text if plain else json.dumps(text, ensure_ascii=False)


def _as_text(value: Any) -> str:
    """Write a value so that `_from_text` gives it again: JSON, or a text as it is."""
    if isinstance(value, str) and _from_text(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _from_text(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _known(find: Callable[[str], Any], name: str | None) -> Any:
    """Return our id of a name, or the name as it is."""
    found = None if name is None else find(name)
    return name if found is None else found[0] if isinstance(found, tuple) else found


def _pair_of(value: Any) -> tuple[float, float] | None:
    """Return two numbers of a list; the file may come from anyone."""
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))
    return (value[0], value[1]) if pair else None


def _lora_tags(loras: Any) -> tuple[str, list[str]]:
    """Return ``<lora:name:scale>`` of each LoRA that the prompt does not call, and their names."""
    tags, names = [], []
    for one in loras if isinstance(loras, list) else []:
        if not isinstance(one, dict) or one.get("in_prompt"):
            continue
        name, scale = one.get("name"), one.get("scale")
        text = one.get("text_scale", scale)
        if isinstance(name, str) and _is_number(scale) and _is_number(text):
            both = [scale] if text == scale else [text, scale]
            tags.append(f"<lora:{_tag_name(name)}:{':'.join(str(_number(n)) for n in both)}>")
            names.append(name)
    return " ".join(tags), names


def _tag_name(name: str) -> str:
    return re.sub(r"[<>:,\n]", "_", PurePosixPath(name).stem)


def _without_tags(prompt: str, names: Any, hashes: str) -> tuple[str, list[dict[str, Any]]]:
    """Undo `_lora_tags`: return the prompt, and the LoRAs that were added to it."""
    loras: list[dict[str, Any]] = []
    digests = dict(one.split(": ", 1) for one in hashes.split(", ") if ": " in one)
    for name in reversed(names if isinstance(names, list) else []):
        tag = _LORA_TAG.search(prompt)
        if tag is None or not isinstance(name, str):
            break
        text, unet = float(tag[1]), float(tag[2] or tag[1])
        entry: dict[str, Any] = {"name": name, "scale": unet}
        if text != unet:
            entry["text_scale"] = text
        if (digest := digests.get(PurePosixPath(name).stem)) is not None:
            entry["short_hash"] = digest
        loras.append(entry)
        prompt = prompt[: tag.start()].rstrip(" ")
    return prompt, loras[::-1]


def exif(metadata: Metadata, most: int | None = None) -> bytes:
    """Encode metadata as EXIF: A1111's text as UserComment, our JSON as MakerNote.

    Args:
        most: bytes that fit; None: any number. What does not fit is left out with a warning, our
            JSON first.
    """
    comment = b"UNICODE\0" + metadata.to_parameters().encode("utf-16-be", "replace")
    note = (MAKER + metadata.to_json()).encode()
    whole = _exif({USER_COMMENT: comment, MAKER_NOTE: note})
    if most is None or len(whole) <= most:
        return whole
    short = _exif({USER_COMMENT: comment})
    lost = "a part of the settings" if len(short) <= most else "the settings"
    logger.warning("%s did not fit into the file (%d bytes); PNG takes any", lost, len(whole))
    return short if len(short) <= most else _exif({})


def _exif(fields: dict[int, bytes]) -> bytes:
    """Encode tags of EXIF's inner part, with the type "undefined" as the standard has these tags.

    Pillow writes them as lists of numbers, and A1111 and others then read no text.
    """
    entries, data = b"", b""
    begin = 26 if fields else 8  # after the header and the outer part, of one entry
    place = begin + 6 + 12 * len(fields)
    for tag, value in sorted(fields.items()):
        entries += struct.pack(">HHII", tag, _UNDEFINED, len(value), place + len(data))
        data += value + bytes(len(value) % 2)
    outer = struct.pack(">HHHIII", 1, EXIF_PART, _LONG, 1, begin, 0) if fields else b""
    inner = struct.pack(">H", len(fields)) + entries + bytes(4)
    return b"Exif\0\0MM\0*\0\0\0\x08" + outer + inner + data
