"""Networks that training runs, and what they take: built from the layers that can be trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdiff.backends.mlx_training import TrainingBackend
from mlxdiff.networks import registry
from mlxdiff.networks.config import ComponentConfig
from mlxdiff.networks.layers import Module
from mlxdiff.run.kind import Network
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.store.folder import ModelSource
from mlxdiff.training.data import Batch
from mlxdiff.training.data_cache import digest_of


class States(NamedTuple):
    """States of the text encoders: (B, T, D), and pooled (B, P) or None."""

    states: mx.array
    pooled: mx.array | None


def build(config: ComponentConfig) -> Any:
    """Build a network without weights."""
    return registry.build(TrainingBackend.layers, config)


def load(model: LatentModel, name: str, dtype: str = "float32") -> Any:
    """Load a network of a model, with its weights as they are stored."""
    component = model.component_of(Network(name))
    return TrainingBackend(dtype).load(component.config, component.tensors())


def conditions(batch: Batch, text: States | None = None) -> dict[str, mx.array]:
    """Return what a U-Net with text takes beside the noisy latents and the timesteps.

    Args:
        batch: the examples.
        text: their captions, where the batch has only tokens.
    """
    if text is None:
        assert batch.text is not None
        pooled = batch.text.pooled
        text = States(mx.array(batch.text.states), None if pooled is None else mx.array(pooled))
    told = {"encoder_hidden_states": text.states}
    if text.pooled is not None and batch.time_ids is not None:
        told |= {"text_embeds": text.pooled, "time_ids": mx.array(batch.time_ids)}
    return told


def encode(
    encoders: Mapping[str, Module],
    tokens: Mapping[str, np.ndarray],
    vectors: Mapping[str, mx.array] | None = None,
    *,
    penultimate: bool,
) -> States:
    """Run the text encoders.

    Args:
        encoders: in the model's order.
        tokens: encoder -> (B, T) ids.
        vectors: encoder -> (N, D), for ids beyond the vocabulary.
        penultimate: read the layer before the last, and the pooled output of the last encoder
            (SDXL).
    """
    states, pooled = [], None
    for name, encoder in encoders.items():
        own = None if vectors is None else vectors.get(name)
        out = encoder(mx.array(tokens[name]), own)
        states.append(out.hidden_states[-2] if penultimate else out.last_hidden_state)
        pooled = out.text_embeds if penultimate else None
    return States(mx.concatenate(states, axis=-1), pooled)


def digest(source: ModelSource) -> str:
    """Return a hash of the weights that decide what a U-Net learns."""
    names = [name for name in source.components if name != "vae"]
    return "-".join(digest_of(source, name)[:16] for name in names)


def json_of(source: ModelSource, component: str) -> dict[str, Any]:
    """Return the content of a component's config.json."""
    data: dict[str, Any] = json.loads(source.documents()[f"{component}/config.json"])
    return data


def strings(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return facts as the header of a safetensors file holds them."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in facts.items()
    }
