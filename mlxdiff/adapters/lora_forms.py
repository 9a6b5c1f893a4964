"""Compute the change of a weight from the tensors of a LoRA or a related form.

All weights are matrices here: a convolution (out, in, kH, kW) in PyTorch's layout becomes
(out, in * kH * kW); a linear layer is (out, in). Shapes are known without reading; tensors are read
when a matrix is computed.
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
    """A way to store a weight difference.

    Attributes:
        name: common name of the form.
        parts: names of its tensors.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def rank(self) -> int | None:
        """Return the rank that divides alpha, or None if the tensors do not define one."""

    def shape(self) -> Shape:
        """Return (out, in * kH * kW). Raises: ValueError if the tensor shapes do not match."""

    def delta(self) -> np.ndarray:
        """Compute the difference: float32 (out, in * kH * kW)."""

    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (down, up) with difference = up @ down, or None if R would not be small.

        Shapes: down (R, in * kH * kW), up (out, R).
        """


@dataclass(frozen=True)
class LowRank:
    """up @ down (Hu et al. 2021); a convolution has a 1x1 up (LoCon) and may have a core ``mid``.

    Attributes:
        tensors: down (r, in[, kH, kW]); up (out, r[, 1, 1]); optionally mid (r, r, kH, kW), the
            core of a Tucker or CP decomposition (down is then 1x1).
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
    """LoHa (Hyeon-Woo et al. 2021): the elementwise product (w1_a @ w1_b) * (w2_a @ w2_b).

    With cores t1 and t2 (r, r, kH, kW), each factor is a Tucker decomposition and its a has the
    shape (r, out); without, its a has the shape (out, r).
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
    """LoKr (Yeh et al. 2023): kron(w1, w2).

    Each factor may itself be a product of two matrices; w2 of a convolution may have a core t2.
    """

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
    """The full weight difference."""

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
    """Make the form that has these parts. Raises: ValueError if no form has them."""
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
    raise ValueError("these parts are not a complete LoRA, LoHa or LoKr")


@dataclass(frozen=True)
class Magnitude:
    """DoRA (Liu et al. 2024): set the norm of each row, or input channel, of the changed weight.

    Attributes:
        tensor: the norms.
        by_output: True for one norm per output, False for one per input channel.
        scale_inside: if True, the scale multiplies the low-rank part before the norms are computed
            (as PEFT does); if False, the whole difference (as A1111 and ComfyUI do with LyCORIS
            files).
    """

    tensor: LazyTensor
    by_output: bool
    scale_inside: bool

    def gain(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        """Compute the factor for a changed weight: (out, 1) or (in * kH * kW,)."""
        norms = _values(self.tensor).reshape(-1)
        if self.by_output:
            return (norms / np.linalg.norm(weight, axis=1))[:, None]
        cube = weight.reshape(len(weight), inputs, -1)
        gain = norms / np.sqrt(np.square(cube).sum(axis=(0, 2)))
        return np.repeat(gain, cube.shape[2])


@dataclass(frozen=True)
class Delta:
    """The change of one weight by one file.

    Attributes:
        form: the difference.
        strength: alpha / rank, or the equivalent factor from the file's config.
        magnitude: DoRA's norms, or None.
        rows: rows of the difference that belong to this weight, or None for all.
    """

    form: Form
    strength: float = 1.0
    magnitude: Magnitude | None = None
    rows: slice | None = None

    def difference(self) -> np.ndarray:
        """Compute the difference at scale 1, without DoRA's norms: (out, in * kH * kW)."""
        difference = self.form.delta() * np.float32(self.strength)
        return difference if self.rows is None else difference[self.rows]

    def added(self, weight: np.ndarray, scale: float, inputs: int) -> np.ndarray:
        """Compute the change of a weight.

        Args:
            weight: (out, in * kH * kW) float32.
            scale: factor for the change.
            inputs: number of input channels.
        Returns: (out, in * kH * kW) float32, to add to the weight.
        """
        scale32, difference = np.float32(scale), self.difference()
        if self.magnitude is None:
            return difference * scale32
        if self.magnitude.scale_inside:
            changed = weight + difference * scale32
            return changed * self.magnitude.gain(changed, inputs) - weight
        changed = weight + difference
        return (changed * self.magnitude.gain(changed, inputs) - weight) * scale32

    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (down, up) of the difference, or None if it is not of low rank."""
        factors = self.form.factors()
        if factors is None:
            return None
        down, up = factors
        return down, (up if self.rows is None else up[self.rows]) * np.float32(self.strength)


def _require(good: bool, what: str) -> None:
    if not good:
        raise ValueError(f"the shapes of {what} do not match")


def _values(tensor: LazyTensor) -> np.ndarray:
    return tensor.read().astype(np.float32)


def _matrix(tensor: LazyTensor) -> np.ndarray:
    values = _values(tensor)
    return values.reshape(len(values), -1)


def _tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Contract core (r, s, kH, kW), a (r, out) and b (s, in) to (out, in * kH * kW)."""
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
