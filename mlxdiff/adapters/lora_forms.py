"""What an adapter adds to a weight: the arithmetic of LoRA and its kin.

Everything is a matrix here: a weight (out, in, kH, kW) in PyTorch's layout is (out, in * kH * kW),
a linear one (out, in). Tensors are read when a matrix is asked for; shapes are known before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from mlxdiff.weights.tensors import LazyTensor, Shape

Tensors = Mapping[str, LazyTensor]


class Form(Protocol):
    """How a difference of weights is written down.

    Attributes:
        name: what people call it.
        parts: names of the tensors that make it up.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def rank(self) -> int | None:
        """What alpha is divided by; None where nothing in the file says it."""

    def shape(self) -> Shape:
        """(out, in * kH * kW). Raises: ValueError where the tensors do not go together."""

    def delta(self) -> np.ndarray:
        """The difference, float32."""

    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(down, up), (R, in * kH * kW) and (out, R), whose product up @ down is the difference;
        None where R would not be small."""


@dataclass(frozen=True)
class LowRank:
    """up @ down (Hu et al. 2021); for a convolution up is 1x1 (LoCon), or a core stands between.

    Attributes:
        tensors: down (r, in[, kH, kW]); up (out, r[, 1, 1]); mid (r, r, kH, kW) or none (Tucker or
            CP decomposition: down is 1x1 then).
    """

    tensors: Tensors
    name: ClassVar[str] = "LoRA"
    parts: ClassVar[tuple[str, ...]] = ("down", "up", "mid")

    def rank(self) -> int:
        return self.tensors["down"].shape[0]

    def shape(self) -> Shape:
        down, up = self.tensors["down"].shape, self.tensors["up"].shape
        inputs = math.prod(down[1:])
        between = down[0]
        if mid := self.tensors.get("mid"):
            _require(len(mid.shape) == 4 and mid.shape[1] == between, "mid")
            inputs *= math.prod(mid.shape[2:])
            between = mid.shape[0]
        _require(len(down) in (2, 4) and len(up) in (2, 4), "down and up")
        _require(up[1] == between and math.prod(up[2:]) == 1, "down and up")
        return up[0], inputs

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        down, up = (_matrix(self.tensors[part]) for part in ("down", "up"))
        if mid := self.tensors.get("mid"):
            down = _tucker(_values(mid), np.eye(mid.shape[0], dtype=np.float32), down)
        return down, up

    def delta(self) -> np.ndarray:
        down, up = self.factors()
        return up @ down


@dataclass(frozen=True)
class Hadamard:
    """(w1_a @ w1_b) * (w2_a @ w2_b), value by value: LoHa (Hyeon-Woo et al. 2021).

    With cores t1 and t2 (r, r, kH, kW) each factor is a Tucker decomposition instead; a is (r, out)
    then, else (out, r).
    """

    tensors: Tensors
    name: ClassVar[str] = "LoHa"
    parts: ClassVar[tuple[str, ...]] = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")

    def rank(self) -> int:
        return self.tensors["w1_b"].shape[0]

    def shape(self) -> Shape:
        found = [_product_shape(self.tensors, f"w{i}", f"t{i}") for i in (1, 2)]
        _require(found[0] == found[1], "w1 and w2")
        return found[0]

    def delta(self) -> np.ndarray:
        return _product(self.tensors, "w1", "t1") * _product(self.tensors, "w2", "t2")

    def factors(self) -> None:
        return None


@dataclass(frozen=True)
class Kronecker:
    """kron(w1, w2): LoKr (Yeh et al. 2023). Each may be a product of two; w2 of a convolution may
    have a core t2."""

    tensors: Tensors
    name: ClassVar[str] = "LoKr"
    parts: ClassVar[tuple[str, ...]] = ("k1", "k1_a", "k1_b", "k2", "k2_a", "k2_b", "kt2")

    def rank(self) -> int | None:
        for part in ("k2_b", "k1_b"):
            if part in self.tensors:
                return self.tensors[part].shape[0]
        return None

    def shape(self) -> Shape:
        (a, b), (c, d) = (self._shape(i) for i in (1, 2))
        return a * c, b * d

    def _shape(self, i: int) -> Shape:
        if f"k{i}" in self.tensors:
            shape = self.tensors[f"k{i}"].shape
            return shape[0], math.prod(shape[1:])
        return _product_shape(self.tensors, f"k{i}", f"kt{i}")

    def delta(self) -> np.ndarray:
        w1, w2 = (self._factor(i) for i in (1, 2))
        return np.kron(w1, w2)

    def _factor(self, i: int) -> np.ndarray:
        if f"k{i}" in self.tensors:
            return _matrix(self.tensors[f"k{i}"])
        return _product(self.tensors, f"k{i}", f"kt{i}")

    def factors(self) -> None:
        return None


@dataclass(frozen=True)
class Full:
    """The difference itself."""

    tensors: Tensors
    name: ClassVar[str] = "full difference"
    parts: ClassVar[tuple[str, ...]] = ("diff",)

    def rank(self) -> None:
        return None

    def shape(self) -> Shape:
        shape = self.tensors["diff"].shape
        _require(len(shape) in (2, 4), "diff")
        return shape[0], math.prod(shape[1:])

    def delta(self) -> np.ndarray:
        return _matrix(self.tensors["diff"])

    def factors(self) -> None:
        return None


def make_form(tensors: Tensors) -> Form:
    """The form that these parts make up. Raises: ValueError where they make up none."""
    required: tuple[tuple[type[LowRank | Hadamard | Kronecker | Full], tuple[set[str], ...]], ...]
    required = (
        (LowRank, ({"down", "up"},)),
        (Hadamard, ({"w1_a", "w1_b", "w2_a", "w2_b"},)),
        (
            Kronecker,
            tuple(
                first | second
                for first in ({"k1"}, {"k1_a", "k1_b"})
                for second in ({"k2"}, {"k2_a", "k2_b"})
            ),
        ),
        (Full, ({"diff"},)),
    )
    for kind, choices in required:
        if any(choice <= set(tensors) for choice in choices) and set(tensors) <= set(kind.parts):
            form = kind(tensors)
            form.shape()
            return form
    raise ValueError("they make up none of LoRA, LoHa, LoKr")


@dataclass(frozen=True)
class Magnitude:
    """DoRA (Liu et al. 2024): each row of the changed weight, or input channel, gets this norm.

    Attributes:
        tensor: the norms.
        by_output: one for each output, else one for each input channel.
        scale_inside: what a scale multiplies: the low-rank part, before the norms are taken, as
            PEFT does; else the whole difference, as A1111 and ComfyUI do with LyCORIS' files.
    """

    tensor: LazyTensor
    by_output: bool
    scale_inside: bool

    def gain(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        """What a changed weight is multiplied by: (out, 1) or (in * kH * kW,)."""
        norms = _values(self.tensor).reshape(-1)
        if self.by_output:
            return (norms / np.linalg.norm(weight, axis=1))[:, None]
        cube = weight.reshape(len(weight), inputs, -1)
        gain = norms / np.sqrt(np.square(cube).sum(axis=(0, 2)))
        return np.repeat(gain, cube.shape[2])


@dataclass(frozen=True)
class Delta:
    """What a file adds to one weight.

    Attributes:
        form: the difference.
        strength: alpha / rank, or what the file says in its place.
        magnitude: DoRA's norms, if there are any.
        rows: of the difference that belong to this weight; None: all.
    """

    form: Form
    strength: float = 1.0
    magnitude: Magnitude | None = None
    rows: slice | None = None

    def difference(self) -> np.ndarray:
        """At scale 1, without the norms: (out, in * kH * kW)."""
        difference = self.form.delta() * np.float32(self.strength)
        return difference if self.rows is None else difference[self.rows]

    def added(self, weight: np.ndarray, scale: float, inputs: int) -> np.ndarray:
        """What is added to a weight, all (out, in * kH * kW) float32; ``inputs`` channels."""
        scale32, difference = np.float32(scale), self.difference()
        if self.magnitude is None:
            return difference * scale32
        if self.magnitude.scale_inside:
            changed = weight + difference * scale32
            return changed * self.magnitude.gain(changed, inputs) - weight
        changed = weight + difference
        return (changed * self.magnitude.gain(changed, inputs) - weight) * scale32

    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(down, up) of the difference, if that is of low rank."""
        factors = self.form.factors()
        if factors is None:
            return None
        down, up = factors
        return down, (up if self.rows is None else up[self.rows]) * np.float32(self.strength)


def _require(good: bool, what: str) -> None:
    if not good:
        raise ValueError(f"the shapes of {what} do not go together")


def _values(tensor: LazyTensor) -> np.ndarray:
    return tensor.read().astype(np.float32)


def _matrix(tensor: LazyTensor) -> np.ndarray:
    values = _values(tensor)
    return values.reshape(len(values), -1)


def _tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """core (r, s, kH, kW), a (r, out), b (s, in) -> (out, in * kH * kW)."""
    full = np.einsum("rskl,ro,si->oikl", core, a, b, optimize=True)
    return full.reshape(len(full), -1)


def _product_shape(tensors: Tensors, name: str, core: str) -> Shape:
    a, b = (tensors[f"{name}_{side}"].shape for side in "ab")
    _require(len(a) == 2 and len(b) in (2, 4), name)
    if core in tensors:
        shape = tensors[core].shape
        _require(len(shape) == 4 and shape[:2] == (a[0], b[0]), f"{name} and its core")
        return a[1], math.prod(b[1:]) * math.prod(shape[2:])
    _require(a[1] == b[0], name)
    return a[0], math.prod(b[1:])


def _product(tensors: Tensors, name: str, core: str) -> np.ndarray:
    a, b = (_matrix(tensors[f"{name}_{side}"]) for side in "ab")
    return a @ b if core not in tensors else _tucker(_values(tensors[core]), a, b)
