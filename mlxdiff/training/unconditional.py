"""Train a model of pixels from scratch (Ho et al. 2020), with classes or without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.networks.config import UNet2DConfig
from mlxdiff.store.folder import json_bytes
from mlxdiff.tokenizer import Tokenizer
from mlxdiff.training import folders, fresh, networks
from mlxdiff.training.data import Batch
from mlxdiff.training.options import BETAS
from mlxdiff.weights.tensors import LazyTensor

_GROUPS = (32, 16, 8, 4, 2, 1)


class PixelSource:
    """A model of pixels that exists as configs alone: a ``ModelSource`` without weights.

    Args:
        unet: content of unet/config.json.
        scheduler: content of scheduler_config.json.
    Raises: ConfigError.
    """

    family = "ddpm"
    components = ("unet",)

    def __init__(self, unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        self.path = Path("new model")
        self._unet = dict(unet)
        self._config = UNet2DConfig.from_dict(unet, "the new U-Net")
        self.scheduler_config = dict(scheduler)
        self.image_noise_config: dict[str, Any] = {}
        self.provenance: dict[str, Any] = {"source": "trained from scratch"}
        self.model_index: dict[str, Any] = {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }

    def config(self, component: str) -> UNet2DConfig:
        """Return the config of the U-Net."""
        return self._config

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """Raise KeyError: there are no weights."""
        raise KeyError(component)

    def tokenizer(self, name: str = "tokenizer") -> Tokenizer:
        """Raise KeyError: there is no text."""
        raise KeyError(name)

    def documents(self) -> dict[str, bytes]:
        """Return all files except the weights."""
        return {
            "model_index.json": json_bytes(self.model_index),
            "unet/config.json": json_bytes(self._unet),
            "scheduler/scheduler_config.json": json_bytes(self.scheduler_config),
        }


def new_model(
    width: int,
    height: int,
    *,
    channels: tuple[int, ...] = (64, 128, 128),
    layers: int = 2,
    attention: int = 16,
    classes: int = 0,
    noise: str = "linear",
    prediction: str = "epsilon",
) -> PixelSource:
    """Describe a model of pixels in diffusers' configs.

    Args:
        width, height: of its pictures, in pixels.
        channels: of each level. Each level after the first has half the side of the one before.
        layers: resnets of each level, on the way down.
        attention: levels of this side, in pixels, or less have self-attention; 0: only the middle.
        classes: number of classes; 0: none.
        noise: one of ``options.BETAS``.
        prediction: epsilon, v_prediction or sample.
    Raises: UsageError if the sides cannot be halved that often.
    """
    halvings = 2 ** (len(channels) - 1)
    if width % halvings or height % halvings:
        raise UsageError(
            f"pictures of {width}x{height} cannot be halved {len(channels) - 1} times; give fewer "
            f"channels, or sides that are multiples of {halvings}"
        )
    groups = next(n for n in _GROUPS if all(c % n == 0 and c // n >= 2 for c in channels) or n == 1)
    head = next(n for n in _GROUPS if not any(c % n for c in channels))
    attends = [max(width, height) // 2**level <= attention for level in range(len(channels))]
    unet = {
        "_class_name": "UNet2DModel",
        "sample_size": width if width == height else [height, width],
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": head,
        "norm_num_groups": groups,
        "norm_eps": 1e-06,
        "downsample_padding": 1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        **({"num_class_embeds": classes} if classes else {}),
    }
    scheduler = {
        "_class_name": "DDPMScheduler",
        **BETAS[noise],
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "variance_type": "fixed_small",
    }
    return PixelSource(unet, scheduler)


class Unconditional:
    """The task of training all weights of a U-Net without text."""

    kind = "unconditional"

    def __init__(self, source: PixelSource, classes: tuple[str, ...], seed: int) -> None:
        self._source, self._classes = source, classes
        self._first = fresh.unet_2d(source.config("unet"), seed)
        self._unet = networks.build(source.config("unet"))

    def parameters(self) -> dict[str, mx.array]:
        """Return the first weights."""
        return {name: mx.array(values) for name, values in self._first.items()}

    def predict(
        self, parameters: Mapping[str, mx.array], batch: Batch, noisy: mx.array, timesteps: mx.array
    ) -> mx.array:
        """Run the network with these weights."""
        for name, value in parameters.items():
            self._unet.put(name, value)
        labels = None if batch.labels is None else mx.array(batch.labels)
        found: mx.array = self._unet(noisy, timesteps, labels)
        return found

    def save(
        self, parameters: Mapping[str, np.ndarray], path: Path, facts: Mapping[str, Any]
    ) -> list[Path]:
        """Write a folder that mlxdiff and diffusers' DDPMPipeline open."""
        facts = {**facts, **({"classes": list(self._classes)} if self._classes else {})}
        model = folders.TrainedModel(self._source, "unet", parameters, facts)
        lines = ["Trained from scratch with mlxdiff; mlxdiff and diffusers open it."]
        if self._classes:
            numbered = ", ".join(f"{i} {name}" for i, name in enumerate(self._classes))
            lines.append(f"Classes (`--label`): {numbered}.")
        folders.write_model(model, path, "float32", folders.model_card(path.name, lines, facts))
        return [path]

    def identity(self) -> dict[str, Any]:
        """Return what must not change when a run goes on."""
        return {
            "unet": self._source.documents()["unet/config.json"].decode(),
            "scheduler": self._source.scheduler_config,
            "classes": list(self._classes),
        }
