"""The layers that the networks are made of, for training (``networks.layers.Layers``), in MLX.

A third set beside ``mlx_layers``, with the same parameters and results. What differs:

- Each layer is one function with a gradient of its own, which keeps the layer's inputs and nothing
  else. Frozen weights get no gradient.
- A linear layer or a convolution can have an adapter beside its weight (Hu et al. 2021; Liu et al.
  2024): parameters ``lora_A``, ``lora_B`` and, for DoRA, ``lora_magnitude_vector``.
- On a CPU the functions are NumPy's (``numpy_layers``, ``numpy_gradients``): MLX has no fast
  exponential there, and no fast gradient of a convolution. On a GPU they are MLX's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdiff.backends import mlx_layers, numpy_gradients, numpy_layers
from mlxdiff.backends.mlx_layers import (
    Module,
    StoredWeight,
    arange,
    asarray,
    broadcast_to,
    cast,
    clip,
    concatenate,
    evaluate,
    float32,
    leaky_relu,
    pad,
    parameter,
    relu,
    split,
    tanh,
    timestep_embedding,
    upsample_nearest,
    where,
)

__all__ = [
    "Conv2d",
    "Embedding",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "Module",
    "activation",
    "arange",
    "asarray",
    "attention",
    "broadcast_to",
    "cast",
    "checkpointed",
    "clip",
    "concatenate",
    "evaluate",
    "float32",
    "geglu",
    "gelu",
    "leaky_relu",
    "pad",
    "pad_heads",
    "parameter",
    "relu",
    "silu",
    "split",
    "tanh",
    "timestep_embedding",
    "upsample_nearest",
    "where",
]

Weight = mx.array | StoredWeight
Forward = Callable[..., np.ndarray]
Backward = Callable[..., "tuple[np.ndarray | None, ...]"]


def _on_cpu() -> bool:
    return bool(mx.default_device() == mx.cpu)


def _numpy(x: mx.array) -> np.ndarray:
    """The values, computed now, without a copy where NumPy has the type."""
    if x.dtype == mx.float32:
        return np.asarray(x)
    return np.asarray(x.astype(mx.float32))


def _apply(forward: Forward, backward: Backward, *inputs: mx.array) -> mx.array:
    """A function of NumPy's arrays as one of MLX's, with its gradient.

    Args:
        forward: maps the inputs to the result.
        backward: maps inputs, result and the result's gradient to the gradient of each input;
            None: it gets none.
    """

    def run(*arrays: mx.array) -> mx.array:
        with np.errstate(over="ignore", invalid="ignore"):  # the loop looks at the loss
            return mx.array(forward(*map(_numpy, arrays)))

    function: Any = mx.custom_function(run)
    alone = len(inputs) == 1  # MLX keeps the functions with the result: they must hold no arrays

    def slope(primals: Any, cotangent: mx.array, out: mx.array) -> Any:
        primals = (primals,) if alone else tuple(primals)
        with np.errstate(over="ignore", invalid="ignore"):
            found = backward(*map(_numpy, primals), _numpy(out), _numpy(cotangent))
        gradients = tuple(
            mx.zeros_like(x)
            if part is None
            else mx.array(np.ascontiguousarray(part)).astype(x.dtype)
            for x, part in zip(primals, found, strict=True)
        )
        return gradients[0] if alone else gradients

    function.vjp(slope)
    result: mx.array = function(*inputs)
    return result


def checkpointed(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A function of arrays that keeps its inputs alone, and is computed again for its gradient.

    On a CPU ``mx.checkpoint`` would keep all: what NumPy computes is computed while MLX traces, and
    MLX holds what it traces. So the function gets arrays there that MLX does not trace.
    """
    if not _on_cpu():
        found: Callable[..., mx.array] = mx.checkpoint(function)
        return found

    def run(*arrays: mx.array) -> mx.array:
        return _untraced(function(*map(_untraced, arrays)))

    made: Any = mx.custom_function(run)

    def slope(primals: Any, cotangent: mx.array, out: mx.array) -> Any:
        alone = isinstance(primals, mx.array)
        inputs = [_untraced(x) for x in ((primals,) if alone else primals)]
        _, gradients = mx.vjp(function, inputs, [_untraced(cotangent)])
        kept = tuple(map(_untraced, gradients))
        return kept[0] if alone else kept

    made.vjp(slope)
    result: Callable[..., mx.array] = made
    return result


def _untraced(x: mx.array) -> mx.array:
    """The values as an array that MLX does not trace; a copy."""
    return mx.array(_numpy(x))


def _gradient(x: mx.array, values: np.ndarray | None) -> mx.array:
    """The gradient of an input; zeros where it gets none."""
    if values is None:
        return mx.zeros_like(x)
    return mx.array(np.ascontiguousarray(values)).astype(x.dtype)


# ------------------------------------------------------------------------------------------- layers


class _Map(Module):
    """Base of the two maps by a matrix.

    Attributes:
        trained: weight and bias are trained.
        lora_scale: factor of the adapter (alpha / rank).
    """

    trained: bool = False
    lora_scale: float = 1.0

    def adapt(self, rank: int, scale: float, magnitude: bool) -> dict[str, mx.array]:
        """Return the adapter's parameters of this rank, zeros, and expect them from now on."""
        out, *inner = self.weight.shape
        self.lora_scale = scale
        parts = {"lora_A": mx.zeros((rank, *inner)), "lora_B": mx.zeros((out, rank))}
        if magnitude:
            parts["lora_magnitude_vector"] = mx.zeros((out,))
        return parts

    def _adapter(self) -> tuple[mx.array, ...]:
        """lora_A, lora_B and the magnitude, those that the layer has."""
        names = ("lora_A", "lora_B", "lora_magnitude_vector")
        return tuple(self[name] for name in names if name in self)

    def _expanded(self) -> mx.array:
        weight = self.weight
        return weight.expand() if isinstance(weight, StoredWeight) else weight

    def norms(self) -> mx.array:
        """Norm of each output's weights with the adapter, (out,) float32: DoRA's magnitudes."""
        weight = self._expanded().astype(mx.float32)
        weight = weight.reshape(len(weight), -1)
        if "lora_A" in self and "lora_B" in self:
            a, b = (mx.stop_gradient(x).astype(mx.float32) for x in self._adapter()[:2])
            weight = weight + self.lora_scale * (b @ a.reshape(len(a), -1))
        return mx.linalg.norm(weight, axis=1)

    def _apply_here(self, x: mx.array, more: mx.array | None = None) -> mx.array:
        """The layer's result on a CPU, by NumPy; ``more`` is added to it."""
        adapter, weight, bias = self._adapter(), self.weight, self.get("bias")
        scale = np.float32(self.lora_scale)
        if len(adapter) == 3:
            norms = _numpy(self.norms())
        inputs: list[mx.array] = [x, *adapter]
        own = [weight] if bias is None else [weight, bias]
        if self.trained:
            inputs += own
        if more is not None:
            inputs.append(more)
        trained, has_more = self.trained, more is not None
        fixed_bias = None if bias is None or trained else _numpy(bias)

        def parts(arrays: Sequence[np.ndarray]) -> tuple[Any, ...]:
            """x, adapter, weight, bias, more."""
            values = list(arrays)
            first, factors = values[0], values[1 : 1 + len(adapter)]
            rest = values[1 + len(adapter) :]
            matrix = rest[0] if trained else _numpy(self._expanded())
            added = fixed_bias if not trained else (rest[1] if bias is not None else None)
            return first, factors, matrix, added, rest[-1] if has_more else None

        def linear(x: np.ndarray, factors: Sequence[np.ndarray], matrix: np.ndarray) -> np.ndarray:
            out = self._times(x, matrix)
            if factors:
                low = self._times(x, factors[0])
                out += numpy_layers._product(
                    low.reshape(-1, low.shape[-1]), (scale * factors[1]).T, None
                ).reshape(out.shape)
            return out

        def forward(*arrays: np.ndarray) -> np.ndarray:
            x, factors, matrix, bias, more = parts(arrays)
            out = linear(x, factors, matrix)
            if len(factors) == 3:
                out *= factors[2] / norms
            if bias is not None:
                out += bias
            if more is not None:
                out += more
            return out

        def backward(*arrays: np.ndarray) -> tuple[np.ndarray | None, ...]:
            *arrays_, _, g = arrays
            x, factors, matrix, bias, more = parts(arrays_)
            found: list[np.ndarray | None] = []
            whole = g
            if len(factors) == 3:
                columns = tuple(range(g.ndim - 1))
                product = linear(x, factors, matrix)
                product *= g
                magnitude = product.sum(axis=columns) / norms
                g = g * (factors[2] / norms)
            dx = self._input(x.shape, g, matrix)
            if factors:
                first, second = factors[:2]
                low = self._times(x, first)
                sent = numpy_layers._product(
                    g.reshape(-1, g.shape[-1]), scale * second, None
                ).reshape(low.shape)
                dx += self._input(x.shape, sent, first)
                found += [
                    self._weight_gradient(x, sent),
                    scale * numpy_gradients.linear_weight(low, g),
                ]
                if len(factors) == 3:
                    found.append(magnitude)
            if trained:
                found.append(self._weight_gradient(x, g))
                if bias is not None:
                    found.append(whole.sum(axis=tuple(range(g.ndim - 1))))
            if more is not None:
                found.append(_summed_to(whole, more.shape))
            return (dx, *found)

        return _apply(forward, backward, *inputs)

    def _times(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The product of x and a weight (out, ...) of this layer's kind."""
        raise NotImplementedError

    def _input(self, shape: tuple[int, ...], g: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The gradient of x."""
        raise NotImplementedError

    def _weight_gradient(self, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        """The gradient of such a weight."""
        raise NotImplementedError

    def _with_adapter(self, x: mx.array, out: mx.array, times: Callable[..., mx.array]) -> mx.array:
        """Add the adapter to a layer's product without bias, by MLX."""
        adapter = self._adapter()
        if not adapter:
            return out
        a, b = (part.astype(x.dtype) for part in adapter[:2])
        out = out + times(x, a) @ (self.lora_scale * b).T
        if len(adapter) == 3:
            norms = mx.stop_gradient(self.norms())
            out = out * (adapter[2] / norms).astype(out.dtype)
        return out


def _summed_to(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of what was repeated from this shape."""
    axes = tuple(i for i, (n, m) in enumerate(zip(g.shape, shape, strict=True)) if n != m)
    return g.sum(axis=axes, keepdims=True) if axes else g


class Linear(_Map):
    """Affine map of the last axis; weight (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight: Any = mx.zeros((out_features, in_features))
        if bias:
            self.bias = mx.zeros((out_features,))

    def __call__(self, x: mx.array) -> mx.array:
        if _on_cpu():
            return self._apply_here(x)
        if not self.trained and not self._adapter():
            return mlx_layers._affine(self, x)
        bias = self.get("bias")
        if self.trained:
            out = x @ self.weight.astype(x.dtype).T
        else:
            out = mlx_layers._affine(self, x)
            out = out if bias is None else out - bias
        out = self._with_adapter(x, out, lambda x, a: x @ a.T)
        return out if bias is None else out + bias.astype(out.dtype)

    def _times(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        out = numpy_layers._product(numpy_layers._rows(x), weight.T, None)
        return out.reshape(*x.shape[:-1], -1)

    def _input(self, shape: tuple[int, ...], g: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return numpy_gradients.linear_input(g, weight)

    def _weight_gradient(self, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        return numpy_gradients.linear_weight(x, g)


class Conv2d(_Map):
    """Convolution with a square kernel and zero padding; see ``mlx_layers.Conv2d``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.weight: Any = mx.zeros((out_channels, kernel_size, kernel_size, in_channels))
        if bias:
            self.bias = mx.zeros((out_channels,))

    def __call__(
        self, x: mx.array, more: mx.array | Callable[[], mx.array] | None = None
    ) -> mx.array:
        more = more() if callable(more) else more
        if x.ndim == 2:  # rows of a feature map: a projection, 1x1
            x = x[None, None]
            return self(x)[0, 0]
        if _on_cpu():
            return self._apply_here(x, more)

        def times(x: mx.array, weight: mx.array) -> mx.array:
            return mx.conv2d(x, weight, self.stride, self.padding)

        weight, bias = self._expanded().astype(x.dtype), self.get("bias")
        out = self._with_adapter(x, times(x, weight), times)
        out = out if bias is None else out + bias.astype(out.dtype)
        return out if more is None else out + more

    def _times(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        layer = numpy_layers.Conv2d(
            weight.shape[-1], len(weight), weight.shape[1], self.stride, self.padding, bias=False
        )
        layer.weight = weight
        return layer(x)

    def _input(self, shape: tuple[int, ...], g: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return numpy_gradients.convolution_input(shape, g, weight, self.stride, self.padding)

    def _weight_gradient(self, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        size = self.weight.shape[1]
        return numpy_gradients.convolution_weight(x, g, size, self.stride, self.padding)


class GroupNorm(mlx_layers.GroupNorm):
    """Group normalization of (B, H, W, C); see ``mlx_layers.GroupNorm``.

    Attributes:
        trained: weight and bias are trained.
    """

    trained: bool = False

    def __call__(self, x: mx.array) -> mx.array:
        return self._normalize(x, silu=False)

    def silu(self, x: mx.array) -> mx.array:
        """The silu of the normalized feature map."""
        return self._normalize(x, silu=True)

    def _normalize(self, x: mx.array, silu: bool) -> mx.array:
        if not _on_cpu():
            if not self.trained:
                return super().silu(x) if silu else super().__call__(x)
            return self._natively(x, silu)
        layer = numpy_layers.GroupNorm(self.num_groups, x.shape[-1], self.eps)
        trained = [self.weight, self.bias] if self.trained else []

        def put(weights: Sequence[np.ndarray]) -> None:
            layer.weight, layer.bias = weights or map(_numpy, (self.weight, self.bias))

        def forward(x: np.ndarray, *weights: np.ndarray) -> np.ndarray:
            put(weights)
            return layer.silu(x) if silu else layer(x)

        def backward(x: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray | None, ...]:
            *weights, _, g = arrays
            put(weights)
            found = numpy_gradients.group_norm(layer, x, g, silu, bool(weights))
            return found if weights else found[:1]

        return _apply(forward, backward, x, *trained)

    def _natively(self, x: mx.array, silu: bool) -> mx.array:
        """By functions of MLX that have gradients, with a trained weight and bias."""
        batch, height, width, _ = x.shape
        rows = x.astype(mx.float32).reshape(batch, height * width, self.num_groups, -1)
        rows = rows.transpose(0, 2, 1, 3).reshape(batch, self.num_groups, -1)
        rows = mx.fast.layer_norm(rows, None, None, self.eps)
        rows = rows.reshape(batch, self.num_groups, height * width, -1).transpose(0, 2, 1, 3)
        out = rows.reshape(x.shape) * self.weight.astype(mx.float32)
        out = out + self.bias.astype(mx.float32)
        return (out * mx.sigmoid(out) if silu else out).astype(x.dtype)


class LayerNorm(mlx_layers.LayerNorm):
    """Layer normalization of the last axis; see ``mlx_layers.LayerNorm``.

    Attributes:
        trained: weight and bias are trained.
    """

    trained: bool = False

    def __call__(self, x: mx.array) -> mx.array:
        if not _on_cpu():
            weight, bias = self.weight.astype(x.dtype), self.bias.astype(x.dtype)
            return mx.fast.layer_norm(x, weight, bias, self.eps)
        layer = numpy_layers.LayerNorm(x.shape[-1], self.eps)
        trained = [self.weight, self.bias] if self.trained else []

        def put(weights: Sequence[np.ndarray]) -> None:
            layer.weight, layer.bias = weights or map(_numpy, (self.weight, self.bias))

        def forward(x: np.ndarray, *weights: np.ndarray) -> np.ndarray:
            put(weights)
            return layer(x)

        def backward(x: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray | None, ...]:
            *weights, _, g = arrays
            put(weights)
            found = numpy_gradients.layer_norm(x, layer.weight, self.eps, g, bool(weights))
            return found if weights else found[:1]

        return _apply(forward, backward, x, *trained)


class Embedding(mlx_layers.Embedding):
    """Rows of a table by their number: (...) int -> (..., dims)."""

    trained: bool = False


# ---------------------------------------------------------------------------------------- functions


def _elementwise(name: str, natively: Callable[[mx.array], mx.array]) -> Callable[..., mx.array]:
    """A function of ``numpy_layers`` and its gradient on a CPU, MLX's elsewhere."""
    forward, slope = getattr(numpy_layers, name), getattr(numpy_gradients, name)

    def function(x: mx.array) -> mx.array:
        if not _on_cpu():
            return natively(x)
        return _apply(forward, lambda x, _, g: (slope(x, g),), x)

    function.__doc__ = forward.__doc__
    return function


_silu = _elementwise("silu", mlx_layers.silu)
_gelu = _elementwise("gelu", mlx_layers.gelu)
_quick_gelu = _elementwise("quick_gelu", mlx_layers.quick_gelu)
_geglu = _elementwise("geglu", mlx_layers.geglu)


def silu(x: mx.array) -> mx.array:
    """x times its logistic sigmoid."""
    return _silu(x)


def gelu(x: mx.array) -> mx.array:
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016), exactly."""
    return _gelu(x)


def geglu(x: mx.array) -> mx.array:
    """One half of the last axis, times the gelu of the other (Shazeer 2020)."""
    return _geglu(x)


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """The function that a config calls by this name: silu, gelu or quick_gelu."""
    return {"silu": silu, "gelu": gelu, "quick_gelu": _quick_gelu}[name]


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    heads: int,
    mask: mx.array | None = None,
    batch: int | None = None,
) -> mx.array:
    """Scaled dot-product attention; see ``mlx_layers.attention``."""
    if _on_cpu():
        seen = None if mask is None else np.asarray(mask)
        return _apply(
            lambda q, k, v: numpy_layers.attention(q, k, v, heads, seen, batch),
            lambda q, k, v, out, g: numpy_gradients.attention(q, k, v, out, g, heads, seen, batch),
            q,
            k,
            v,
        )
    count, shape = len(q) if batch is None else batch, q.shape
    q, k, v = (mlx_layers._by_head(x, heads, count).transpose(0, 2, 1, 3) for x in (q, k, v))
    scale = (shape[-1] // heads) ** -0.5
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(shape)


def pad_heads(x: mx.array, heads: int) -> mx.array:
    """Keys or values (B, L, heads * D) as ``attention`` takes them: as they are."""
    return x
