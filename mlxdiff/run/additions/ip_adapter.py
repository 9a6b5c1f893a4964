"""IP-Adapters: pictures as prompts, which the U-Net's layers see beside the text.

Pictures are encoded as in diffusers' pipelines. The negative prompt gets zeros in place of CLIP's
vector; for an adapter that reads all of CLIP's vectors it gets those of a picture of zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlxdiff.convert import Component, open_ip_adapter
from mlxdiff.errors import UsageError, argument
from mlxdiff.pictures.image import load_image, to_clip
from mlxdiff.run.additions import Acting, Addition, Fetch, Prompted, named
from mlxdiff.run.kind import Kind
from mlxdiff.run.memory import UNetRun, Work, activation_bytes
from mlxdiff.run.values import listed

NETWORK, ENCODER = "ip_adapter", "image_encoder"


@dataclass(frozen=True)
class ImagePrompt:
    """The pictures of one IP-Adapter in a run.

    Attributes:
        images: uint8 (H, W, 3), each of any size.
        names: names of their files, or "(pixels)".
        scale: factor of what the pictures add to the text.
    """

    images: tuple[np.ndarray, ...] = field(repr=False, compare=False)
    names: tuple[str, ...]
    scale: float = 1.0


def resolve_image_prompts(
    count: int, ip_image: Any = None, ip_scale: Any = None
) -> tuple[ImagePrompt, ...]:
    """Check the arguments of ``generate`` for IP-Adapters.

    Args:
        count: number of IP-Adapters.
        ip_image: for one adapter a picture, or several that it sees together; else one for each.
        ip_scale: one number for all adapters, or one for each.
    Raises: UsageError.
    """
    images, scales = listed(ip_image), listed(ip_scale) or [1.0]
    if count == 0:
        for name, value in (("ip_image", ip_image), ("ip_scale", ip_scale)):
            if value is not None:
                raise UsageError(
                    f"{argument(name)}: there is no IP-Adapter; give one "
                    f"({argument('ip_adapters')})"
                )
        return ()
    adapters = "1 IP-Adapter" if count == 1 else f"{count} IP-Adapters"
    if not images or count not in (1, len(images)):
        found = {0: "no image", 1: "1 image"}.get(len(images), f"{len(images)} images")
        raise UsageError(
            f"{adapters} and {found} to see: give one for each, in the same order "
            f"({argument('ip_image')})"
        )
    if len(scales) not in (1, count):
        raise UsageError(
            f"{len(scales)} values of {argument('ip_scale')} for {adapters}: give one, or one for "
            "each"
        )
    scales = scales * (count // len(scales))
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


@dataclass(frozen=True, eq=False)
class IPAdapter(Addition):
    """A network that lets the U-Net's layers see pictures beside the text.

    Attributes:
        adapter: the network.
        encoder: the CLIP image encoder that it reads; all IP-Adapters of a model share one.
    """

    part: ClassVar[str] = "ip_adapter"

    adapter: Component = field(repr=False)
    encoder: Component = field(repr=False)

    @classmethod
    def open(
        cls,
        paths: Iterable[str | os.PathLike[str]],
        model: Kind,
        image_encoder: str | os.PathLike[str] | None,
        fetch: Fetch,
    ) -> tuple[IPAdapter, ...]:
        """Open IP-Adapters for a model.

        Args:
            paths, image_encoder: as ``convert.open_ip_adapter`` takes them.
        Raises: UsageError, CheckpointError, ConfigError, HubError.
        """
        pairs = [
            open_ip_adapter(path, model.unet_config, image_encoder, fetch.variant, fetch.progress)
            for path in paths
        ]
        if any(encoder.config != pairs[0][1].config for _, encoder in pairs):
            raise UsageError("IP-Adapters of different image encoders cannot be used together")
        return tuple(cls(adapter, pairs[0][1]) for adapter, _ in pairs)

    @property
    def networks(self) -> Mapping[str, Component]:
        """See ``Addition.networks``."""
        return {NETWORK: self.adapter, ENCODER: self.encoder}

    def work(self, run: UNetRun) -> Work:
        """The image encoder runs once, before the U-Net."""
        need = activation_bytes(self.encoder.config, run.device, batch=run.pictures)
        return Work(before=need)

    @classmethod
    def describe(cls, items: Sequence[IPAdapter], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        prompts: Sequence[ImagePrompt] = settings.image_prompts
        return {
            "ip_adapter": [named(one.adapter.provenance) for one in items],
            "image_encoder": named(items[0].encoder.provenance),
            "ip_image": [name for prompt in prompts for name in prompt.names],
            "ip_scale": [prompt.scale for prompt in prompts],
        }

    @classmethod
    def act(cls, items: Sequence[IPAdapter], prompted: Prompted) -> Sequence[Acting]:
        """Let the U-Net's layers that read the text see the pictures beside it.

        The rows of the text before the last see no picture.
        """
        backend, batch = prompted.backend, prompted.batch
        encoder = prompted.take(ENCODER, 0)
        size = items[0].encoder.config.image_size

        def features(pixels: np.ndarray, kind: str) -> Any:
            out = encoder(backend.asarray(pixels))
            return out.image_embeds if kind == "image" else out.hidden_states[-2]

        prompts: Sequence[ImagePrompt] = prompted.settings.image_prompts
        for i, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
            if prompt.scale == 0:
                continue
            adapter, kind = prompted.take(NETWORK, i), item.adapter.config.kind
            pixels = np.concatenate([to_clip(image, size) for image in prompt.images])
            found = features(pixels, kind)
            if batch > 1:
                blank = 0 * found if kind == "image" else features(np.zeros_like(pixels), kind)
                found = backend.concatenate([blank] * (batch - 1) + [found], 0)
            tokens = adapter.tokens(found)
            # The tokens of all pictures stand in one row.
            tokens = tokens.reshape(batch, -1, tokens.shape[-1])
            made = adapter.keys_values(tokens)
            for layer, (keys, values) in zip(prompted.unet.cross_attentions(), made, strict=True):
                layer.keep_beside(prompted.text, keys, values, prompt.scale)
        return ()
