"""Compute the change of a weight from the tensors of a LoRA or a related form.

All weights are matrices here: a convolution (out, in, kH, kW) in PyTorch's layout becomes
(out, in * kH * kW); a linear layer is (out, in). Shapes are known without reading; tensors are read
when a matrix is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mlxdiff.weights.tensors import LazyTensor, Shape

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Form:
    """A way to store the change of a weight.

    Attributes:
        tensors: part -> tensor.
        name: common name of the form.
        parts: names of its tensors.
        axes: number of axes that each of its tensors has at least.
        reads_weight: the change depends on the weight.
    """

    tensors: Tensors
    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    axes: ClassVar[int] = 2
    reads_weight: ClassVar[bool] = False

    def rank(self) -> int | None:
        """Return the rank that divides alpha, or None if the tensors do not define one."""
        return None

    def shape(self, weight: Shape, inputs: int) -> Shape:
        """Return (out, in * kH * kW) of the weight that this form changes.

        Args:
            weight: the same of the weight at hand, for the axes that the tensors leave open.
            inputs: its number of input channels.
        Raises: ValueError if the tensor shapes do not match.
        """
        raise NotImplementedError

    def delta(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        """Compute the change at strength 1: float32 (out, in * kH * kW).

        Args:
            weight: the unchanged weight, (out, in * kH * kW) float32. Without ``reads_weight``,
                only its shape counts.
            inputs: number of input channels.
        """
        raise NotImplementedError

    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (down, up) with change = up @ down, or None if R would not be small.

        Shapes: down (R, in * kH * kW), up (out, R).
        """
        return None


@dataclass(frozen=True)
class LowRank(Form):
    """up @ down (Hu et al. 2021); a convolution has a 1x1 up (LoCon) and may have a core ``mid``.

    Attributes:
        tensors: down (r, in[, kH, kW]); up (out, r[, 1, 1]); optionally mid (r, r, kH, kW), the
            core of a Tucker or CP decomposition (down is then 1x1).
    """

    name: ClassVar[str] = "LoRA"
    parts: ClassVar[tuple[str, ...]] = ("down", "up", "mid")

    def rank(self) -> int:
        return self.tensors["down"].shape[0]

    def shape(self, weight: Shape, inputs: int) -> Shape:
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

    def delta(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        down, up = self.factors()
        return up @ down


@dataclass(frozen=True)
class Hadamard(Form):
    """LoHa (Hyeon-Woo et al. 2021): the elementwise product (w1_a @ w1_b) * (w2_a @ w2_b).

    With cores t1 and t2 (r, r, kH, kW), each factor is a Tucker decomposition and its a has the
    shape (r, out); without, its a has the shape (out, r).
    """

    name: ClassVar[str] = "LoHa"
    parts: ClassVar[tuple[str, ...]] = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")

    def rank(self) -> int:
        return self.tensors["w1_b"].shape[0]

    def shape(self, weight: Shape, inputs: int) -> Shape:
        found = [_product_shape(self.tensors, f"w{i}", f"t{i}") for i in (1, 2)]
        _require(found[0] == found[1], "w1 and w2")
        return found[0]

    def delta(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        return _product(self.tensors, "w1", "t1") * _product(self.tensors, "w2", "t2")


@dataclass(frozen=True)
class Kronecker(Form):
    """LoKr (Yeh et al. 2023): kron(w1, w2).

    Each factor may itself be a product of two matrices; w2 of a convolution may have a core t2.
    """

    name: ClassVar[str] = "LoKr"
    parts: ClassVar[tuple[str, ...]] = ("k1", "k1_a", "k1_b", "k2", "k2_a", "k2_b", "kt2")

    def rank(self) -> int | None:
        for part in ("k2_b", "k1_b"):
            if part in self.tensors:
                return self.tensors[part].shape[0]
        return None

    def shape(self, weight: Shape, inputs: int) -> Shape:
        (a, b), (c, d) = (self._shape(i) for i in (1, 2))
        return a * c, b * d

    def _shape(self, i: int) -> Shape:
        if f"k{i}" in self.tensors:
            shape = self.tensors[f"k{i}"].shape
            return shape[0], math.prod(shape[1:])
        return _product_shape(self.tensors, f"k{i}", f"kt{i}")

    def delta(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        w1, w2 = (self._factor(i) for i in (1, 2))
        return np.kron(w1, w2)

    def _factor(self, i: int) -> np.ndarray:
        if f"k{i}" in self.tensors:
            return _matrix(self.tensors[f"k{i}"])
        return _product(self.tensors, f"k{i}", f"kt{i}")


@dataclass(frozen=True)
class Full(Form):
    """The full difference; also that of a norm or of a bias, which are vectors."""

    name: ClassVar[str] = "full difference"
    parts: ClassVar[tuple[str, ...]] = ("diff",)
    axes: ClassVar[int] = 1

    def shape(self, weight: Shape, inputs: int) -> Shape:
        shape = self.tensors["diff"].shape
        _require(len(shape) in (1, 2, 4), "diff")
        return shape[0], math.prod(shape[1:])

    def delta(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        return _matrix(self.tensors["diff"])


@dataclass(frozen=True)
class GeneralizedLowRank(Form):
    """GLoRA (Chavan et al. 2023): W @ A + B, with A and B of low rank, as LyCORIS computes them.

    A = a1 @ a2 acts on the input channels, B = b1 @ b2. Files of LyCORIS before 2.0 have the
    factors in the other order: A = a2 @ a1, B = b2 @ b1, and A acts on in * kH * kW. If both
    orders fit (a square weight), the long side of a1 decides.

    Attributes:
        tensors: a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in[, kH, kW]); bm (r, r, kH, kW), the
            core of B, if b2 has no kernel. All may have trailing axes of size 1.
    """

    name: ClassVar[str] = "GLoRA"
    parts: ClassVar[tuple[str, ...]] = ("a1", "a2", "b1", "b2", "bm")
    reads_weight: ClassVar[bool] = True

    def _flat(self, part: str) -> Shape:
        shape = self.tensors[part].shape
        _require(len(shape) in (2, 4), part)
        return shape[0], math.prod(shape[1:])

    def _is_old(self) -> bool:
        a1, a2, b1, b2 = (self._flat(part) for part in ("a1", "a2", "b1", "b2"))
        old = a1[0] == a2[1] == b1[0] == b2[1]
        new = a1[1] == a2[0] == b1[1] == b2[0]
        _require(old or new, "a1, a2, b1 and b2")
        return old and (not new or a1[0] <= a1[1])

    def rank(self) -> int:
        return self._flat("a1" if self._is_old() else "a2")[0]

    def shape(self, weight: Shape, inputs: int) -> Shape:
        old = self._is_old()
        a1, a2, b1, b2 = (self._flat(part) for part in ("a1", "a2", "b1", "b2"))
        if old:
            _require(a1[1] == a2[0] == b1[1] and "bm" not in self.tensors, "a1, a2 and b1")
            return b2[0], b1[1]
        _require(a1[0] == a2[1] == inputs, "a1 and a2")
        wide = b2[1]
        if core := self.tensors.get("bm"):
            _require(len(core.shape) == 4 and core.shape[:2] == (b1[1], b1[1]), "bm")
            wide *= math.prod(core.shape[2:])
        return b1[0], wide

    def delta(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        a1, a2, b1, b2 = (_matrix(self.tensors[part]) for part in ("a1", "a2", "b1", "b2"))
        if self._is_old():
            return (weight @ a2) @ a1 + b2 @ b1
        cube = weight.reshape(len(weight), inputs, -1)
        changed = np.einsum("oik,ij,jl->olk", cube, a1, a2, optimize=True).reshape(weight.shape)
        if core := self.tensors.get("bm"):
            b2 = _tucker(_values(core), np.eye(len(b2), dtype=np.float32), b2)
        return changed + b1 @ b2


@dataclass(frozen=True)
class Orthogonal(Form):
    """OFT (Qiu et al. 2023): R @ W, where R is block-diagonal and orthogonal.

    ``oft_blocks`` hold any matrices P; R is Cayley's transform of Q = P - P.T. If the norm of all
    of Q is beyond alpha * out, Q is scaled to it (COFT). So do kohya's sd-scripts, LyCORIS and
    A1111; ComfyUI compares with alpha alone. ``oft_diag`` (LyCORIS before 2.0) hold R itself.

    Attributes:
        tensors: blocks or diag (n, b, b) with out = n * b; optionally rescale (out values), factors
            of the rows of the result, and alpha.
    """

    name: ClassVar[str] = "OFT"
    parts: ClassVar[tuple[str, ...]] = ("blocks", "diag", "rescale", "alpha")
    axes: ClassVar[int] = 0
    reads_weight: ClassVar[bool] = True

    def shape(self, weight: Shape, inputs: int) -> Shape:
        shape = self._blocks().shape
        _require(len(shape) == 3 and shape[1] == shape[2], "the blocks")
        return self._checked(shape[0] * shape[1], weight)

    def _blocks(self) -> LazyTensor:
        return self.tensors["blocks" if "blocks" in self.tensors else "diag"]

    def _checked(self, out: int, weight: Shape) -> Shape:
        if rescale := self.tensors.get("rescale"):
            _require(rescale.size == out, "rescale and the blocks")
        return out, weight[1]

    def _rotations(self, out: int) -> np.ndarray:
        """Return the orthogonal blocks."""
        blocks = _values(self._blocks())
        if "diag" in self.tensors:
            return blocks
        skew = blocks - blocks.swapaxes(-1, -2)
        limit = _scalar(self.tensors["alpha"]) * out if "alpha" in self.tensors else 0.0
        norm = float(np.linalg.norm(skew))
        if 0 < limit < norm:
            skew = skew * np.float32(limit / norm)
        eye = np.eye(skew.shape[-1], dtype=np.float32)
        # (I + Q) (I - Q)^-1; both factors are functions of Q, so their order does not matter.
        return np.linalg.solve(eye - skew, np.broadcast_to(eye + skew, skew.shape))

    def _rotated(self, weight: np.ndarray) -> np.ndarray:
        turns = self._rotations(len(weight))
        parts = weight.reshape(len(turns), turns.shape[1], -1)
        return (turns.swapaxes(1, 2) @ parts).reshape(weight.shape)

    def delta(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        result = self._rotated(weight)
        if rescale := self.tensors.get("rescale"):
            result = result * _values(rescale).reshape(-1, 1)
        return result - weight


@dataclass(frozen=True)
class Butterfly(Orthogonal):
    """BOFT (Liu et al. 2023): OFT by m block-diagonal factors, with permutations between them.

    Attributes:
        tensors: as for OFT; blocks (m, n, b, b).
    """

    name: ClassVar[str] = "BOFT"

    def shape(self, weight: Shape, inputs: int) -> Shape:
        shape = self._blocks().shape
        _require(len(shape) == 4 and shape[2] == shape[3] and shape[2] % 2 == 0, "oft_blocks")
        out = shape[1] * shape[2]
        _require(out % (2 ** (shape[0] - 1) * shape[2]) == 0, "oft_blocks")
        return self._checked(out, weight)

    def _rotated(self, weight: np.ndarray) -> np.ndarray:
        turns = self._rotations(len(weight))
        half, columns = turns.shape[-1] // 2, weight.shape[1]
        for i, turn in enumerate(turns):
            step = 2**i * half
            mixed = weight.reshape(-1, 2, step, columns).swapaxes(1, 2)
            mixed = turn @ mixed.reshape(len(turn), -1, columns)
            weight = mixed.reshape(-1, step, 2, columns).swapaxes(1, 2).reshape(-1, columns)
        return weight


@dataclass(frozen=True)
class Rescaled(Form):
    """(IA)^3 (Liu et al. 2022): W * w, with a factor per row, or per input channel.

    Attributes:
        tensors: weight, one value per channel, and on_input (LyCORIS); or factor, 1 + that (PEFT).
    """

    name: ClassVar[str] = "(IA)^3"
    parts: ClassVar[tuple[str, ...]] = ("weight", "on_input", "factor")
    axes: ClassVar[int] = 0
    reads_weight: ClassVar[bool] = True

    def _on_input(self) -> bool:
        if "factor" in self.tensors:
            shape = self.tensors["factor"].shape
            return len(shape) > 1 and shape[0] == 1 and shape[1] > 1
        return bool(_scalar(self.tensors["on_input"]))

    def shape(self, weight: Shape, inputs: int) -> Shape:
        count = self.tensors["factor" if "factor" in self.tensors else "weight"].size
        if self._on_input():
            return weight[0], weight[1] * count // inputs
        return count, weight[1]

    def delta(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        if "factor" in self.tensors:
            factors = _values(self.tensors["factor"]).reshape(-1) - np.float32(1)
        else:
            factors = _values(self.tensors["weight"]).reshape(-1)
        if not self._on_input():
            return weight * factors[:, None]
        cube = weight.reshape(len(weight), inputs, -1) * factors[:, None]
        return cube.reshape(weight.shape)


# The parts that a form needs. Of forms with the same needs, the number of axes decides.
_CHOICES: tuple[tuple[type[Form], set[str]], ...] = (
    (LowRank, {"down", "up"}),
    (Hadamard, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    *(
        (Kronecker, first | second)
        for first in ({"k1"}, {"k1_a", "k1_b"})
        for second in ({"k2"}, {"k2_a", "k2_b"})
    ),
    (Full, {"diff"}),
    (GeneralizedLowRank, {"a1", "a2", "b1", "b2"}),
    (Butterfly, {"blocks"}),
    (Orthogonal, {"blocks"}),
    (Orthogonal, {"diag"}),
    (Rescaled, {"weight", "on_input"}),
    (Rescaled, {"factor"}),
)


def make_form(tensors: Tensors) -> Form:
    """Make the form that has these parts. ``alpha`` may be among them.

    Raises: ValueError if no form has them.
    """
    parts = set(tensors) - {"alpha"}
    for kind, needed in _CHOICES:
        if needed <= parts and parts <= set(kind.parts):
            if kind is Butterfly and len(tensors["blocks"].shape) != 4:
                continue
            chosen = {name: t for name, t in tensors.items() if name in kind.parts}
            for part, tensor in chosen.items():
                _require(len(tensor.shape) >= kind.axes and tensor.size > 0, part)
            return kind(chosen)
    raise ValueError("these parts are not a complete LoRA or LyCORIS network")


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
        bias: it changes the bias beside the weight.
    """

    form: Form
    strength: float = 1.0
    magnitude: Magnitude | None = None
    rows: slice | None = None
    bias: bool = False

    def difference(self, weight: np.ndarray, inputs: int) -> np.ndarray:
        """Compute the difference at scale 1, without DoRA's norms: (out, in * kH * kW)."""
        difference = self.form.delta(weight, inputs) * np.float32(self.strength)
        return difference if self.rows is None else difference[self.rows]

    def added(self, weight: np.ndarray, scale: float, inputs: int) -> np.ndarray:
        """Compute the change of a weight.

        Args:
            weight: (out, in * kH * kW) float32.
            scale: factor for the change.
            inputs: number of input channels.
        Returns: (out, in * kH * kW) float32, to add to the weight.
        """
        scale32, difference = np.float32(scale), self.difference(weight, inputs)
        if self.magnitude is None:
            return difference * scale32
        if self.magnitude.scale_inside:
            changed = weight + difference * scale32
            return changed * self.magnitude.gain(changed, inputs) - weight
        changed = weight + difference
        return (changed * self.magnitude.gain(changed, inputs) - weight) * scale32

    @property
    def reads_weight(self) -> bool:
        """Return True if the change depends on the weight."""
        return self.form.reads_weight or self.magnitude is not None

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


def _scalar(tensor: LazyTensor) -> float:
    _require(tensor.size == 1, "a single number")
    return float(tensor.read().reshape(-1)[0])


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
