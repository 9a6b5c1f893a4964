"""Train all weights of a model's U-Net: for small models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdiff.run.latent_model import LatentModel
from mlxdiff.training import folders, networks
from mlxdiff.training.data import Batch


class Finetune:
    """The task of training all weights of a U-Net with text."""

    kind = "finetune"

    def __init__(self, model: LatentModel) -> None:
        self._source = model.source
        self._unet = networks.load(model, "unet", all_trained=True)

    def parameters(self) -> dict[str, mx.array]:
        """Return the weights that training begins with."""
        return {
            name: mx.array(np.asarray(tensor.read(), np.float32))
            for name, tensor in self._source.tensors("unet").items()
        }

    def predict(
        self, parameters: Mapping[str, mx.array], batch: Batch, noisy: mx.array, timesteps: mx.array
    ) -> mx.array:
        """Run the network with these weights."""
        for name, value in parameters.items():
            self._unet.put(name, value)
        found: mx.array = self._unet(noisy, timesteps, **networks.conditions(batch))
        return found

    def save(
        self, parameters: Mapping[str, np.ndarray], path: Path, facts: Mapping[str, Any]
    ) -> list[Path]:
        """Write a folder that mlxdiff and diffusers open."""
        model = folders.TrainedModel(self._source, "unet", parameters, facts)
        base = self._source.provenance.get("source", self._source.path.name)
        lines = [
            f"The U-Net of {base}, trained further with mlxdiff. The licence is that of the source."
        ]
        folders.write_model(model, path, "float32", folders.model_card(path.name, lines, facts))
        return [path]

    def identity(self) -> dict[str, Any]:
        """Return what must not change when a run goes on."""
        return {"model": networks.digest(self._source)}
