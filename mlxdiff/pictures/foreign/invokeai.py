"""InvokeAI, in three forms: ``invokeai_metadata`` (3 and later), ``sd-metadata`` (2), ``Dream``.

Source: InvokeAI, invokeai/app/invocations/metadata.py (CoreMetadataInvocation) and
denoise_latents.py (the noise of the steps comes from the seed with all bits inverted); for the old
forms ldm/invoke/args.py at 2.3.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from mlxdiff.pictures.foreign.record import (
    COMPEL,
    UNNAMED,
    AddedLora,
    Fields,
    Record,
    Texts,
    file_name,
    number,
    whole,
)

_SAYS_NOTHING = (
    "app_id",
    "model_hash",
    "type",
    "generation_mode",
    "controlnets",
    "ipAdapters",
    "t2iAdapters",
    "_canvas_objects",
    "ref_images",
    "canvas_v2_metadata",
)
_NEGATIVE = re.compile(r"\[([^\[\]]*)\]")
_LONGEST_DREAM = 100_000


def read(texts: Texts) -> Record | None:
    """Read what InvokeAI writes; see ``foreign.READERS``."""
    record = _read(texts)
    if record is not None:
        record.name_weights(COMPEL, "Compel's, such as word++ or (words)1.2")
    return record


def _read(texts: Texts) -> Record | None:
    if values := texts.documents.get("invokeai_metadata"):
        return _of_3(Fields(values))
    values = texts.documents.get("sd-metadata", {})
    if isinstance(values.get("image"), dict):
        return _of_2(Fields(values), Fields(values["image"]))
    dream = texts.get("Dream")
    return None if dream is None or len(dream) > _LONGEST_DREAM else _of_dream(dream)


def _of_3(fields: Fields) -> Record:
    record = Record(
        "InvokeAI",
        version=fields.text("app_version", "imageai_version"),
        syntax="plain",
        prompt=fields.text("positive_prompt") or "",
        negative_prompt=fields.text("negative_prompt"),
        prompt_2=fields.text("positive_style_prompt") or None,
        negative_prompt_2=fields.text("negative_style_prompt") or None,
        seed=fields.whole("seed"),
        steps=fields.whole("steps"),
        guidance=fields.number("cfg_scale"),
        guidance_rescale=fields.number("cfg_rescale_multiplier"),
        width=fields.whole("width"),
        height=fields.whole("height"),
        sampler=fields.text("scheduler"),
        model=_model_name(fields.left.pop("model", None)),
        vae=_model_name(fields.left.pop("vae", None)),
        rng="gpu" if fields.text("rand_device") == "cuda" else "cpu",
        sampler_rng="gpu",
    )
    if record.seed is not None:
        record.noise_seed_delta = (record.seed ^ 0xFFFFFFFF) - record.seed
    skipped = fields.whole("clip_skip")
    record.clip_skip = None if skipped is None else skipped + 1
    mode = str(fields.left.get("generation_mode", "txt2img"))
    strength = fields.number("strength")
    image = fields.text("init_image")
    if "txt2img" not in mode or image:
        record.strength, record.image = strength, file_name(image) or UNNAMED
        if "inpaint" in mode or "outpaint" in mode:
            record.mask = UNNAMED
    if sides := [side for side in "xy" if fields.left.get(f"seamless_{side}") is True]:
        record.seamless = "".join(sides)
        fields.left |= {f"seamless_{side}": False for side in sides}
    for one in (fields.listed("loras") or [])[:40]:
        _add_lora(record, one)
    for key in ("controlnets", "ipAdapters", "t2iAdapters"):
        if one := fields.left.get(key):
            record.name({key: one})
    if not fields.left.get("refiner_model"):
        fields.left = {k: v for k, v in fields.left.items() if not k.startswith("refiner_")}
    record.name(fields.left, _SAYS_NOTHING)
    return record


def _model_name(model: Any) -> str | None:
    if isinstance(model, Mapping):
        model = model.get("name") or model.get("model_name")
    return file_name(model) if isinstance(model, str) else None


def _add_lora(record: Record, one: Any) -> None:
    if not isinstance(one, dict):
        return
    name = _model_name(one.get("model") or one.get("lora"))
    scale = number(one.get("weight", 1.0))
    if name is not None and scale is not None:
        record.loras.append(AddedLora(name, scale))


def _of_2(top: Fields, fields: Fields) -> Record:
    prompt = fields.left.pop("prompt", "")
    if isinstance(prompt, list):
        first = prompt[0] if prompt else None
        if len(prompt) > 1:
            fields.left["prompt"] = prompt[1:]  # blended
        prompt = first.get("prompt", "") if isinstance(first, dict) else first
    record = _old_record(prompt if isinstance(prompt, str) else "")
    record.version = top.text("app_version")
    record.model = file_name(top.text("model_weights", "model"))
    record.seed = fields.whole("seed")
    record.steps = fields.whole("steps")
    record.guidance = fields.number("cfg_scale")
    record.width, record.height = fields.whole("width"), fields.whole("height")
    record.sampler = fields.text("sampler")
    strength = fields.number("strength")
    if fields.left.get("type") == "img2img":
        record.strength, record.image = strength, UNNAMED
        fields.left.pop("orig_hash", None)
    top.left.pop("image", None)
    top.left.pop("model", None)
    nothing = {k: v for k, v in fields.left.items() if v != 0}
    record.name({**top.left, **nothing}, _SAYS_NOTHING)
    return record


def _old_record(prompt: str) -> Record:
    """Return a record with a prompt whose negative parts stand in square brackets."""
    negative = " ".join(part.strip() for part in _NEGATIVE.findall(prompt))
    return Record(
        "InvokeAI",
        syntax="plain",
        prompt=" ".join(_NEGATIVE.sub(" ", prompt).split()) if negative else prompt.strip(),
        negative_prompt=negative or None,
        rng="gpu",
    )


def _of_dream(text: str) -> Record | None:
    """Read ``"a red circle [blurry]" -s 50 -S 123 -W 512 -H 512 -C 7.5 -A k_lms``."""
    try:
        first, *words = shlex.split(text)
    except ValueError:  # no closing quote, or nothing
        return None
    while words and not words[0].startswith("-"):  # a prompt without quotes
        first += f" {words.pop(0)}"
    record = _old_record(first)
    fields: dict[str, str] = {}
    flag = ""
    for word in words:
        if word.startswith("-") and number(word) is None:
            flag, glued = (word, "") if word.startswith("--") else (word[:2], word[2:])
            fields[flag] = glued
        elif flag:
            fields[flag] = word

    def take(*flags: str) -> str | None:
        return next((fields.pop(flag) for flag in flags if flag in fields), None)

    record.steps = whole(take("-s", "--steps"))
    record.seed = whole(take("-S", "--seed"))
    record.width, record.height = whole(take("-W", "--width")), whole(take("-H", "--height"))
    record.guidance = number(take("-C", "--cfg_scale"))
    record.sampler = take("-A", "--sampler")
    image, strength = take("-I", "--init_img"), take("-f", "--strength")
    if image is not None:
        record.image, record.strength = file_name(image), number(strength)
    record.name({key: value or "on" for key, value in fields.items()})
    return record
