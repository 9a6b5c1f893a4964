"""Train a ControlNet for a model, from the U-Net's own weights (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.networks.condition import Condition
from mlxdiff.networks.config import ControlNetConfig
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.store.folder import json_bytes
from mlxdiff.training import folders, fresh, networks
from mlxdiff.training.data import Batch

WIDTHS = (16, 32, 96, 256)
"""Channels of the layers that see the control image, from the picture's size to the latents'."""

# Keys of a U-Net's config.json that its ControlNet has, too.
_SHARED = (
    *("act_fn", "addition_embed_type", "addition_time_embed_dim", "attention_head_dim"),
    *("block_out_channels", "class_embed_type", "cross_attention_dim", "down_block_types"),
    *("downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block"),
    *("mid_block_scale_factor", "mid_block_type", "norm_eps", "norm_num_groups"),
    *("num_attention_heads", "num_class_embeds", "only_cross_attention"),
    *("projection_class_embeddings_input_dim", "resnet_time_scale_shift"),
    *("transformer_layers_per_block", "upcast_attention", "use_linear_projection"),
)


def config_for(unet: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Return the config.json of a ControlNet for a U-Net.

    Args:
        unet: content of the U-Net's config.json.
        factor: of the VAE, pixels for each latent along a side.
    """
    halvings = factor.bit_length() - 1
    widths = WIDTHS[: halvings + 1] if halvings < len(WIDTHS) else None
    if widths is None or 2**halvings != factor:
        raise UsageError(f"a VAE of factor {factor} has no form of ControlNet; 2, 4 and 8 have one")
    return {
        "_class_name": "ControlNetModel",
        **{key: unet[key] for key in _SHARED if key in unet},
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": list(widths),
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
    }


class TrainControlNet:
    """The task of training a ControlNet beside a U-Net that does not change.

    Args:
        model: the model that it is for.
        images: some control images, (N, H, W, 3) float32 in [0, 1], for the first weights.
        seed: of the first weights.
    """

    kind = "controlnet"

    def __init__(self, model: LatentModel, images: np.ndarray, seed: int) -> None:
        self._source = model.source
        unet_config = networks.json_of(model.source, "unet")
        self._json = config_for(unet_config, model.vae_config.factor)
        config = ControlNetConfig.from_dict(self._json, "the new ControlNet")
        tensors = model.source.tensors("unet")
        unet = {name: np.asarray(tensor.read(), np.float32) for name, tensor in tensors.items()}
        self._first = fresh.controlnet(config, unet, seed, images)
        self._net: Any = networks.build(config)
        self._unet = networks.load(model, "unet")

    def parameters(self) -> dict[str, mx.array]:
        """Return the first weights."""
        return {name: mx.array(values) for name, values in self._first.items()}

    def predict(
        self, parameters: Mapping[str, mx.array], batch: Batch, noisy: mx.array, timesteps: mx.array
    ) -> mx.array:
        """Run the U-Net with what the ControlNet adds."""
        net, unet = self._net, self._unet
        for name, value in parameters.items():
            net.put(name, value)
        told = networks.conditions(batch)
        states = told.pop("encoder_hidden_states")
        assert batch.hint is not None
        image = net.embed_image(mx.array(batch.hint))
        temb = Condition(net.embed(timesteps, **told))
        added = net.predict(noisy, temb, net.read(states), image)
        found: mx.array = unet(noisy, timesteps, states, **told, residuals=added)
        return found

    def save(
        self, parameters: Mapping[str, np.ndarray], path: Path, facts: Mapping[str, Any]
    ) -> list[Path]:
        """Write a folder that mlxdiff and diffusers open."""
        base = self._source.provenance.get("source", self._source.path.name)
        lines = [f"A ControlNet for {base}, trained with mlxdiff."]
        card = folders.model_card(path.name, lines, facts)
        folders.write_network(parameters, self._json, facts, path, "float32", card)
        return [path]

    def identity(self) -> dict[str, Any]:
        """Return what must not change when a run goes on."""
        return {
            "model": networks.digest(self._source),
            "controlnet": json_bytes(self._json).decode(),
        }
