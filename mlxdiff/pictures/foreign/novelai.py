"""NovelAI: ``Software: NovelAI``, the prompt in ``Description``, JSON in ``Comment``.

The same stands in the lowest bits of alpha (``stealth``), where chunks are lost.

Source: NovelAI's pictures, as novelai-image-metadata (NovelAI's own, MIT) reads them.
"""

from __future__ import annotations

import re
from typing import Any

from mlxdiff.pictures.foreign.record import UNNAMED, Fields, Record, Texts

_WEIGHTS = re.compile(r"[{}\[\]]|::")
_SAYS_NOTHING = (
    "n_samples",
    "hide_debug_overlay",
    "request_type",
    "signed_hash",
    "add_original_image",
    "version",
    "legacy",
    "legacy_uc",
    "legacy_v3_extend",
    "use_coords",
    "stream",
    "cfg_sched_eligibility",
)


def read(texts: Texts) -> Record | None:
    """Read what NovelAI writes; see ``foreign.READERS``."""
    values = texts.documents.get("Comment")
    if texts.get("Software") != "NovelAI" or values is None:
        return None
    fields = Fields(values)
    record = Record(
        "NovelAI",
        version=texts.get("Source"),
        syntax="plain",
        prompt=fields.text("prompt") or texts.get("Description", ""),
        negative_prompt=fields.text("uc"),
        seed=fields.whole("seed"),
        steps=fields.whole("steps"),
        guidance=fields.number("scale"),
        guidance_rescale=fields.number("cfg_rescale"),
        width=fields.whole("width"),
        height=fields.whole("height"),
        sampler=fields.text("sampler"),
        schedule=fields.text("noise_schedule"),
        model=texts.get("Source"),
        even=True,
        rng="gpu",
    )
    if "strength" in fields.left and record.steps is not None:
        strength = fields.number("strength")
        if strength is not None and str(values.get("request_type", "")).startswith("Image2Image"):
            record.strength, record.image = strength, UNNAMED
    for key in ("uncond_scale", "skip_cfg_above_sigma", "skip_cfg_below_sigma", "noise"):
        if fields.left.get(key) in (0, 0.0, 1.0):  # off
            del fields.left[key]
    if not values.get("dynamic_thresholding"):
        for key in ("dynamic_thresholding_percentile", "dynamic_thresholding_mimic_scale"):
            fields.left.pop(key, None)
    for key in ("v4_prompt", "v4_negative_prompt"):
        if _is_plain(fields.left.get(key)):
            del fields.left[key]  # the prompt once more
    record.name_weights(_WEIGHTS, "NovelAI's, such as {word}, [word] or 1.2::word::")
    record.name(fields.left, _SAYS_NOTHING)
    return record


def _is_plain(caption: Any) -> bool:
    """Return True for a prompt of version 4 without characters of its own."""
    inner = caption.get("caption") if isinstance(caption, dict) else None
    return isinstance(inner, dict) and not inner.get("char_captions")
