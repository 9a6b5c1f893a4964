"""Which class a model has, by what its source says."""

from __future__ import annotations

from typing import Any

from mlxdiff.run.animation import AnimatingModel, animates
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.run.map_model import MapModel, makes_maps
from mlxdiff.run.model import Model
from mlxdiff.run.pixel_model import PixelModel
from mlxdiff.store.folder import ModelSource


def make_model(source: ModelSource, backend: Any) -> Model:
    """Return a model at work. No network is loaded. Raises: ConfigError, CheckpointError."""
    if source.family == "ddpm":
        return PixelModel(source, backend)
    kind = MapModel if makes_maps(source) else AnimatingModel if animates(source) else LatentModel
    return kind(source, backend)
