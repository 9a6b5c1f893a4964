"""Another VAE in place of the model's own: an AutoencoderKL, or a TAESD."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlxdiff.convert import Component, open_vae
from mlxdiff.errors import UsageError
from mlxdiff.networks.config import AutoencoderKLConfig
from mlxdiff.run.additions import Addition, Fetch, Path, named
from mlxdiff.run.kind import UPSCALER_SCALE, Kind
from mlxdiff.store.folder import ModelSource

logger = logging.getLogger("mlxdiff")


@dataclass(frozen=True, eq=False)
class AnotherVAE(Addition):
    """A VAE that encodes and decodes in place of the model's own."""

    part: ClassVar[str] = "vae"

    component: Component = field(repr=False)

    @classmethod
    def open(cls, paths: Iterable[Path], model: Kind, fetch: Fetch) -> tuple[AnotherVAE, ...]:
        """Open a VAE for a model.

        Args:
            paths: one, as ``convert.open_vae`` takes it.
        Raises: CheckpointError, ConfigError, HubError; UsageError if its latents are others.
        """
        paths = list(paths)
        if not paths:
            return ()
        source = model.source
        own = source.config("vae")
        replaced = Component(own, lambda: source.tensors("vae"), source.provenance)
        opened = [open_vae(path, fetch.variant, fetch.progress, replaced) for path in paths]
        for vae in opened:
            check_scale(vae, own, model)
            for name in ("latent_channels", "factor"):
                expected, found = getattr(own, name), getattr(vae.config, name)
                if found != expected:
                    raise UsageError(
                        f"{vae.provenance['source']}: this VAE has {name.replace('_', ' ')} "
                        f"{found}, the model's own {expected}; use one made for this model"
                    )
            if model.upscales:
                note_scale(model.source, vae.config)
        return tuple(cls(vae) for vae in opened)

    @property
    def changes(self) -> Sequence[str]:
        """The VAE."""
        return ("vae",)

    @classmethod
    def change(cls, items: Sequence[AnotherVAE], name: str, component: Component) -> Component:
        """See ``Addition.change``."""
        return items[-1].component

    @classmethod
    def describe(cls, items: Sequence[AnotherVAE], settings: Any) -> dict[str, Any]:
        """See ``Addition.describe``."""
        return {"vae": named(items[-1].component.provenance)}


def check_scale(vae: Component, own: Any, model: Kind) -> None:
    """Refuse a VAE whose latents have another scale. Raises: UsageError."""
    kinds = [type(one) for one in (vae.config, own)]
    scales = vae.config.scaling_factor, own.scaling_factor
    if kinds == [AutoencoderKLConfig] * 2 and scales[0] != scales[1] and not model.upscales:
        raise UsageError(
            f"{vae.provenance['source']}: this VAE's latents have the scale {scales[0]:g}, the "
            f"model's {scales[1]:g}; it belongs to another family (SDXL has 0.13025, SD 1 and 2 "
            "have 0.18215); use one made for this model"
        )


def note_scale(source: ModelSource, vae: Any) -> None:
    """Warn if the scaling_factor of an upscaler's VAE is not taken from its config."""
    if vae.scaling_factor != UPSCALER_SCALE:
        logger.warning(
            "%s: scaling_factor of the VAE is taken for %g, not %g, as the reference does for "
            "upscalers",
            source.path,
            UPSCALER_SCALE,
            vae.scaling_factor,
        )
