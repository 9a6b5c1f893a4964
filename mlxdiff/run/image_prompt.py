"""Pictures as prompts (IP-Adapter): what each adapter is shown, and what it adds to the text.

Encoded as diffusers' pipelines do it: the negative prompt is given zeros in place of CLIP's vector,
or what CLIP says of a picture of zeros where an adapter reads all of its vectors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.networks.condition import Condition
from mlxdiff.pictures.image import load_image, to_clip
from mlxdiff.run.model import Model
from mlxdiff.run.values import finite_number, listed


@dataclass(frozen=True)
class ImagePrompt:
    """What one IP-Adapter is shown.

    Attributes:
        images: uint8 (H, W, 3), of any size each.
        names: of their files, or what they were given as.
        scale: times what it adds to what the text says.
    """

    images: tuple[np.ndarray, ...] = field(repr=False, compare=False)
    names: tuple[str, ...]
    scale: float = 1.0


def resolve_image_prompts(
    count: int, ip_image: Any = None, ip_scale: Any = None
) -> tuple[ImagePrompt, ...]:
    """Check the arguments of ``generate`` for IP-Adapters.

    Args:
        count: how many IP-Adapters there are.
        ip_image: for one adapter a picture, or several for it to see together; else one for each.
        ip_scale: one number for all adapters, or one for each.
    Raises: UsageError.
    """
    images, scales = listed(ip_image), listed(ip_scale) or [1.0]
    if count == 0:
        for name, value in (("ip_image", ip_image), ("ip_scale", ip_scale)):
            if value is not None:
                raise UsageError(f"{name}: there is no IP-Adapter; give one (--ip-adapter)")
        return ()
    adapters = "1 IP-Adapter" if count == 1 else f"{count} IP-Adapters"
    if not images or count not in (1, len(images)):
        found = {0: "no image", 1: "1 image"}.get(len(images), f"{len(images)} images")
        raise UsageError(
            f"{adapters} and {found} to see: give one for each, in the same order (--ip-image)"
        )
    if len(scales) not in (1, count):
        raise UsageError(
            f"{len(scales)} values of ip_scale for {adapters}: give one, or one for each"
        )
    scales = [finite_number("ip_scale", scale) for scale in scales] * (count // len(scales))
    shown = [images] if count == 1 else [[image] for image in images]
    return tuple(
        ImagePrompt(
            images=tuple(load_image(image) for image in seen),
            names=tuple(
                Path(image).name if isinstance(image, (str, os.PathLike)) else "(pixels)"
                for image in seen
            ),
            scale=scale,
        )
        for seen, scale in zip(shown, scales, strict=True)
    )


def describe(prompts: Sequence[ImagePrompt], names: Sequence[str], encoder: str) -> dict[str, Any]:
    """What a picture's metadata says of its IP-Adapters.

    Args:
        prompts: of the run.
        names: of the adapters.
        encoder: the image encoder.
    """
    if not prompts:
        return {}
    return {
        "ip_adapter": list(names),
        "image_encoder": encoder,
        "ip_image": [name for prompt in prompts for name in prompt.names],
        "ip_scale": [prompt.scale for prompt in prompts],
    }


def put_beside(
    text: Condition, unet: Any, model: Model, prompts: Sequence[ImagePrompt], batch: int
) -> None:
    """Let the U-Net's layers that read the text see the pictures beside it.

    Args:
        text: by the U-Net's ``read``; the prompt's states last.
        unet: the U-Net.
        model: whose IP-Adapters they are.
        prompts: what each adapter is shown.
        batch: rows of the text; all but the last see no picture.
    """
    backend = model.backend
    encoder = model.take("image_encoder_0")
    size = model.added["image_encoder_0"].config.image_size

    def features(pixels: np.ndarray, kind: str) -> Any:
        out = encoder(backend.asarray(pixels))
        return out.image_embeds if kind == "image" else out.hidden_states[-2]

    for name, prompt in zip(model.ip_adapters, prompts, strict=True):
        if prompt.scale == 0:
            continue
        adapter, kind = model.take(name), model.added[name].config.kind
        pixels = np.concatenate([to_clip(image, size) for image in prompt.images])
        found = features(pixels, kind)
        if batch > 1:
            blank = 0 * found if kind == "image" else features(np.zeros_like(pixels), kind)
            found = backend.concatenate([blank] * (batch - 1) + [found], 0)
        tokens = adapter.tokens(found)
        # The tokens of all pictures stand in one row.
        tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        made = adapter.keys_values(tokens)
        for layer, (keys, values) in zip(unet.cross_attentions(), made, strict=True):
            backend.evaluate(keys, values)
            text.put_beside(layer, keys, values, prompt.scale)
