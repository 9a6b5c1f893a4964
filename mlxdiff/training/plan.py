"""What a run will take: steps, memory and time, before it begins."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError, argument
from mlxdiff.machine.probe import memory_bytes
from mlxdiff.networks.cost import TOKENS, operations
from mlxdiff.networks.params import expected_parameters
from mlxdiff.run.kind import Network
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.run.memory import SIZES, Device, weight_bytes
from mlxdiff.training.data import Data
from mlxdiff.training.options import LoraOptions, RankOptions, TrainOptions

_STATES = {"adamw": 2, "adafactor": 0, "prodigy": 4}  # arrays beside each parameter


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        pictures: of an epoch.
        steps, epochs: of the run.
        trained: values that are trained.
        weights, states, activations: bytes.
        checkpointing: blocks are computed again for their gradient.
        seconds: of a step, about; None: not estimated.
    """

    pictures: int
    steps: int
    epochs: float
    trained: int
    weights: int
    states: int
    activations: int
    checkpointing: bool
    seconds: float | None

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.weights + self.states + self.activations

    def lines(self) -> list[str]:
        """Return it in words."""
        again = "with" if self.checkpointing else "without"
        found = [
            f"{self.pictures} pictures, {self.steps} steps, {self.epochs:.1f} epochs",
            f"{self.trained:,} values are trained",
            f"about {self.memory / 1e9:.1f} GB of memory {again} checkpointing: weights "
            f"{self.weights / 1e9:.1f}, gradients and optimizer {self.states / 1e9:.1f}, "
            f"activations {self.activations / 1e9:.1f}",
        ]
        if self.seconds is not None:
            hours = self.seconds * self.steps / 3600
            found.append(f"about {self.seconds:.1f} s a step, {hours:.1f} hours")
        return found


def plan(model: LatentModel, data: Data, options: TrainOptions, lora: RankOptions) -> Plan:
    """Work out what a LoRA will take.

    Raises: UsageError if the memory will not suffice.
    """
    texts = isinstance(lora, LoraOptions) and lora.text_encoder
    names = ("unet", *(model.texts.names if texts else ()))
    weights = sum(frozen_bytes(model, name, options) for name in names)
    trained = sum(_trained(model, name, lora) for name in names)
    return expect(model.source.config("unet"), data, options, weights, trained)


def frozen_bytes(model: LatentModel, component: str, options: TrainOptions) -> int:
    """Return the bytes of a component whose weights do not change."""
    dtype = options.dtype or "float32"
    device = Device("mlx", dtype != "float32", dtype)
    tensors = model.component_of(Network(component)).tensors()
    return weight_bytes(tensors, device, keep_stored=True)


def expect(
    config: Any,
    data: Data,
    options: TrainOptions,
    weights: int,
    trained: int,
    checkpointing: bool | None = None,
) -> Plan:
    """Work out what any training of a U-Net will take.

    Args:
        config: of the U-Net.
        weights: bytes of the frozen weights.
        trained: number of values that are trained.
        checkpointing: whether blocks are computed again; None: as the options say, or if the
            memory would not suffice.
    Raises: UsageError if the memory will not suffice.
    """
    dtype = options.dtype or "float32"
    shape = data.batch_shape(options.batch)
    per_value = 4 * (2 + _STATES[options.optimizer] + (1 if options.ema else 0))
    kept = {again: activation_bytes(config, shape, SIZES[dtype], again) for again in (False, True)}
    most = memory_bytes()
    asked = options.checkpointing if checkpointing is None else checkpointing
    if asked is None:
        needed = weights + trained * per_value + kept[False]
        asked = most is not None and needed > 0.7 * most
    found = Plan(
        data.size,
        options.steps,
        options.steps * options.accumulate / data.batches(options.batch),
        trained,
        weights,
        trained * per_value,
        kept[asked],
        asked,
        _seconds(config, shape, options, asked) if options.dry_run else None,
    )
    if most is not None and found.memory > most:
        raise UsageError(
            f"training needs about {found.memory / 1e9:.1f} GB of memory and this machine has "
            f"{most / 1e9:.1f} GB; quantize the frozen weights ({argument('quantize', 4)}), use "
            f"{argument('checkpointing')}, or a smaller {argument('resolution')} or "
            f"{argument('batch')}"
        )
    return found


def _trained(model: LatentModel, component: str, lora: RankOptions) -> int:
    """Values of a component's adapters."""
    from mlxdiff.training.lora import chosen

    shapes = expected_parameters(model.source.config(component))
    total = 0
    for name in chosen(shapes, lora.targets):
        out, *inner = shapes[f"{name}.weight"]
        total += lora.rank * (out + int(np.prod(inner))) + (out if lora.dora else 0)
    return total


def activation_bytes(
    config: Any, shape: tuple[int, int, int, int], size: int, checkpointing: bool
) -> int:
    """Return about how many bytes a U-Net keeps for its gradient.

    Every layer's input is some layer's output, so all outputs are kept. With checkpointing, those
    of one block are, and the input of each block. In half precision a GPU computes: MLX has no
    fused gradient of attention there, so one layer's scores, weights and their gradients add to it.

    Args:
        shape: of the latents, (B, h, w, C).
        size: bytes of a value.
    """
    batch, height, width, _ = shape
    work = operations(config, height, width, batch=batch, tokens=TOKENS)
    total = sum(op.outputs for op in work)
    largest = max(op.inputs + op.outputs for op in work)
    scores = 0
    if size < 4:
        scores = 3 * max((op.scratch for op in work if op.kind == "attention"), default=0)
    kept = total // 8 + 8 * largest if checkpointing else total + 4 * largest
    return size * (kept + scores)


def _seconds(
    config: Any, shape: tuple[int, int, int, int], options: TrainOptions, checkpointing: bool
) -> float:
    """About how long a step takes: the arithmetic at the speed of a product of matrices here."""
    batch, height, width, _ = shape
    work = operations(config, height, width, batch=batch, tokens=TOKENS)
    macs = sum(op.macs for op in work)
    # Forward and backward, again for checkpointing; attention's products are made anew.
    passes = 2.2 + (1 if checkpointing else 0)
    return 1.4 * passes * macs * options.accumulate / _macs_per_second()


def _macs_per_second() -> float:
    """Multiply-adds a second of a product of large matrices, the best of three."""
    from mlxdiff.backends.mlx import MLXBackend

    if MLXBackend.has_gpu():
        import mlx.core as mx

        x = mx.ones((4096, 4096), mx.float16)
        mx.eval(x)

        def product() -> None:
            mx.eval(x @ x)
    else:
        y = np.ones((1024, 1024), np.float32)

        def product() -> None:
            y @ y

    side = 4096 if MLXBackend.has_gpu() else 1024
    best = 1e9
    for _ in range(3):
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return side**3 / best
