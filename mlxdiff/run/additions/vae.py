"""Another VAE in place of the model's own: an AutoencoderKL, or a TAESD."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mlxdiff.convert import Component, open_vae
from mlxdiff.errors import UsageError
from mlxdiff.networks.config import AutoencoderTinyConfig
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
            for name in ("latent_channels", "factor"):
                expected, found = getattr(own, name), getattr(vae.config, name)
                if found != expected:
                    raise UsageError(
                        f"{vae.provenance['source']}: this VAE has {name.replace('_', ' ')} "
                        f"{found}, the model's own {expected}; use one made for this model"
                    )
            if model.upscales:
                note_scale(model.source, vae.config)
            else:
                _check_scale(vae, own)
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


def _check_scale(vae: Component, own: Any) -> None:
    """Refuse a VAE of another family: its latents have another scale or mean.

    A TAESD is made for the scale of its family, and its config does not say which.
    Raises: UsageError.
    """
    found = vae.config
    if isinstance(found, AutoencoderTinyConfig) or isinstance(own, AutoencoderTinyConfig):
        return
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        ours, theirs = getattr(own, name) or 0.0, getattr(found, name) or 0.0
        if not np.allclose(ours, theirs, rtol=1e-3, atol=1e-6):
            raise UsageError(
                f"{vae.provenance['source']}: this VAE is of another family: its {name} is "
                f"{theirs or 'none'}, that of the model's own {ours or 'none'}; use one made for "
                "this model"
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
