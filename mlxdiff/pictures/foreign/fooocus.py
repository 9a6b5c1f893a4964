"""Fooocus and RuinedFooocus: JSON in ``parameters``, the EXIF comment or ``Comment``.

Source: Fooocus, modules/meta_parser.py (FooocusMetadataParser) and modules/private_logger.py;
RuinedFooocus, modules/async_worker.py.
"""

from __future__ import annotations

from typing import Any

from mlxdiff.pictures.foreign.record import (
    AddedLora,
    Fields,
    Record,
    Texts,
    file_name,
    number,
)

_SAYS_NOTHING = ("version", "Version", "created_by", "software", "type", "Metadata Scheme")
_MOST_LORAS = 40


def read(texts: Texts) -> Record | None:
    """Read what Fooocus writes; see ``foreign.READERS``."""
    for values in texts.documents.values():
        ruined = values.get("software") == "RuinedFooocus" or "base_model_name" in values
        said = str(values.get("version") or values.get("Version") or "").lower()
        if ruined or "fooocus" in said or "base_model_hash" in values or "Base Model" in values:
            return _read(Fields(values), "RuinedFooocus" if ruined else "Fooocus")
    return None


def _read(fields: Fields, tool: str) -> Record:
    record = Record(
        tool,
        version=fields.text("version", "Version"),
        prompt=fields.text("prompt", "Prompt") or "",
        negative_prompt=fields.text("negative_prompt", "Negative Prompt", "Negative"),
        seed=fields.whole("seed", "Seed"),
        steps=fields.whole("steps", "Steps"),
        guidance=fields.number("guidance_scale", "Guidance Scale", "cfg"),
        sampler=fields.text("sampler", "Sampler", "sampler_name"),
        schedule=fields.text("scheduler", "Scheduler"),
        even=True,
        clip_skip=fields.whole("clip_skip", "CLIP Skip"),
        width=fields.whole("width"),
        height=fields.whole("height"),
        model=file_name(fields.text("base_model", "Base Model", "base_model_name")),
        rng="cpu",
        sampler_rng="gpu",
        seed_order="a1111",
    )
    if (found := fields.size("resolution", "Resolution")) is not None:
        record.width, record.height = found
    vae = fields.text("vae", "VAE")
    record.vae = None if vae is None or vae.startswith("Default") else file_name(vae)
    record.loras = _loras(fields)
    for key in ("full_prompt", "full_negative_prompt"):
        if fields.left.get(key) in ([record.prompt], [record.negative_prompt]):
            del fields.left[key]  # no style has changed it
    if fields.left.get("refiner_model", fields.left.get("Refiner Model")) in ("None", "", None):
        for key in ("refiner_model", "refiner_switch", "Refiner Model", "Refiner Switch"):
            fields.left.pop(key, None)
    record.name(fields.left, _SAYS_NOTHING)
    return record


def _loras(fields: Fields) -> list[AddedLora]:
    """LoRAs: a list of [name, weight, hash], or ``LoRA 1: name : weight``."""
    found: list[Any] = []
    for one in fields.listed("loras") or []:
        if isinstance(one, list) and len(one) >= 2:
            found.append((one[0], one[1]))
        elif isinstance(one, dict):
            found.append((one.get("name"), one.get("weight")))
    for i in range(1, _MOST_LORAS):
        for key in (f"LoRA {i}", f"lora_combined_{i}"):
            if (text := fields.text(key)) is not None:
                parts = [part.strip() for part in text.split(" : ")]
                if len(parts) == 3 and parts[0] != "True":
                    continue  # not switched on
                found.append((parts[-2] if len(parts) > 1 else parts[0], parts[-1]))
    loras = []
    for name, weight in found[:_MOST_LORAS]:
        scale = number(weight)
        file = file_name(name) if isinstance(name, str) else None
        if file is not None and scale is not None:
            loras.append(AddedLora(file, scale))
    return loras
