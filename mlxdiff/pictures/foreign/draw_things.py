"""Draw Things: JSON in the ``exif:UserComment`` of an XMP packet.

XMP is XML from anyone: it is not parsed as such, so that it cannot name entities that grow.

Source: draw-things-community, Libraries/MetadataExtractor (names of the keys) and its
documentation of seed modes.
"""

from __future__ import annotations

import html

from mlxdiff.pictures.foreign.record import (
    UNNAMED,
    AddedLora,
    Fields,
    Record,
    Texts,
    document,
    file_name,
    number,
)

_LONGEST = 4 << 20
_SEED_MODES = {"torch cpu compatible": "cpu", "nvidia gpu compatible": "gpu"}
_SAYS_NOTHING = ("v2", "profile", "batch_size", "batchSize")


def read(texts: Texts) -> Record | None:
    """Read what Draw Things writes; see ``foreign.READERS``."""
    values = document(_comment(texts.get("XMP", "")))
    if not isinstance(values, dict) or "c" not in values:
        return None
    fields = Fields(values)
    record = Record(
        "Draw Things",
        prompt=fields.text("c") or "",
        negative_prompt=fields.text("uc"),
        seed=fields.whole("seed"),
        steps=fields.whole("steps"),
        guidance=fields.number("scale"),
        sampler=fields.text("sampler"),
        model=file_name(fields.text("model")),
        seed_order="a1111",
    )
    if (found := fields.size("size")) is not None:
        record.width, record.height = found
    strength = fields.number("strength")
    if strength is not None and strength < 1.0:
        record.strength, record.image = strength, UNNAMED
    more = values.get("v2")
    more = more if isinstance(more, dict) else {}
    skipped = Fields(more).whole("clipSkip")
    record.clip_skip = skipped if skipped and skipped > 1 else None
    mode = fields.text("seed_mode")
    record.rng = _SEED_MODES.get((mode or "").lower())
    if record.rng is None:
        record.name({"seed_mode": mode or "not said"})
    for one in (fields.listed("lora", "loras") or [])[:40]:
        if isinstance(one, dict) and isinstance(name := one.get("model") or one.get("file"), str):
            scale, file = number(one.get("weight", 1.0)), file_name(name)
            if scale is not None and file is not None:
                record.loras.append(AddedLora(file, scale))
    record.name(fields.left, _SAYS_NOTHING)
    return record


def _comment(xmp: str) -> str | None:
    """Return the JSON text of the comment in an XMP packet."""
    begin = xmp.find("UserComment")
    if begin < 0 or len(xmp) > _LONGEST:
        return None
    end = xmp.find("UserComment", begin + 1)
    inside = xmp[begin : end if end >= 0 else len(xmp)]
    first, last = inside.find("{"), inside.rfind("}")
    return html.unescape(inside[first : last + 1]) if 0 <= first < last else None
