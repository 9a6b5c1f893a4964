"""Optimizers and learning rates: flat dictionaries of MLX arrays in and out.

AdamW and Adafactor are MLX's own. Prodigy is not in MLX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as mlx_optimizers
import numpy as np

Arrays = dict[str, mx.array]


class Optimizer(Protocol):
    """Updates parameters; its state is a flat dictionary of arrays."""

    def update(self, parameters: Arrays, gradients: Arrays, rate: float) -> Arrays:
        """Return the new parameters, at a learning rate."""
        ...

    @property
    def state(self) -> Arrays:
        """All that it remembers: arrays by name."""
        ...

    @state.setter
    def state(self, arrays: Mapping[str, mx.array]) -> None: ...


class OfMLX:
    """An optimizer of ``mlx.optimizers``."""

    def __init__(self, inner: Any, parameters: Arrays) -> None:
        self.inner = inner
        inner.init(parameters)

    def update(self, parameters: Arrays, gradients: Arrays, rate: float) -> Arrays:
        """See ``Optimizer``."""
        self.inner.learning_rate = mx.array(rate, mx.float32)
        found: Arrays = self.inner.apply_gradients(gradients, parameters)
        return found

    @property
    def state(self) -> Arrays:
        """See ``Optimizer``. ``step`` and ``learning_rate`` are entries of one array."""
        found: Arrays = {}
        for name, value in self.inner.state.items():
            if isinstance(value, mx.array):
                found[f"/{name}"] = value
            else:
                found |= {f"{name}/{part}": array for part, array in value.items()}
        return found

    @state.setter
    def state(self, arrays: Mapping[str, mx.array]) -> None:
        nested: dict[str, Any] = {}
        for key, array in arrays.items():
            name, _, part = key.rpartition("/")
            if name:
                nested.setdefault(name, {})[part] = array
            else:
                nested[part] = array.astype(self.inner.state[part].dtype)
        self.inner.state = nested


class Prodigy:
    """Adam whose step size grows from an estimate of the distance to the solution.

    Source: Mishchenko and Defazio 2023, algorithm 4, with the bias correction and the safeguard of
    its authors' code: warm-up steps do not count as evidence for a small distance.
    """

    def __init__(
        self,
        parameters: Arrays,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        first_distance: float = 1e-6,
        growth: float = math.inf,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.first_distance, self.growth = first_distance, growth
        self.numbers = {
            "distance": first_distance,
            "largest": first_distance,
            "numerator": 0.0,
            "steps": 0.0,
        }
        self.first = dict(parameters)
        zeros = {name: mx.zeros_like(value) for name, value in parameters.items()}
        self.mean, self.square, self.sums = dict(zeros), dict(zeros), dict(zeros)

    def update(self, parameters: Arrays, gradients: Arrays, rate: float) -> Arrays:
        """See ``Optimizer``."""
        beta1, beta2 = self.betas
        beta3 = math.sqrt(beta2)
        now, first = self.numbers, self.first_distance
        distance, steps = now["distance"], int(now["steps"])
        correction = math.sqrt(1 - beta2 ** (steps + 1)) / (1 - beta1 ** (steps + 1))
        step = distance * rate * correction
        numerator = beta3 * now["numerator"]
        dots, sizes = [], []
        for name, g in gradients.items():
            dots.append((g * (self.first[name] - parameters[name])).sum())
            self.mean[name] = beta1 * self.mean[name] + distance * (1 - beta1) * g
            self.square[name] = beta2 * self.square[name] + distance * distance * (
                1 - beta2
            ) * mx.square(g)
            self.sums[name] = beta3 * self.sums[name] + (distance / first) * distance * g
            sizes.append(mx.abs(self.sums[name]).sum())
        numerator += (distance / first) * step * float(mx.stack(dots).sum())
        denominator = float(mx.stack(sizes).sum())
        now["numerator"], now["steps"] = numerator, steps + 1.0
        if denominator == 0:
            return parameters
        found = numerator / denominator
        if distance == first:
            distance = max(distance, found)
        now["largest"] = max(now["largest"], found)
        now["distance"] = min(now["largest"], distance * self.growth)
        new = {}
        for name, value in parameters.items():
            size = mx.sqrt(self.square[name]) + now["distance"] * self.eps
            value = value * (1 - self.weight_decay * step)
            new[name] = value - step * self.mean[name] / size
        return new

    @property
    def state(self) -> Arrays:
        """See ``Optimizer``."""
        found = {f"/{name}": mx.array(_halves(value)) for name, value in self.numbers.items()}
        for part in ("first", "mean", "square", "sums"):
            found |= {f"{name}/{part}": array for name, array in getattr(self, part).items()}
        return found

    @state.setter
    def state(self, arrays: Mapping[str, mx.array]) -> None:
        for key, array in arrays.items():
            name, _, part = key.rpartition("/")
            if name:
                getattr(self, part)[name] = array
            else:
                self.numbers[part] = sum(np.array(array).astype(float).tolist())


def _halves(value: float) -> list[float]:
    """A float64 as float32 numbers whose sum it is, to its last bit."""
    parts, rest = [], value
    for _ in range(3):
        part = float(np.float32(rest))
        parts.append(part)
        rest -= part
    return parts


def make(kind: str, parameters: Arrays, weight_decay: float) -> Optimizer:
    """Return an optimizer of one of ``options.OPTIMIZERS``."""
    if kind == "prodigy":
        return Prodigy(parameters, weight_decay=weight_decay)
    if kind == "adafactor":
        inner: Any = mlx_optimizers.Adafactor(
            learning_rate=0.0,
            weight_decay=weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    else:
        inner = mlx_optimizers.AdamW(
            learning_rate=0.0, weight_decay=weight_decay, bias_correction=True
        )
    return OfMLX(inner, parameters)


def rate_at(step: int, rate: float, schedule: str, warmup: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It grows linearly over ``warmup`` steps; then it is constant, or falls to 0 at the end: linearly
    or as half a cosine.
    """
    if step < warmup:
        return rate * step / max(1, warmup)
    share = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return rate * max(0.0, 1 - share)
    if schedule == "cosine":
        return rate * max(0.0, 0.5 * (1 + math.cos(math.pi * share)))
    return rate


def norm(gradients: Arrays) -> mx.array:
    """Return the norm of all gradients together."""
    return mx.sqrt(mx.stack([mx.square(g).sum() for g in gradients.values()]).sum())


def clipped(gradients: Arrays, size: mx.array, most: float) -> Arrays:
    """Return gradients whose norm together, ``size``, is at most ``most``."""
    factor = mx.minimum(1.0, most / (size + 1e-6))
    return {name: g * factor for name, g in gradients.items()}
