"""Layers that compute nothing, but record a network's parameters and work.

They are a third set beside NumPy's and MLX's (``networks.layers.Layers``). An array is a shape.
A tape records what a network does to arrays, in order::

    network = build(recorder, config)
    network.parameters()               # name -> shape
    with Tape() as tape:
        network(recorder.parameter(2, 64, 64, 4), ...)
    tape.operations

Convolutions, linear maps and the two products of attention count as arithmetic. The held values
are those of all arrays that Python holds at that moment, as NumPy does: a later layer needs them,
or a variable still names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxdiff.weights.tensors import Shape

float32 = "float32"


@dataclass(frozen=True)
class Operation:
    """One layer's work.

    Attributes:
        kind: "convolution", "linear", "attention", or "elementwise" (norms and activations).
        macs: multiply-adds.
        weights: number of weight values that it multiplies with, biases left out.
        held: values of other arrays that exist meanwhile: skips, shortcuts, variables of callers.
        inputs, outputs: values that it reads and writes.
        scratch: values that it would unfold its input to (convolution), or its scores (attention).
        row: those of them that cannot be split: for a line of output, or a query of each head.
    """

    kind: str
    macs: int
    weights: int
    held: int
    inputs: int
    outputs: int
    scratch: int = 0
    row: int = 0


# --------------------------------------------------------------------------------------- the arrays


class Tape:
    """Records the work on arrays inside a ``with`` statement, in order.

    Attributes:
        operations: each layer's work.
        held: values of the arrays that were made and still exist.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.held = 0

    def __enter__(self) -> Tape:
        self._token = _tape.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _tape.reset(self._token)


_tape: ContextVar[Tape] = ContextVar("tape")


def _work(
    kind: str,
    inputs: Sequence[Recorded],
    outputs: int,
    macs: int = 0,
    weights: int = 0,
    scratch: int = 0,
    row: int = 0,
) -> None:
    """Write an operation down. Its inputs are not held beside it."""
    tape = _tape.get()
    own = {id(x.memory): x.memory.size for x in inputs if x.memory is not None}
    held, read = tape.held - sum(own.values()), sum(x.size for x in inputs)
    tape.operations.append(Operation(kind, macs, weights, held, read, outputs, scratch, row))


class _Memory:
    """The values of an array and of its views; they are held for as long as one of these exists."""

    def __init__(self, size: int) -> None:
        self.tape, self.size = _tape.get(), size
        self.tape.held += size

    def __del__(self) -> None:
        self.tape.held -= self.size


class Recorded:
    """An array: its shape.

    Args:
        shape: its shape.
        memory: of the array that it is a view of; None: a parameter, or given from outside.
    """

    dtype = float32

    def __init__(self, shape: Sequence[int], memory: _Memory | None) -> None:
        self.shape, self.memory = tuple(shape), memory

    def view(self, shape: Sequence[int]) -> Recorded:
        """The same memory in another shape."""
        return Recorded(shape, self.memory)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: Any) -> Recorded:
        sizes: list[int] = list(shape[0] if isinstance(shape[0], tuple) else shape)
        if -1 in sizes:
            known = -math.prod(sizes)
            sizes[sizes.index(-1)] = self.size // known
        return self.view(sizes)

    def transpose(self, *axes: int) -> Recorded:
        """The axes in another order: a new array, which the next layer reads."""
        return _new(*(self.shape[axis] for axis in axes))

    def __getitem__(self, index: Any) -> Recorded:
        parts = index if isinstance(index, tuple) else (index,)
        real = tuple(np.zeros(p.shape, int) if isinstance(p, Recorded) else p for p in parts)
        shape = np.broadcast_to(np.int8(0), self.shape)[real].shape
        taken = any(isinstance(p, Recorded) for p in parts)
        return _new(*shape) if taken else self.view(shape)

    def _with(self, other: Any) -> Recorded:
        shape = other.shape if isinstance(other, Recorded) else ()
        return _new(*np.broadcast_shapes(self.shape, shape))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __mod__ = _with
    __ge__ = __gt__ = __lt__ = __le__ = __or__ = __eq__ = _with  # type: ignore[assignment]

    def _in_place(self, other: Any) -> Recorded:
        return self

    __iadd__ = __imul__ = _in_place

    def _reduce(self, axis: int | tuple[int, ...], keepdims: bool = False) -> Recorded:
        axes = {a % self.ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
        kept = [
            1 if i in axes else n for i, n in enumerate(self.shape) if keepdims or i not in axes
        ]
        return _new(*kept)

    min = max = mean = _reduce


def _new(*shape: int) -> Recorded:
    """An array that the network makes."""
    return Recorded(shape, _Memory(math.prod(shape)))


# --------------------------------------------------------------------------------------- the layers


def parameter(*shape: int) -> Recorded:
    """An array that is not made by the network: a parameter, or an input."""
    return Recorded(shape, None)


class Module:
    """Base of all layers and networks: a tree of attributes and lists whose leaves are shapes."""

    dtype: Any = float32

    def parameters(self) -> dict[str, Shape]:
        """Name and shape of every parameter, in order of construction."""
        return dict(self._leaves(""))

    def _leaves(self, prefix: str) -> Iterator[tuple[str, Shape]]:
        for key, value in vars(self).items():
            if isinstance(value, Recorded):
                yield prefix + key, value.shape
            elif isinstance(value, Module):
                yield from value._leaves(f"{prefix}{key}.")
            elif isinstance(value, list):
                for i, child in enumerate(value):
                    yield from child._leaves(f"{prefix}{key}.{i}.")


class Linear(Module):
    """Affine map of the last axis; weight (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        self.weight = parameter(out_features, in_features)
        if bias:
            self.bias = parameter(out_features)

    def __call__(self, x: Recorded) -> Recorded:
        return _linear(x, *self.weight.shape)


def _linear(x: Recorded, outputs: int, inputs: int) -> Recorded:
    weights, vectors = inputs * outputs, x.size // inputs
    _work("linear", [x], vectors * outputs, vectors * weights, weights)
    return _new(*x.shape[:-1], outputs)


class Conv2d(Module):
    """Convolution of (B, H, W, C) with a square kernel; weight (out, kH, kW, in)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        self.stride, self.padding = stride, padding
        self.weight = parameter(out_channels, kernel_size, kernel_size, in_channels)
        if bias:
            self.bias = parameter(out_channels)

    def __call__(
        self, x: Recorded, more: Recorded | Callable[[], Recorded] | None = None
    ) -> Recorded:
        outputs, kernel, _, inputs = self.weight.shape
        if x.ndim == 2:  # pixels as the rows of a matrix, kernel 1
            return _linear(x, outputs, inputs)
        sides = ((n + 2 * self.padding - kernel) // self.stride + 1 for n in x.shape[1:3])
        shape = (len(x), *sides, outputs)
        pixels, weights = math.prod(shape[:3]), kernel * kernel * inputs * outputs
        unfolded = 0 if kernel == self.stride == 1 else kernel * kernel * inputs
        _work(
            "convolution",
            [x],
            pixels * outputs,
            pixels * weights,
            weights,
            pixels * unfolded,
            shape[2] * unfolded,
        )
        out = _new(*shape)
        if callable(more):
            more()
        return out


class GroupNorm(Module):
    """Group normalization of (B, H, W, C)."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        self.weight, self.bias = parameter(num_channels), parameter(num_channels)

    def __call__(self, x: Recorded) -> Recorded:
        return _new(*x.shape)

    def silu(self, x: Recorded) -> Recorded:
        """The silu of the normalized feature map."""
        return _elementwise(x)

    def silu_over(self, bands: Sequence[Recorded]) -> Callable[[Recorded], Recorded]:
        """The silu of each normalized band of a feature map."""
        return self.silu


class LayerNorm(Module):
    """Layer normalization of the last axis."""

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        self.weight, self.bias = parameter(dims), parameter(dims)

    def __call__(self, x: Recorded) -> Recorded:
        return _new(*x.shape)


class Embedding(Module):
    """Rows of a table by their number: (...) -> (..., dims)."""

    def __init__(self, num_embeddings: int, dims: int) -> None:
        self.weight = parameter(num_embeddings, dims)

    def __call__(self, ids: Recorded) -> Recorded:
        return _new(*ids.shape, self.weight.shape[1])


# ------------------------------------------------------------------------------------ the functions


def _elementwise(x: Recorded) -> Recorded:
    """An activation. Of vectors (B, C) none is written down: that is a millionth of the work."""
    if x.ndim > 2:
        _work("elementwise", [x], x.size)
    return _new(*x.shape)


silu = gelu = _elementwise


def geglu(x: Recorded) -> Recorded:
    """One half of the last axis, times the gelu of the other."""
    _work("elementwise", [x], x.size)
    return _new(*x.shape[:-1], x.shape[-1] // 2)


def relu(x: Recorded) -> Recorded:
    """max(x, 0)."""
    return _new(*x.shape)


def leaky_relu(x: Recorded, slope: Any) -> Recorded:
    """max(x, 0) + slope * min(x, 0)."""
    return _new(*x.shape)


def tanh(x: Recorded) -> Recorded:
    """The hyperbolic tangent."""
    return _new(*x.shape)


def activation(name: str) -> Callable[[Recorded], Recorded]:
    """The function of this name in a config."""
    return _elementwise


def attention(
    q: Recorded,
    k: Recorded,
    v: Recorded,
    heads: int,
    mask: Recorded | None = None,
    batch: int | None = None,
) -> Recorded:
    """Scaled dot-product attention: its two products."""
    batch, width = len(q) if batch is None else batch, q.shape[-1]
    queries, keys = q.size // width // batch, k.size // width // batch
    macs = 2 * batch * queries * keys * width
    _work("attention", [q, k, v], q.size, macs, 0, batch * heads * queries * keys, keys)
    return _new(*q.shape)


def pad_heads(x: Recorded, heads: int) -> Recorded:
    """Keys or values as attention takes them."""
    return x


def upsample_nearest(x: Recorded, height: int, width: int) -> Recorded:
    """Nearest-neighbour interpolation of (B, H, W, C)."""
    return _new(len(x), height, width, x.shape[-1])


def timestep_embedding(
    timesteps: Recorded,
    embedding_dim: int,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
) -> Recorded:
    """Sines and cosines of the timesteps: (B,) -> (B, D)."""
    return _new(len(timesteps), embedding_dim)


def asarray(x: Any, dtype: Any) -> Recorded:
    """The array itself; of a list of numbers, an array that is given."""
    return x if isinstance(x, Recorded) else parameter(len(x))


def cast(x: Recorded, dtype: Any) -> Recorded:
    """The array itself."""
    return x


def arange(stop: int) -> Recorded:
    """The integers from 0 to stop - 1."""
    return parameter(stop)


def where(condition: Recorded, x: Any, y: Any) -> Recorded:
    """Values of x where the condition holds, else of y."""
    shapes = [one.shape for one in (condition, x, y) if isinstance(one, Recorded)]
    return _new(*np.broadcast_shapes(*shapes))


def clip(x: Recorded, low: float, high: float) -> Recorded:
    """The values, limited to [low, high]."""
    return _new(*x.shape)


def concatenate(arrays: Sequence[Recorded], axis: int = 0) -> Recorded:
    """Join arrays along an axis."""
    shape = list(arrays[0].shape)
    shape[axis] = sum(x.shape[axis] for x in arrays)
    return _new(*shape)


def split(x: Recorded, parts: int, axis: int = 0) -> Sequence[Recorded]:
    """Equal parts of an array, along an axis: views of it."""
    shape = list(x.shape)
    shape[axis] //= parts
    return [x.view(shape) for _ in range(parts)]


def pad(x: Recorded, widths: Sequence[tuple[int, int]]) -> Recorded:
    """Add values before and after: (before, after) for each axis."""
    return _new(*(n + sum(more) for n, more in zip(x.shape, widths, strict=True)))


def broadcast_to(x: Recorded, shape: tuple[int, ...]) -> Recorded:
    """The array, repeated to this shape: a view of it."""
    return x.view(shape)


def evaluate(*arrays: Any) -> None:
    """Do nothing."""
