"""``mlxdiff doctor --self-test``: check that MLX computes correctly on this machine, and time it.

Every kind of operation that the networks use runs on each device and in each type. float64 judges
the result (``judges``). The allowed error is derived, not tuned: see ``Operation.allowed``. The
other checks look at the quantized modes, at the switch that ``--exact`` sets, at the cost of a wait
and of a new compiled function, and at the built-in model: its pictures against NumPy's, its memory
against the estimate, and its memory over many pictures.

The record is meant for posting: it holds no names of people, computers or folders.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.loading import load, make_backend
from mlxdiff.machine import probe
from mlxdiff.machine.exact import VARIABLES
from mlxdiff.report import judges
from mlxdiff.weights.quantization import (
    AFFINE_BITS,
    FLOAT_MODES,
    Packed,
    Quantization,
    dequantize,
    quantize,
)

SCHEMA = "mlxdiff-self-test/1"
OK, NOTE, FAULT = "ok", "note", "fault"
PROMPT = "a small red circle left of a large blue square on a yellow background"
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoffs: half a unit in the last place of 1."""
TF32 = 2.0**-11
"""Unit roundoff of the inputs of a float32 product that a GPU takes as TF32."""
ELEMENTARY = 4e-7
"""Relative error that exp, erf and their kin may have in float32 (MLX's own, or the layers')."""
_RARE = 1e-6  # probability that an operation that works is called wrong
_PICTURES = 20  # drawn one after the other, to see whether memory grows


@dataclass(frozen=True)
class Check:
    """The result of one check; every field is in the record.

    Attributes:
        check: stable name, for programs.
        device: "gpu" or "cpu".
        dtype: type of the arrays, or "".
        state: "ok"; "note", worth knowing; "fault", wrong.
        error: the measured error, relative to the largest value unless ``text`` gives another
            unit; None for a measurement of time alone.
        allowed: the largest ``error`` that is right.
        seconds: time of the quickest of a few runs, or None if it was not timed.
        text: an explanation, or "".
    """

    check: str
    device: str
    dtype: str
    state: str
    error: float | None = None
    allowed: float | None = None
    seconds: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Operation:
    """An operation of the networks on random inputs.

    Attributes:
        name: for the table.
        inputs: float64 arrays; they are rounded to the working type before either side computes.
        run: (layers, arrays of the backend) -> an array of the backend.
        judge: the same in float64.
        terms: number of terms in each sum, or 0 without sums.
        roundings: number of results in a row that kernels store in the working type.
        elementary: factor of ELEMENTARY in the result, or 0 without exp and the like.
        winograd: True if Metal uses Winograd's method for it by default.
    """

    name: str
    inputs: Sequence[np.ndarray]
    run: Callable[[Any, Sequence[Any]], Any]
    judge: Callable[..., np.ndarray]
    terms: int
    roundings: int = 1
    elementary: float = 0.0
    winograd: bool = False

    def allowed(self, dtype: str, judged: np.ndarray, sums: float = ROUNDOFF["float32"]) -> float:
        """Return the error that rounding explains, relative to the largest value.

        A float32 sum of n terms is a random walk of n roundings. Its relative error is sqrt(n) u in
        the mean square. The largest error of N results is k = sqrt(2 ln(2 N / p)) times that,
        except with probability p. Each rounding to the working type, and each exp, adds its own.

        Args:
            dtype: the working type.
            judged: the correct result, float64.
            sums: unit roundoff of the sums.
        """
        largest = float(np.abs(judged).max())
        spread = float(np.sqrt(np.square(judged).mean())) / largest
        walk = self.deviates(judged) * math.sqrt(self.terms) * sums * spread
        return walk + self.roundings * ROUNDOFF[dtype] + self.elementary * ELEMENTARY

    def allowed_by_winograd(self, dtype: str, judged: np.ndarray) -> float:
        """Return the allowed error of Winograd's method (``judges.winograd_growth``)."""
        largest = float(np.abs(judged).max())
        spread = float(np.sqrt(np.square(judged).mean())) / largest
        growth = judges.winograd_growth(transforms_rounded=dtype == "float32")
        walk = self.deviates(judged) * growth * ROUNDOFF[dtype] * spread
        return walk + self.allowed(dtype, judged)

    @staticmethod
    def deviates(judged: np.ndarray) -> float:
        """Return the largest deviation to expect of that many results, in standard deviations."""
        return math.sqrt(2 * math.log(2 * judged.size / _RARE))


@dataclass(frozen=True)
class Leg:
    """A device and a type to run the operations in.

    Attributes:
        device: "gpu" or "cpu".
        dtype: the working type.
        place: enters the device.
    """

    device: str
    dtype: str
    place: Callable[[], AbstractContextManager[None]]


def self_test(on_check: Callable[[Check], None] | None = None) -> dict[str, Any]:
    """Run every check.

    Args:
        on_check: called with each check as soon as it is done.
    Returns: the record, JSON values only; ``state`` is "fault" if any check is.
    Raises: UsageError without MLX.
    """
    try:
        backend = make_backend("mlx")
    except UsageError as error:
        raise UsageError(f"the self-test is a test of MLX, and there is none: {error}") from None
    # The only place here that names MLX's layers.
    from mlxdiff.backends import mlx_layers as layers
    from mlxdiff.backends import mlx_probe as mlx

    machine, start = probe.facts(), time.perf_counter()
    checks = []
    for check in _checks(backend, layers, mlx):
        checks.append(check)
        if on_check is not None:
            on_check(check)
    return {
        "schema": SCHEMA,
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": probe.versions(),
        "device": backend.device(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "state": FAULT if any(c.state == FAULT for c in checks) else OK,
        "seconds": round(time.perf_counter() - start, 1),
        "checks": [_json(check) for check in checks],
    }


def _json(check: Check) -> dict[str, Any]:
    """Return a check's fields, numbers to four digits; JSON has no infinity: null."""
    values = asdict(check)
    for name, value in values.items():
        if isinstance(value, float):
            values[name] = float(f"{value:.4g}") if math.isfinite(value) else None
    return values


def _checks(backend: Any, layers: ModuleType, mlx: ModuleType) -> Iterator[Check]:
    on_gpu = backend.has_gpu()
    cpu = [Leg("cpu", "float32", mlx.on_cpu)]
    if on_gpu:
        legs = [Leg("gpu", "float32", nullcontext), Leg("gpu", "float16", nullcontext), *cpu]
    else:
        legs = [*cpu, Leg("cpu", "float16", mlx.on_cpu)]
    for operation in operations(large=on_gpu):
        for leg in legs:
            yield _judged(backend, layers, operation, leg)
    yield from _quantized(backend, layers, legs, large=on_gpu)
    yield _switch(mlx, on_gpu)
    yield from _costs(backend, mlx, on_gpu)
    yield from _builtin(mlx, on_gpu)


# -------------------------------------------------------------------------------------- operations


def operations(large: bool) -> list[Operation]:
    """Return every kind of operation that the networks use.

    Args:
        large: use the sizes of a 512x512 picture. Otherwise sides are a quarter of them, and
            channels a fifth, which is fast enough for a CPU.
    """
    side, channels, tokens = (64, 320, 1024) if large else (16, 64, 96)
    return [
        *_convolutions(side, channels),
        *_elementwise(side, channels),
        *_attentions(tokens),
        *_others(side, channels),
    ]


def _convolutions(side: int, channels: int) -> Iterator[Operation]:
    # inputs, outputs, kernel, stride, padding, side: each kind that the networks have.
    cases = {
        "conv 3x3, 4 channels in (latents)": (4, channels, 3, 1, 1, side),
        "conv 3x3, 9 channels in (inpainting)": (9, channels, 3, 1, 1, side),
        "conv 3x3, 4 channels out": (channels, 4, 3, 1, 1, side),
        "conv 3x3, small map": (channels, channels, 3, 1, 1, side // 4),
        "conv 3x3, stride 2": (channels, channels, 3, 2, 1, side // 2),
        "conv 1x1": (channels, channels, 1, 1, 0, side // 2),
        "conv 14x14, stride 14 (CLIP's patches)": (3, channels, 14, 14, 0, 56),
        "conv 3x3, large map": (channels, channels, 3, 1, 1, side),
    }
    for name, (inputs, outputs, size, stride, padding, edge) in cases.items():
        terms = size * size * inputs
        # The rule of MLX (docs/metal.md); its other conditions hold for every case here.
        pixels, both = edge * edge, inputs + outputs
        chosen = (size, stride) == (3, 1) and inputs % 32 == outputs % 32 == 0

        yield Operation(
            name,
            [
                _normal(1, edge, edge, inputs),
                _normal(outputs, size, size, inputs) / math.sqrt(terms),
                _normal(outputs),
            ],
            partial(_convolved, (inputs, outputs, size, stride, padding)),
            partial(judges.convolution, stride=stride, padding=padding),
            terms,
            roundings=2,  # the product, and with the bias
            winograd=chosen and pixels >= 4096 and both >= 256,
        )


def _convolved(shape: tuple[int, ...], layers: Any, arrays: Sequence[Any]) -> Any:
    return _filled(layers.Conv2d(*shape), arrays[1:])(arrays[0])


def _elementwise(side: int, channels: int) -> Iterator[Operation]:
    values = [
        _normal(1, side, side, channels) + 0.5,
        1 + 0.1 * _normal(channels),
        _normal(channels),
    ]
    terms = side * side * channels // 32

    def norm(layers: Any, arrays: Sequence[Any]) -> Any:
        return _filled(layers.GroupNorm(32, channels), arrays[1:])

    yield Operation(
        "group norm",
        values,
        lambda layers, arrays: norm(layers, arrays)(arrays[0]),
        lambda x, weight, bias: judges.group_norm(x, weight, bias, 32),
        terms,
        roundings=2,  # on a GPU the normalized rows, then the result
    )
    yield Operation(
        "group norm and silu",
        values,
        lambda layers, arrays: norm(layers, arrays).silu(arrays[0]),
        lambda x, weight, bias: judges.silu(judges.group_norm(x, weight, bias, 32)),
        terms,
        roundings=3,  # the norm, the sigmoid, their product
        elementary=1,
    )

    def in_bands(layers: Any, arrays: Sequence[Any]) -> Any:
        bands = layers.split(arrays[0], 2, 1)
        activate = norm(layers, arrays).silu_over(bands)
        return layers.concatenate([activate(band) for band in bands], 1)

    yield Operation(
        "group norm and silu, in two bands",
        values,
        in_bands,
        lambda x, weight, bias: judges.silu(judges.group_norm(x, weight, bias, 32)),
        terms,
        # The norm, the sigmoid, their product. Scale and shift, larger than their sum, are
        # rounded in float32 only.
        roundings=3,
        elementary=1,
    )
    rows = values[0].reshape(1, -1, channels)
    yield Operation(
        "layer norm",
        [rows, *values[1:]],
        lambda layers, arrays: _filled(layers.LayerNorm(channels), arrays[1:])(arrays[0]),
        judges.layer_norm,
        channels,
        roundings=3,  # MLX's kernel rounds before the weight, after it, and with the bias
    )
    # A kernel that works in the half type rounds after each operation of the formula.
    yield Operation(
        "silu",
        [rows],
        lambda layers, arrays: layers.silu(arrays[0]),
        judges.silu,
        0,
        roundings=3,
        elementary=1,
    )
    yield Operation(
        "quick gelu",
        [rows],
        lambda layers, arrays: layers.quick_gelu(arrays[0]),
        lambda x: judges.silu(x, 1.702),
        0,
        roundings=4,
        elementary=1,
    )
    few = rows[:, :256]
    yield Operation(
        "gelu",
        [few],
        lambda layers, arrays: layers.gelu(arrays[0]),
        judges.gelu,
        0,
        roundings=5,
        elementary=1,
    )
    yield Operation(
        "geglu",
        [few],
        lambda layers, arrays: layers.geglu(arrays[0]),
        judges.geglu,
        0,
        roundings=6,
        elementary=1,
    )


def _attentions(tokens: int) -> Iterator[Operation]:
    causal = np.tril(np.ones((77, 77), bool))
    # head dimension, queries, keys, mask
    cases: dict[str, tuple[int, int, int, np.ndarray | None]] = {
        f"attention, heads of {dims}": (dims, tokens, tokens, None)
        for dims in (40, 64, 80, 128, 160, 512)
    }
    cases["attention, heads of 64, causal (text)"] = (64, 77, 77, causal)
    for keys in (77, 4, 1):
        for dims in (40, 64, 80):
            cases[f"attention, heads of {dims}, {keys} keys"] = (dims, tokens, keys, None)
    for name, (dims, queries, keys, mask) in cases.items():
        heads = 1 if dims > 160 else 2

        # The absolute error of a score is the relative error of a weight; scores reach 5 here.
        yield Operation(
            name,
            [_normal(1, length, heads * dims) for length in (queries, keys, keys)],
            partial(_attended, heads, mask),
            partial(judges.attention, heads=heads, mask=mask),
            dims + keys,
            roundings=4,  # scaled queries, scores, weights, result
            elementary=5,
        )


def _attended(heads: int, mask: np.ndarray | None, layers: Any, arrays: Sequence[Any]) -> Any:
    seen = None if mask is None else type(arrays[0])(mask)  # an array of the same library
    return layers.attention(*arrays, heads, seen)


def _others(side: int, channels: int) -> Iterator[Operation]:
    rows, inner = side * side, 4 * channels
    exact: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "relu": lambda x: np.maximum(x, 0),
        "tanh": np.tanh,
    }
    for name, judge in exact.items():  # TAESD's
        yield Operation(
            name,
            [_normal(1, rows, channels)],
            lambda layers, arrays, name=name: getattr(layers, name)(arrays[0]),  # type: ignore[misc]
            judge,
            0,
            elementary=1,
        )
    yield Operation(
        "leaky_relu",
        [_normal(1, rows, channels)],
        lambda layers, arrays: layers.leaky_relu(arrays[0], 0.2),
        lambda x: np.where(x > 0, x, 0.2 * x),
        0,
        elementary=1,
    )
    yield Operation(
        "linear",
        [_normal(1, rows, channels), _normal(inner, channels) / channels**0.5, _normal(inner)],
        lambda layers, arrays: _filled(layers.Linear(channels, inner), arrays[1:])(arrays[0]),
        judges.linear,
        channels,
        roundings=2,
    )
    yield Operation(
        "upsample, twice",
        [_normal(1, side, side, channels)],
        lambda layers, arrays: layers.upsample_nearest(arrays[0], 2 * side, 2 * side),
        lambda x: x.repeat(2, axis=1).repeat(2, axis=2),
        0,
        roundings=0,
    )
    odd = 2 * side + 1
    index = np.arange(odd) * side // odd
    yield Operation(
        "upsample, odd",
        [_normal(1, side, side, channels)],
        lambda layers, arrays: layers.upsample_nearest(arrays[0], odd, odd),
        lambda x: x[:, index][:, :, index],
        0,
        roundings=0,
    )
    ids = np.arange(77) * 7 % channels
    yield Operation(
        "embedding, rows of a table",
        [_normal(channels, inner)],
        lambda layers, arrays: _filled(layers.Embedding(channels, inner), arrays)(
            type(arrays[0])(ids)
        ),
        lambda table: table[ids],
        0,
        roundings=0,
    )
    times = np.array([0.0, 1.0, 21.0, 500.0, 999.0])
    # Rounding the frequency and the angle of 999 radians moves the phase by 999 u each.
    yield Operation(
        "timestep embedding",
        [times],
        lambda layers, arrays: layers.timestep_embedding(arrays[0], 320),
        lambda t: judges.timestep_embedding(t, 320),
        0,
        elementary=3 * 999 * ROUNDOFF["float32"] / ELEMENTARY,
    )


def _normal(*shape: int) -> np.ndarray:
    """Return normal deviates that depend on the shape alone."""
    seed = sum((i + 1) * side for i, side in enumerate(shape)) % 2**32
    return np.random.RandomState(seed).standard_normal(shape)


def _filled(layer: Any, parameters: Sequence[Any]) -> Any:
    """Give a layer its weight, and its bias where it has one."""
    for name, value in zip(("weight", "bias"), parameters, strict=False):
        layer.put(name, value)
    return layer


def _judged(backend: Any, layers: ModuleType, operation: Operation, leg: Leg) -> Check:
    """Run an operation on a leg and judge it by float64."""
    with leg.place():
        arrays = [backend.asarray(x.astype(np.float32), leg.dtype) for x in operation.inputs]
        rounded = [backend.to_numpy(x).astype(np.float64) for x in arrays]
        try:
            run = _timed(backend, lambda: operation.run(layers, arrays))
        except Exception as failure:  # a missing kernel must not hide the others
            text = f"does not run: {type(failure).__name__}: {failure}"
            return Check(operation.name, leg.device, leg.dtype, FAULT, text=text)
        found = backend.to_numpy(run.result).astype(np.float64)
    judged = operation.judge(*rounded)
    if found.shape != judged.shape:
        text = f"has the shape {found.shape}, expected {judged.shape}"
        return Check(operation.name, leg.device, leg.dtype, FAULT, text=text)
    error = _difference(found, judged)
    state, allowed, text = _verdict(operation, leg, error, judged)
    return Check(operation.name, leg.device, leg.dtype, state, error, allowed, run.seconds, text)


def _verdict(
    operation: Operation, leg: Leg, error: float, judged: np.ndarray
) -> tuple[str, float, str]:
    """Return the state, the allowed error, and an explanation of another method."""
    direct = operation.allowed(leg.dtype, judged)
    if error <= direct:
        return OK, direct, ""
    if leg.device == "gpu" and operation.winograd:
        allowed = operation.allowed_by_winograd(leg.dtype, judged)
        if os.environ.get("MLX_CONV_WINOGRAD") == "0":
            text = "this MLX ignores MLX_CONV_WINOGRAD=0, so --exact is not exact: install 0.32.4"
            return FAULT, direct, text
        if error <= allowed:
            return OK, allowed, "by Winograd's method (--exact computes it directly)"
    if leg.device == "gpu" and leg.dtype == "float32" and operation.terms:
        allowed = operation.allowed(leg.dtype, judged, TF32)
        if error <= allowed and os.environ.get("MLX_ENABLE_TF32") != "0":
            return NOTE, allowed, "float32 is multiplied as TF32 (--exact does not)"
    finite = math.isfinite(error)
    text = "loses more than rounding explains" if finite else "gives values that are not finite"
    return FAULT, direct, text


def _difference(found: np.ndarray, judged: np.ndarray) -> float:
    """Return the largest error relative to the largest value; infinite unless all are finite."""
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - judged).max() / np.abs(judged).max())


@dataclass(frozen=True)
class _Run:
    """The result of a run, and the seconds of the quickest run."""

    result: Any
    seconds: float


def _timed(backend: Any, run: Callable[[], Any], times: int = 3) -> _Run:
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        result = run()
        backend.evaluate(result)
        best = min(best, time.perf_counter() - start)
        if best > 1:  # do not repeat on a slow device
            break
    return _Run(result, best)


# --------------------------------------------------------------------------------- quantized modes


def modes() -> list[Quantization]:
    """Return every way that weights can be quantized, affine ones in groups of 64."""
    affine = [Quantization(bits) for bits in AFFINE_BITS]
    return affine + [Quantization(*size, mode) for mode, size in FLOAT_MODES.items()]


def _quantized(
    backend: Any, layers: ModuleType, legs: Sequence[Leg], large: bool
) -> Iterator[Check]:
    """Check a linear layer on packed weights, in each mode, against the values they stand for."""
    rows, width = (1024, 1280) if large else (64, 256)
    weight = (_normal(width, width) / math.sqrt(width)).astype(np.float32)
    for how in modes():
        packed = quantize(weight, how)
        values = dequantize(packed, np.float32).astype(np.float64)
        for leg in legs:
            operation = Operation(
                f"quantized linear, {how}",
                [_normal(1, rows, width)],
                partial(_packed_product, packed),
                partial(judges.linear, weight=values, bias=np.zeros(width)),
                width,
                # Scales, biases, expanded values and the product are rounded to the working type.
                roundings=1 if leg.dtype == "float32" else 4,
            )
            yield _judged(backend, layers, operation, leg)


def _packed_product(packed: Packed, layers: Any, arrays: Sequence[Any]) -> Any:
    layer = layers.Linear(packed.shape[1], packed.shape[0], bias=False)
    layer.put("weight", layers.StoredWeight(packed, arrays[0].dtype))
    return layer(arrays[0])


# ----------------------------------------------------------------------- switches, waits, compiling


def _switch(mlx: ModuleType, on_gpu: bool) -> Check:
    """Check that MLX_CONV_WINOGRAD=0, which --exact sets, changes bits."""
    name = "the switch of --exact"
    if not on_gpu:
        return Check(
            name, "cpu", "", OK, text="no GPU: there is no Winograd's method to switch off"
        )
    if mlx.winograd_can_be_switched_off():
        return Check(name, "gpu", "float16", OK, text="MLX_CONV_WINOGRAD=0 changes bits")
    text = (
        "MLX_CONV_WINOGRAD=0 changes nothing: either this MLX ignores it (0.32.4 does not), or it "
        "does not use Winograd's method here"
    )
    return Check(name, "gpu", "float16", NOTE, text=text)


def _costs(backend: Any, mlx: ModuleType, on_gpu: bool) -> Iterator[Check]:
    """Time a wait for the device, and a compiled function with new constants."""
    device, count = "gpu" if on_gpu else "cpu", 100
    x = backend.asarray(np.zeros(1, np.float32))
    backend.evaluate(x + 1)
    start = time.perf_counter()
    for i in range(count):
        backend.evaluate(x + i)
    wait = (time.perf_counter() - start) / count
    yield Check(
        "a wait", device, "", OK, seconds=wait, text=f"one value computed and waited for, {count}x"
    )
    if not on_gpu:
        text = "not measured: mlxdiff compiles nothing on a CPU"
        yield Check("a new compiled function", device, "", OK, text=text)
        return
    functions, x = 5, backend.asarray(np.ones(1024, np.float32))
    # Use constants that no earlier run used, or the cache of the system would answer.
    first = 1 + time.time() % 1e6 / 1e7
    start = time.perf_counter()
    for i in range(functions):
        backend.evaluate(mlx.compiled(first + i)(x))
    took = (time.perf_counter() - start) / functions
    yield Check(
        "a new compiled function", device, "", OK, seconds=took, text=f"of {functions}, once each"
    )
    backend.evaluate(mlx.compiled(first)(x))
    seconds = _timed(backend, lambda: mlx.compiled(first)(x)).seconds
    text = "the same constant again, a function made anew"
    yield Check("a compiled function seen before", device, "", OK, seconds=seconds, text=text)
    rate = probe.copy_rate(backend)
    text = f"{rate / 1e9:.3g} GB/s, read and written together"
    yield Check("copying", device, "float32", OK, text=text)


# ------------------------------------------------------------------------------- the built-in model


def _builtin(mlx: ModuleType, on_gpu: bool) -> Iterator[Check]:
    """Compare pictures of the built-in model with NumPy's; check the peak and growth of memory."""
    device = "gpu" if on_gpu else "cpu"
    # A step may take MLX's CPU device a second; a GPU has time for a whole picture.
    arguments: dict[str, Any] = {"seed": 0, "guidance": 4.0, "steps": 12 if on_gpu else 3}
    exact = _pixels(load(backend="numpy").generate(PROMPT, **arguments))
    for dtype in ("float32", "float16"):
        yield from _drawn(device, dtype, arguments, exact)
    yield _growth(mlx, device)


def _drawn(
    device: str, dtype: str, arguments: dict[str, Any], exact: np.ndarray
) -> Iterator[Check]:
    """Draw with the built-in model; compare the picture, and its memory with the estimate."""
    pipe = load(backend="mlx", dtype=dtype)
    gc.collect()  # an earlier picture must not count in this one's peak
    pipe.backend.reset_peak_memory()
    start = time.perf_counter()
    result = pipe.generate(PROMPT, **arguments)
    seconds = time.perf_counter() - start
    peak, expected = pipe.backend.peak_memory(), pipe.memory(result.settings).peak
    yield _picture(device, dtype, _pixels(result), exact, seconds)
    # docs/performance.md: measured peaks lie up to 5 % above the estimate. These arrays are small,
    # so that an allocator that rounds each up to whole pages needs more room.
    share = peak / expected
    text = f"peak {peak / 1e6:.1f} MB, estimate {expected / 1e6:.1f} MB"
    state = OK if share <= 1.25 else NOTE
    yield Check("memory over the estimate", device, dtype, state, share, 1.25, text=text)


def _picture(
    device: str, dtype: str, found: np.ndarray, exact: np.ndarray, seconds: float
) -> Check:
    """Compare a picture with NumPy's, in levels of 255.

    float32: the picture bound (docs/numerics.md), 99.8 % of the values within 1 level and a mean of
    at most 0.05. float16: a level is 2 / 255 of a picture's range; some hundred layers, each
    rounded to u, walk sqrt(100) u = 0.6 levels, the largest of 12,288 values five times that: 4
    levels, rounded up.
    """
    levels = np.abs(found.astype(int) - exact)
    largest, mean = float(levels.max()), float(levels.mean())
    if dtype == "float32":
        error, allowed = float((levels > 1).mean()), 0.002
        state = OK if error <= allowed and mean <= 0.05 else FAULT
        text = f"share of values off by more than a level; largest {largest:g}, mean {mean:.3f}"
    else:
        error, allowed = largest, 4.0
        state = OK if error <= allowed else FAULT
        text = f"in levels of 255; mean {mean:.3f}"
    name = "built-in model against NumPy"
    return Check(name, device, dtype, state, error, allowed, seconds, text)


def _growth(mlx: ModuleType, device: str) -> Check:
    """Draw many pictures; the bytes that arrays hold must not grow."""
    pipe = load(backend="mlx", dtype="float16")
    held, start = [], time.perf_counter()
    for seed in range(_PICTURES):
        pipe.generate(PROMPT, seed=seed, steps=1, guidance=1.0)
        gc.collect()  # Python frees cycles of objects late
        held.append(mlx.active_bytes())
    seconds = (time.perf_counter() - start) / _PICTURES
    grown = max(held[1:]) - held[1]
    state = OK if grown <= 0 else FAULT
    text = f"in bytes; arrays hold {held[1] / 1e6:.1f} MB after the second picture"
    name, dtype = f"growth over {_PICTURES} pictures", pipe.backend.dtype
    return Check(name, device, dtype, state, float(grown), 0.0, seconds, text)


def _pixels(result: Any) -> np.ndarray:
    return np.array(result.images[0])


# --------------------------------------------------------------------------------------- for people


def row(check: Check) -> str:
    """Return a check as a line of the table."""
    error = "" if check.error is None else f"{check.error:.2g}"
    allowed = "" if check.allowed is None else f"{check.allowed:.2g}"
    seconds = "" if check.seconds is None else f"{1e3 * check.seconds:.3g}"
    line = (
        f"{check.state:6}{check.check:40.40}{check.device:5}{check.dtype:9}"
        f"{error:>10}{allowed:>10}{seconds:>9}"
    )
    return f"{line}  {check.text}".rstrip()


HEADER = f"{'':6}{'':40}{'':5}{'':9}{'error':>10}{'allowed':>10}{'ms':>9}"
"""The line above the table."""
