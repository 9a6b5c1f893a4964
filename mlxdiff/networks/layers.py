"""The layers and array functions that a network is built from.

A network is written once and imports no array library. A backend hands its layers to it, as its
first argument::

    class MLP(Module):
        def __init__(self, nn: Layers, width: int) -> None:
            super().__init__(nn)
            self.fc1 = nn.Linear(width, 4 * width)
            self.fc2 = nn.Linear(4 * width, width)

        def __call__(self, x: Array) -> Array:
            return self.fc2(self.nn.silu(self.fc1(x)))

    mlp = MLP(mlx_layers, 320)  # an mlx.nn.Module

NumPy's and MLX's sets are ``backends.numpy_layers`` and ``backends.mlx_layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mlxdiff.networks.condition import Frames

Array: TypeAlias = Any
"""An array of the backend, np.ndarray or mx.array: they share indexing, reshape and operators."""


_SEAMLESS: ContextVar[tuple[bool, bool]] = ContextVar("seamless", default=(False, False))


@contextmanager
def seamless(axes: str | None) -> Iterator[None]:
    """Let convolutions that pad with zeros see the opposite edge in their place, meanwhile.

    A picture that is drawn so continues itself when copies are laid side by side.

    Args:
        axes: x (left and right edges meet), y (top and bottom), xy; None: none.
    """
    token = _SEAMLESS.set(("y" in (axes or ""), "x" in (axes or "")))
    try:
        yield
    finally:
        _SEAMLESS.reset(token)


def wraps_rows() -> bool:
    """Return True if the top and the bottom edge meet."""
    return _SEAMLESS.get()[0]


def convolve(
    convolution: Callable[[Array], Array], x: Array, reach: int, stride: int, join: Any
) -> Array:
    """Apply a convolution that pads with zeros, with edges that meet where `seamless` says so.

    Args:
        convolution: maps (B, H, W, C) to (B, H', W', C').
        reach: how many zeros it pads with.
        stride: its stride.
        join: the backend's concatenate.
    """
    if not reach or not any(_SEAMLESS.get()):
        return convolution(x)
    # As many pixels from the opposite edge as give `reach` more outputs, which see the zeros.
    more, cut = reach * stride, [slice(None), slice(None)]
    for axis, meets in zip((1, 2), _SEAMLESS.get(), strict=True):
        if not meets:
            continue
        size = x.shape[axis]
        before = [x[(slice(None),) * axis + (slice(-more % size, None),)]] if more % size else []
        after = [x[(slice(None),) * axis + (slice(0, more % size),)]] if more % size else []
        x = join([*before, *[x] * (2 * (more // size) + 1), *after], axis)
        cut[axis - 1] = slice(reach, -reach)
    return convolution(x)[:, cut[0], cut[1]]


class Layer(Protocol):
    """A map of arrays."""

    def __call__(self, x: Array, /) -> Array: ...


class Convolution(Protocol):
    """A map of (B, H, W, C) that can add another feature map to its result."""

    def __call__(self, x: Array, more: Array | Callable[[], Array] | None = None, /) -> Array: ...


class FeatureNorm(Protocol):
    """A normalization of (B, H, W, C)."""

    def __call__(self, x: Array, /) -> Array: ...

    def silu(self, x: Array, /) -> Array:
        """Normalize, then apply silu."""

    def silu_over(self, bands: Sequence[Array], /) -> Callable[[Array], Array]:
        """Take the statistics over all bands of rows; return ``silu`` for each band."""


class Layers(Protocol):
    """A backend's set of layers and array functions. A module of functions and classes is one.

    The docstrings of the two sets say what each does; shapes are those of
    ``backends.numpy_layers``.

    Attributes:
        Module: the base of all layers and networks. It keeps the parameters as a tree of names.
        float32: the dtype.
    """

    Module: Any
    float32: Any

    # Layers.
    def Linear(self, in_features: int, out_features: int, bias: bool = True) -> Layer: ...

    def Conv2d(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> Convolution: ...

    def GroupNorm(self, num_groups: int, num_channels: int, eps: float = 1e-5) -> FeatureNorm: ...

    def LayerNorm(self, dims: int, eps: float = 1e-5) -> Layer: ...

    def Embedding(self, num_embeddings: int, dims: int) -> Layer: ...

    def parameter(self, *shape: int) -> Array: ...

    # Functions of a network.
    def silu(self, x: Array) -> Array: ...

    def gelu(self, x: Array) -> Array: ...

    def geglu(self, x: Array) -> Array: ...

    def relu(self, x: Array) -> Array: ...

    def leaky_relu(self, x: Array, slope: float | Array) -> Array: ...

    def tanh(self, x: Array) -> Array: ...

    def activation(self, name: str) -> Callable[[Array], Array]: ...

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        heads: int,
        mask: Array | None = None,
        batch: int | None = None,
    ) -> Array: ...

    def pad_heads(self, x: Array, heads: int) -> Array: ...

    def upsample_nearest(self, x: Array, height: int, width: int) -> Array: ...

    def timestep_embedding(
        self,
        timesteps: Array,
        embedding_dim: int,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0.0,
    ) -> Array: ...

    # Functions of arrays.
    def asarray(self, x: Any, dtype: Any) -> Array: ...

    def cast(self, x: Array, dtype: Any) -> Array: ...

    def arange(self, stop: int) -> Array: ...

    def where(self, condition: Array, x: Array, y: Array) -> Array: ...

    def clip(self, x: Array, low: float, high: float) -> Array: ...

    def concatenate(self, arrays: Sequence[Array], axis: int = 0) -> Array: ...

    def split(self, x: Array, parts: int, axis: int = 0) -> Sequence[Array]: ...

    def pad(self, x: Array, widths: Sequence[tuple[int, int]]) -> Array: ...

    def broadcast_to(self, x: Array, shape: tuple[int, ...]) -> Array: ...

    def evaluate(self, *arrays: Any) -> None: ...


@dataclass(frozen=True)
class Sizes:
    """The sizes of one evaluation of a network.

    Attributes:
        array: makes an input of a shape.
        height, width: of its input: latents for a U-Net and for a VAE that decodes, pixels for a
            VAE that encodes or for a U-Net that draws pixels.
        batch: how many at once: 2 for a U-Net under guidance.
        tokens: length of a text.
        encode: a VAE's encoder, in place of its decoder.
        frames: of each video, for a U-Net with motion modules. In parts: the batch is 1.
    """

    array: Callable[..., Array]
    height: int
    width: int
    batch: int
    tokens: int
    encode: bool
    frames: Frames = Frames()  # noqa: RUF009 - it never changes


class Module:
    """Base of every network and of its parts.

    ``Kind(nn, ...)`` makes an instance of a class that inherits from ``Kind`` and from
    ``nn.Module``: in MLX it is an ``mlx.nn.Module``, with parameters that can be trained.

    Attributes:
        nn: the layers that it was built from.
        dtype: what it computes in.
    """

    nn: Layers
    dtype: Any

    def __new__(cls: Any, nn: Any = None, *_: Any, **__: Any) -> Any:
        # A copy is made without arguments, of a class that has its layers.
        kind = cls if nn is None else _with_layers(cls, nn)
        return kind.nn.Module.__new__(kind)

    def __init__(self, nn: Layers) -> None:
        super().__init__()

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

        def parameters(self) -> Any: ...

        def load_weights(self, weights: list[tuple[str, Array]]) -> None: ...

        def put(self, name: str, weight: Any) -> None: ...

        def run_once(self, sizes: Sizes) -> Any:
            """Evaluate a whole network on inputs of these sizes (``networks.cost``)."""


@cache
def _with_layers(kind: Any, nn: Any) -> Any:
    """The class of networks of this kind that are built from these layers."""
    name, own = kind.__name__, {"nn": nn, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(name, (kind, nn.Module), own)
