"""Networks as they are trained: built from layers with gradients, and fed with batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdiff.backends import mlx_training_layers
from mlxdiff.backends.mlx_training import TrainingBackend
from mlxdiff.networks import registry
from mlxdiff.networks.condition import Condition
from mlxdiff.networks.config import ComponentConfig
from mlxdiff.networks.layers import Module
from mlxdiff.run.kind import Network
from mlxdiff.run.model import Model
from mlxdiff.store.folder import ModelSource
from mlxdiff.training.data import Batch
from mlxdiff.training.data_cache import digest_of


class States(NamedTuple):
    """States of the text encoders, as ``training.data.Text`` has them, as arrays of MLX."""

    states: mx.array
    pooled: mx.array | None


def build(config: ComponentConfig) -> Module:
    """Return a network all of whose parameters are trained; each must be ``put``."""
    return trained(registry.build(mlx_training_layers, config))


def trained(network: Module) -> Module:
    """Let all parameters of a network have gradients; return it."""
    for layer in network.modules():  # type: ignore[attr-defined]
        if hasattr(type(layer), "trained"):
            layer.trained = True
    return network


def load(model: Model, name: str, dtype: str = "float32", all_trained: bool = False) -> Module:
    """Return a network of a model with its weights.

    Frozen weights stay as they are stored: quantized, or in half precision.

    Args:
        name: the component.
        dtype: what is computed in.
        all_trained: its parameters will be replaced by trained ones, each of them.
    """
    component = model.component_of(Network(name))
    if all_trained:
        return build(component.config)
    backend = TrainingBackend(dtype)
    return backend.load(component.config, component.tensors(), keep_stored=True)


def conditions(batch: Batch, text: States | None = None) -> dict[str, mx.array]:
    """Return what a U-Net takes of a batch beside latents and timesteps.

    Args:
        text: states of the captions, where text encoders or words are trained.
    """
    found: dict[str, mx.array] = {}
    if text is None and batch.text is not None:
        pooled = batch.text.pooled
        text = States(mx.array(batch.text.states), None if pooled is None else mx.array(pooled))
    if text is not None:
        found["encoder_hidden_states"] = text.states
        if batch.time_ids is not None and text.pooled is not None:
            found["text_embeds"] = text.pooled
    if batch.time_ids is not None:
        found["time_ids"] = mx.array(batch.time_ids)
    return found


def encode(
    source: ModelSource,
    encoders: Mapping[str, Module],
    tokens: Mapping[str, np.ndarray],
    vectors: Mapping[str, mx.array] | None = None,
) -> States:
    """Run text encoders on tokens, as ``text.encoders`` does for a plain prompt.

    Args:
        tokens: text encoder -> (B, T) int32.
        vectors: text encoder -> (N, D), of words that are not in the vocabulary.
    """
    penultimate = source.config("unet").addition_embed_type == "text_time"
    states, pooled = [], None
    for name, ids in tokens.items():
        out = encoders[name](mx.array(ids), None if vectors is None else vectors.get(name))
        states.append(out.hidden_states[-2] if penultimate else out.last_hidden_state)
        pooled = out.text_embeds if penultimate else None
    return States(mx.concatenate(states, axis=-1).astype(mx.float32), pooled)


BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer", "Attention")
GATES = ("GEGLU",)
"""Kinds of modules that ``checkpoint`` takes. Gates hold most of what a transformer keeps, and are
quick to compute again."""


def checkpoint(
    network: Module, parameters: Mapping[str, Any], kinds: tuple[str, ...] = BLOCKS
) -> None:
    """Let modules of these kinds keep no more of the forward pass than their inputs.

    The gradient computes them again (Chen et al. 2016).

    Args:
        parameters: names of the trained parameters.
        kinds: BLOCKS or GATES.
    """
    for path, layer in network.named_modules():  # type: ignore[attr-defined]
        kind = type(layer)
        if kind.__name__ not in kinds or (kind.__name__ == "Attention" and "transformer" in path):
            continue
        prefix = f"{path}."
        own = tuple(name[len(prefix) :] for name in parameters if name.startswith(prefix))
        layer.__class__ = _checkpointed(kind)  # type: ignore[arg-type]
        layer._own = own


@cache
def _checkpointed(kind: Any) -> Any:
    def call(self: Any, *inputs: Any) -> Any:
        """Compute from arrays alone: what MLX computes again is a function of arrays."""
        values = [_get(self, name) for name in self._own]
        is_condition = [isinstance(one, Condition) for one in inputs]
        plain = [one.values if isinstance(one, Condition) else one for one in inputs]
        arrays = [one for one in plain if isinstance(one, mx.array)]
        # The function must not hold arrays of its own: MLX keeps it as long as the result.
        others = [None if isinstance(one, mx.array) else one for one in plain]
        is_array = [isinstance(one, mx.array) for one in plain]

        def run(*given_arrays: mx.array) -> Any:
            before = [_get(self, name) for name in self._own]
            for name, value in zip(self._own, given_arrays, strict=False):
                self.put(name, value)
            rest = iter(given_arrays[len(before) :])
            given = [
                next(rest) if known else one for known, one in zip(is_array, others, strict=True)
            ]
            given = [
                Condition(one) if wrap else one
                for wrap, one in zip(is_condition, given, strict=True)
            ]
            out = kind.__call__(self, *given)
            for name, value in zip(self._own, before, strict=True):
                self.put(name, value)
            return out

        return mlx_training_layers.checkpointed(run)(*values, *arrays)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _get(module: Any, name: str) -> mx.array:
    for part in name.split("."):
        module = module[int(part)] if isinstance(module, list) else module[part]
    found: mx.array = module
    return found


def digest(source: ModelSource) -> str:
    """Return a hash of the weights that training starts from, in hex."""
    found = {name: digest_of(source, name) for name in source.components if name != "vae"}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def json_of(source: ModelSource, component: str) -> dict[str, Any]:
    """Return the content of a component's config.json."""
    found: dict[str, Any] = json.loads(source.documents()[f"{component}/config.json"])
    return found


def strings(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return facts as the metadata of a safetensors file: strings; tables as JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in facts.items()
    }
