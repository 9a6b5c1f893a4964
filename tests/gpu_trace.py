"""Count what a GPU would be given: kernels, waits, bytes and compiled libraries.

Nothing runs on a GPU. MLX believes that there is one, and the graph of a function is read:

- a kernel is a node of the graph that is no view; MLX's fused kernels (attention, layer norm) and
  our own (``mlx_layers._kernel``) are one each;
- a wait is a call of ``mx.eval``;
- the bytes of a kernel are those of its inputs and its outputs, once each;
- a library is what Metal compiles from source for one of our kernels: one for each function, the
  types of its arguments, and numbers that are no arrays (mlx/backend/metal/compiled.cpp).

These counts have no noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxdiff.backends import mlx_layers as layers
from mlxdiff.networks.registry import build

VIEWS = frozenset(
    """
    Reshape Transpose Broadcast Slice Split ExpandDims Squeeze AsStrided Unflatten Flatten
    BroadcastAxes View Depends Full
    """.split()
)
"""Nodes that move no bytes. Full is what a stand-in for a fused kernel returns."""


@dataclass
class Counts:
    """What one function gives a GPU to do.

    Attributes:
        kernels: how many of each name.
        bytes: read and written by all kernels of a name.
        waits: how often the CPU waits.
        libraries: (function, arguments) of each library that is compiled.
        nodes: the graph, in order of evaluation: name, inputs and outputs (name, shape, dtype).
    """

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    waits: int = 0
    libraries: set[tuple[Any, ...]] = field(default_factory=set)
    nodes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gigabytes(self) -> float:
        return sum(self.bytes.values()) / 1e9


def nbytes(shape: Any, dtype: mx.Dtype) -> int:
    size = dtype.size
    for side in shape:
        size *= side
    return size


class Trace:
    """Makes MLX believe in a Metal GPU while a test runs, and counts.

    Args:
        monkeypatch: undoes it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = Counts()
        gpu = mx.Device(mx.gpu)
        monkeypatch.setattr(mx, "default_device", lambda: gpu)
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "eval", self._wait)
        fast = mx.fast
        monkeypatch.setattr(fast, "scaled_dot_product_attention", self._attention)
        monkeypatch.setattr(fast, "layer_norm", self._layer_norm)
        monkeypatch.setattr(mx, "contiguous", self._copy)
        for name, function in list(vars(layers).items()):
            if hasattr(function, "__wrapped__"):
                monkeypatch.setattr(layers, name, self._stand_in(name, function.__wrapped__))
        # A view kept beside a weight is computed once in a process, not in each evaluation.
        monkeypatch.setattr(layers.Module, "view", self._view)

    def network(self, config: Any, dtype: str) -> Any:
        """A network of this config with weights that take no memory."""
        net, kind = build(layers, config), getattr(mx, dtype)
        net.update(tree_map(lambda p: mx.zeros(p.shape, kind), net.parameters()))
        net.dtype = kind
        return net

    def run(self, net: Any, function: Callable[..., Any], *inputs: mx.array) -> Counts:
        """Count what a function of a network and inputs does. Weights are inputs of the graph."""
        counts = self.counts = Counts()
        flat = tree_flatten(net.parameters())
        names = [name for name, _ in flat]

        def traced(*arrays: mx.array) -> Any:
            counts.__init__()  # tracing may happen more than once
            weights = zip(names, arrays[len(inputs) :], strict=True)
            net.update(tree_unflatten(list(weights)))
            return function(*arrays[: len(inputs)])

        nodes: list[dict[str, Any]] = []
        mx.export_function(
            lambda d: nodes.append(d) if "name" in d and "outputs" in d else None,
            traced,
            *inputs,
            *[weight for _, weight in flat],
        )
        net.update(tree_unflatten(flat))
        counts.nodes = nodes
        for node in nodes:
            if node["name"] not in VIEWS:
                arrays = (*node["inputs"], *node["outputs"])
                self._add(node["name"], sum(nbytes(*a[1:]) for a in arrays))
        return counts

    def _add(self, name: str, size: int) -> None:
        self.counts.kernels[name] += 1
        self.counts.bytes[name] += size

    def _wait(self, *_: Any) -> None:
        self.counts.waits += 1

    @staticmethod
    def _view(module: Any, name: str, make: Callable[[mx.array], mx.array]) -> mx.array:
        made = make(module[name])
        # Of the weight, or equal products of one input would be merged.
        return mx.depends([mx.zeros(made.shape, made.dtype)], [module[name]])[0]

    def _attention(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None
    ) -> mx.array:
        self._add("attention", 2 * q.nbytes + k.nbytes + v.nbytes)
        return mx.depends([mx.zeros(q.shape, q.dtype)], [q, k, v])[0]

    def _copy(self, x: mx.array) -> mx.array:
        self._add("copy", 2 * x.nbytes)
        return mx.depends([mx.zeros(x.shape, x.dtype)], [x])[0]

    def _layer_norm(self, x: mx.array, weight: Any, bias: Any, eps: float) -> mx.array:
        self._add("layer_norm", 2 * x.nbytes)
        arrays = [a for a in (x, weight, bias) if a is not None]
        return mx.depends([mx.zeros(x.shape, x.dtype)], arrays)[0]

    def _stand_in(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """One node in place of a function's many."""

        def one(*arguments: Any) -> Any:
            arrays = [a for a in arguments if isinstance(a, mx.array)]
            self.counts.libraries.add(
                (
                    name,
                    *(
                        (str(a.dtype), a.ndim == 0) if isinstance(a, mx.array) else a
                        for a in arguments
                    ),
                )
            )
            # Only shapes and types are asked for: mx.compile would see the same.
            out = function(*arguments)
            several = out if isinstance(out, tuple) else (out,)
            results = mx.depends([mx.zeros(a.shape, a.dtype) for a in several], arrays)
            self._add(name, sum(a.nbytes for a in (*results, *arrays)))
            return tuple(results) if isinstance(out, tuple) else results[0]

        return one


def fresh_bytes(nodes: list[dict[str, Any]], cache_limit: int, late: int) -> int:
    """Bytes that a graph's buffers map anew, where freed ones are kept up to a limit.

    Replays MLX's allocator on Metal (allocator.cpp, buffer_cache.h) in the order of evaluation:
    buffers are whole pages of 16 KiB; a kept one serves a request of its size, or of a little less
    than it; the oldest leave above the limit.

    Args:
        nodes: ``Counts.nodes``.
        cache_limit: bytes.
        late: a buffer is free this many nodes after its last reader. (A GPU is behind the CPU.)
    """
    page, owner, last, made = 16384, {}, {}, []
    for i, node in enumerate(nodes):
        inputs = [owner.get(a[0], a[0]) for a in node["inputs"]]
        is_view = node["name"] in VIEWS - {"Full"} and inputs
        for out in node["outputs"]:
            owner[out[0]] = inputs[0] if is_view else out[0]
            if not is_view:
                made.append((i, out[0], max(page, -(-nbytes(*out[1:]) // page) * page)))
        last |= {name: i for name in inputs}
    requests: dict[int, list[tuple[str, int]]] = {}
    freed: dict[int, list[int]] = {}
    for i, name, size in made:
        requests.setdefault(i, []).append((name, size))
    kept: list[int] = []
    total, size_of = 0, {name: size for _, name, size in made}
    for name, size in size_of.items():
        if name in last:
            freed.setdefault(last[name] + late, []).append(size)
    for i in range(len(nodes)):
        for _, size in requests.get(i, []):
            fitting = [b for b in kept if size <= b < min(2 * size, size + 2 * page) or b == size]
            if fitting:
                kept.remove(min(fitting))
            else:
                total += size
                while sum(kept) > cache_limit:
                    kept.pop(0)
        for size in freed.get(i, []):
            if sum(kept) < cache_limit:
                kept.append(size)
    return total
