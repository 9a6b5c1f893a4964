"""What ``train distill`` trains: a LoRA for one guidance scale, or a whole U-Net for many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdiff.backends import mlx_training_layers
from mlxdiff.networks import registry
from mlxdiff.run.kind import Network
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.samplers.guidance import guidance_scale_embedding
from mlxdiff.store.folder import json_bytes
from mlxdiff.training import consistency, folders, networks
from mlxdiff.training.data import Batch
from mlxdiff.training.lora import LoRA

EMBEDDING = 256
"""Values that a guidance scale becomes: ``time_cond_proj_dim``, as the published LCMs have."""

CONDITION = "time_embedding.cond_proj.weight"


class DistilledLoRA(LoRA):
    """A LoRA of few steps (LCM-LoRA). Without its changes the network is the teacher."""

    kind = "distilled lora"

    def predict(
        self,
        parameters: Mapping[str, mx.array],
        batch: Batch,
        noisy: mx.array,
        timesteps: mx.array,
        scales: np.ndarray | None = None,
    ) -> mx.array:
        """Run the student. It knows one guidance scale, so ``scales`` say nothing."""
        return super().predict(parameters, batch, noisy, timesteps)

    def teach(self, batch: Batch, noisy: mx.array, timesteps: mx.array) -> mx.array:
        """Run the teacher: with the first weights, which change nothing."""
        return super().predict(self.parameters(), batch, noisy, timesteps)


class DistilledModel:
    """All weights of a U-Net, which gets the guidance scale as an input.

    Args:
        model: the teacher.
        solver_steps: timesteps that it is distilled on, for the scheduler's config.
        dtype: what the teacher is computed in.
    """

    kind = "distilled model"

    def __init__(self, model: LatentModel, solver_steps: int, dtype: str = "float32") -> None:
        self._source, self._solver_steps = model.source, solver_steps
        self._teacher = networks.load(model, "unet", dtype)
        config = model.component_of(Network("unet")).config
        self._config = replace(config, time_cond_proj_dim=EMBEDDING)
        self._unet = networks.trained(registry.build(mlx_training_layers, self._config))

    def parameters(self) -> dict[str, mx.array]:
        """Return the teacher's weights. The guidance scale changes nothing at first."""
        found = {
            name: mx.array(np.asarray(tensor.read(), np.float32))
            for name, tensor in self._source.tensors("unet").items()
        }
        return {**found, CONDITION: mx.zeros((self._inputs(), EMBEDDING))}

    def _inputs(self) -> int:
        """Values of the first linear layer of the timestep."""
        shape = self._source.tensors("unet")["time_embedding.linear_1.weight"].shape
        return int(shape[1])

    def predict(
        self,
        parameters: Mapping[str, mx.array],
        batch: Batch,
        noisy: mx.array,
        timesteps: mx.array,
        scales: np.ndarray | None = None,
    ) -> mx.array:
        """Run the student."""
        assert scales is not None
        for name, value in parameters.items():
            self._unet.put(name, value)
        embedding = [guidance_scale_embedding(float(scale), EMBEDDING) for scale in scales]
        found: mx.array = self._unet(
            noisy,
            timesteps,
            timestep_cond=mx.array(np.concatenate(embedding)),
            **networks.conditions(batch),
        )
        return found

    def teach(self, batch: Batch, noisy: mx.array, timesteps: mx.array) -> mx.array:
        """Run the teacher."""
        found: mx.array = self._teacher(noisy, timesteps, **networks.conditions(batch))
        return found

    def save(
        self, parameters: Mapping[str, np.ndarray], path: Path, facts: Mapping[str, Any]
    ) -> list[Path]:
        """Write a folder that mlxdiff and diffusers open as a latent consistency model."""
        base = self._source.provenance.get("source", self._source.path.name)
        lines = [
            f"{base}, distilled with mlxdiff to few steps (a latent consistency model: sampler "
            "lcm, 4 steps). The licence is that of the source."
        ]
        model = _ConsistencyModel(
            self._source, "unet", parameters, facts, self._config, self._solver_steps
        )
        folders.write_model(model, path, "float32", folders.model_card(path.name, lines, facts))
        return [path]

    def identity(self) -> dict[str, Any]:
        """Return what must not change when a run goes on."""
        return {"model": networks.digest(self._source)}


class _ConsistencyModel(folders.TrainedModel):
    """A model whose U-Net takes the guidance scale, and whose sampler is LCM's."""

    def __init__(
        self,
        source: Any,
        component: str,
        weights: Mapping[str, np.ndarray],
        facts: Mapping[str, Any],
        config: Any,
        solver_steps: int,
    ) -> None:
        super().__init__(source, component, weights, facts, config)
        kept = {
            name: value
            for name, value in source.scheduler_config.items()
            if name in _PROCESS and value is not None
        }
        self.scheduler_config = {
            "_class_name": "LCMScheduler",
            **kept,
            "clip_sample": False,
            "original_inference_steps": solver_steps,
            "timestep_scaling": consistency.SCALING,
            "set_alpha_to_one": True,
        }
        self.model_index = {**source.model_index, "scheduler": ["diffusers", "LCMScheduler"]}
        if "_class_name" in self.model_index and source.family != "sdxl":
            self.model_index["_class_name"] = "LatentConsistencyModelPipeline"

    def documents(self) -> dict[str, bytes]:
        """Return all files except the weights."""
        found = super().documents()
        unet = {**json.loads(found["unet/config.json"]), "time_cond_proj_dim": EMBEDDING}
        return {
            **found,
            "unet/config.json": json_bytes(unet),
            "scheduler/scheduler_config.json": json_bytes(dict(self.scheduler_config)),
            "model_index.json": json_bytes(dict(self.model_index)),
        }


_PROCESS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)
"""What a scheduler's config says of the forward process."""
