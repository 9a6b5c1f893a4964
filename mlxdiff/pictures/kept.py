"""What a picture file says beside its pixels, kept for a picture that is made from it."""

from __future__ import annotations

import os
from dataclasses import replace

from mlxdiff.errors import UsageError
from mlxdiff.pictures import metadata
from mlxdiff.pictures.image import open_picture


def kept_text(
    path: str | os.PathLike[str], upscaler: str, scale: float
) -> tuple[dict[str, str], bytes | None]:
    """Return the text chunks and the color profile for an enlarged picture.

    Prompt and settings stay; the upscaler is added to them: in a file of ours under the name of the
    option, so that the whole is drawn again from it, in one of A1111 as A1111 does it.

    Args:
        path: of the small picture.
        upscaler: name of the network.
        scale: how many times larger the picture is.
    """
    with open_picture(path) as picture:
        profile = picture.info.get("icc_profile")
        try:
            found = metadata.of_picture(picture, str(path))
        except UsageError:  # it says nothing that is understood
            found = None
        own = getattr(picture, "text", None) or {}
        text = {key: str(value) for key, value in own.items() if isinstance(value, str)}
    if found is not None and found.version is not None:
        text |= replace(found, extra={**found.extra, "upscaler": upscaler}).chunks()
    elif found is not None:
        said = text.get(metadata.PARAMETERS_KEY) or found.to_parameters()
        added = f"Postprocess upscale by: {scale:g}, Postprocess upscaler: {upscaler}"
        text[metadata.PARAMETERS_KEY] = f"{said}, {added}"
    return text, profile if isinstance(profile, bytes) else None
