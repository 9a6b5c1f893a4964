"""SwarmUI: JSON with ``sui_image_params`` in ``parameters``, the EXIF comment or the tag Model.

Source: SwarmUI, src/Text2Image/T2IParamInput.cs (GenRawMetadata) and T2IParamTypes.cs (names).
"""

from __future__ import annotations

from mlxdiff.pictures.foreign.record import (
    UNNAMED,
    AddedLora,
    Fields,
    Record,
    Texts,
    edges,
    file_name,
    number,
)

_DEFAULT_SAMPLER = "Euler"
_SAYS_NOTHING = (
    "aspectratio", "sidelength", "automaticvae", "nopreviews", "images", "donotsave", "batchsize",
    "imageformat", "personalnote",
)  # fmt: skip


def read(texts: Texts) -> Record | None:
    """Read what SwarmUI writes; see ``foreign.READERS``."""
    for values in texts.documents.values():
        if isinstance(params := values.get("sui_image_params"), dict):
            return _read(Fields(params))
    return None


def _read(fields: Fields) -> Record:
    record = Record(
        "SwarmUI",
        version=fields.text("swarm_version"),
        prompt=fields.text("prompt") or "",
        negative_prompt=fields.text("negativeprompt"),
        seed=fields.whole("seed"),
        steps=fields.whole("steps"),
        guidance=fields.number("cfgscale"),
        width=fields.whole("width"),
        height=fields.whole("height"),
        sampler=fields.text("sampler", "comfyuisampler", "autowebuisampler") or _DEFAULT_SAMPLER,
        schedule=fields.text("scheduler", "comfyuischeduler"),
        even=True,
        model=file_name(fields.text("model")),
        vae=file_name(fields.text("vae")),
        rng="cpu",
        sampler_rng="gpu",
        seed_order="a1111",
    )
    record.seamless = edges(fields.text("seamlesstileable"))
    layer = fields.whole("clipstopatlayer")
    record.clip_skip = None if layer is None else abs(layer)
    share = fields.number("variationseedstrength")
    if share and 0.0 < share <= 1.0:
        record.vary = fields.whole("variationseed") or 0, share
    elif not share:
        fields.whole("variationseed")
    strength = fields.number("initimagecreativity")
    if strength is not None and "initimage" in fields.left:
        record.strength, record.image = strength, UNNAMED
        del fields.left["initimage"]
        if fields.left.pop("maskimage", None):
            record.mask = UNNAMED
    names, weights = fields.listed("loras") or [], fields.listed("loraweights") or []
    for place, name in enumerate(names[:40]):
        scale = number(weights[place]) if place < len(weights) else 1.0
        if isinstance(name, str) and scale is not None and (file := file_name(name)) is not None:
            record.loras.append(AddedLora(file, scale))
    record.name(fields.left, _SAYS_NOTHING)
    return record
