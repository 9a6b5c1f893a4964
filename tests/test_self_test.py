"""`mlxdiff doctor --self-test`: its judges, its allowances, and the leg on MLX's CPU device."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlxdiff import loading
from mlxdiff.cli import main
from mlxdiff.errors import UsageError
from mlxdiff.report import judges, self_test
from mlxdiff.report.self_test import FAULT, NOTE, OK, ROUNDOFF, Leg, Operation

OPERATIONS = {operation.name: operation for operation in self_test.operations(large=False)}
DTYPES = ("float32", "float16")


def leg(device: str, dtype: str = "float32") -> Leg:
    return Leg(device, dtype, nullcontext)


def judged(operation: Operation) -> np.ndarray:
    return operation.judge(*operation.inputs)


# ------------------------------------------------------------------------------------------ judges


def test_convolution_is_its_definition() -> None:
    random = np.random.RandomState(0)
    x, weight, bias = random.rand(2, 7, 6, 3), random.rand(4, 3, 3, 3), random.rand(4)
    for stride, padding in ((1, 1), (2, 1), (1, 0)):
        found = judges.convolution(x, weight, bias, stride, padding)
        padded = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
        for b, i, j, o in np.ndindex(*found.shape):
            patch = padded[b, stride * i : stride * i + 3, stride * j : stride * j + 3]
            assert abs(found[b, i, j, o] - (patch * weight[o]).sum() - bias[o]) < 1e-12


def test_attention_is_its_definition() -> None:
    random = np.random.RandomState(0)
    q, k, v = random.rand(1, 3, 8), random.rand(1, 5, 8), random.rand(1, 5, 8)
    mask = random.rand(3, 5) > 0.3
    mask[:, 0] = True
    found = judges.attention(q, k, v, 2, mask)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        for row in range(3):
            keys = [i for i in range(5) if mask[row, i]]
            scores = [math.exp(q[0, row, part] @ k[0, i, part] / 2) for i in keys]
            right = sum(s * v[0, i, part] for s, i in zip(scores, keys, strict=True)) / sum(scores)
            assert np.abs(found[0, row, part] - right).max() < 1e-12


def test_norms_leave_mean_0_and_variance_1() -> None:
    x = np.random.RandomState(0).rand(2, 4, 4, 8) * 3 + 5
    one, zero = np.ones(8), np.zeros(8)
    groups = judges.group_norm(x, one, zero, 2, eps=0).reshape(2, 16, 2, 4)
    assert np.abs(groups.mean(axis=(1, 3))).max() < 1e-12
    assert np.abs(groups.var(axis=(1, 3)) - 1).max() < 1e-12
    rows = judges.layer_norm(x, one, zero, eps=0)
    assert np.abs(rows.mean(-1)).max() < 1e-12 and np.abs(rows.var(-1) - 1).max() < 1e-12


def test_winograd_is_a_correlation() -> None:
    random = np.random.RandomState(0)
    x, kernel = random.rand(8), random.rand(3)
    right = np.correlate(x, kernel, "valid")
    assert np.abs(judges.winograd(x, kernel) - right).max() < 1e-13


def test_winograd_loses_what_is_derived() -> None:
    """F(6x6, 3x3) in NumPy, transforms stored in float16: the derivation is of its worst output."""
    random = np.random.RandomState(0)
    tiles, channels = 400, 64
    x = random.standard_normal((tiles, channels, 8, 8)).astype(np.float16).astype(np.float64)
    kernel = random.standard_normal((channels, 3, 3)).astype(np.float16).astype(np.float64)

    def half(a: np.ndarray) -> np.ndarray:
        return a.astype(np.float16).astype(np.float64)

    def transformed(store: Any) -> np.ndarray:
        inputs = store(np.einsum("ia,tcab,jb->tcij", judges._INPUT, x, judges._INPUT))
        kernels = store(np.einsum("ia,cab,jb->cij", judges._KERNEL, kernel, judges._KERNEL))
        products = store(np.einsum("tcij,cij->tij", inputs, kernels))
        return np.einsum("pi,tij,qj->tpq", judges._OUTPUT, products, judges._OUTPUT)

    exact, stored = transformed(lambda a: a), transformed(half)
    loss = np.sqrt(np.square(stored - exact).mean(axis=0)) / np.sqrt(np.square(exact).mean())
    derived = judges.winograd_growth(transforms_rounded=False) * ROUNDOFF["float16"]
    assert 0.3 * derived < loss.max() <= derived
    # What docs/metal.md says of 320 channels, over all outputs.
    assert 0.004 < np.sqrt(np.square(loss).mean()) < 0.011


# -------------------------------------------------------------------------------------- allowances


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_percent_is_a_fault_everywhere(name: str, dtype: str) -> None:
    operation = OPERATIONS[name]
    values = judged(operation)
    assert self_test._verdict(operation, leg("cpu", dtype), 0.01, values)[0] == FAULT
    assert self_test._verdict(operation, leg("cpu", dtype), 0.0, values)[0] == OK


def test_sums_may_lose_more_the_longer_they_are() -> None:
    short, long = OPERATIONS["conv 3x3, 4 channels in (latents)"], OPERATIONS["conv 3x3, stride 2"]
    assert short.allowed("float32", judged(short)) < long.allowed("float32", judged(long)) < 1e-5


def test_what_may_be_computed_by_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MLX chooses: 3x3, stride 1, counts that 32 divides, 256 together, 4096 pixels."""
    large = {op.name: op for op in self_test.operations(large=True)}
    assert [name for name, op in large.items() if op.winograd] == ["conv 3x3, large map"]
    assert not any(op.winograd for op in OPERATIONS.values())
    operation = large["conv 3x3, large map"]
    values = np.random.RandomState(0).standard_normal(operation.inputs[0].shape)
    gpu = leg("gpu", "float16")
    monkeypatch.delenv("MLX_CONV_WINOGRAD", raising=False)
    state, allowed, text = self_test._verdict(operation, gpu, 0.008, values)
    assert state == OK and "Winograd" in text and 0.008 < allowed < 0.04
    assert self_test._verdict(operation, leg("cpu", "float16"), 0.008, values)[0] == FAULT
    monkeypatch.setenv("MLX_CONV_WINOGRAD", "0")
    state, _, text = self_test._verdict(operation, gpu, 0.008, values)
    assert state == FAULT and "--exact is not exact" in text


def test_tf32_is_a_note_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = OPERATIONS["linear"]
    values = judged(operation)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    assert self_test._verdict(operation, leg("gpu"), 4e-4, values)[0] == NOTE
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert self_test._verdict(operation, leg("gpu"), 4e-4, values)[0] == FAULT


def test_nan_and_infinity_are_infinitely_wrong() -> None:
    one = np.ones(3)
    assert self_test._difference(np.array([1, np.nan, 1]), one) == math.inf
    assert self_test._difference(np.array([1, np.inf, 1]), one) == math.inf


@pytest.mark.parametrize(
    ("dtype", "off", "state"), [("float32", 1, OK), ("float32", 2, FAULT), ("float16", 4, OK)]
)
def test_pictures_are_judged_in_levels(dtype: str, off: int, state: str) -> None:
    exact = np.full((64, 64, 3), 100, np.uint8)
    found = exact.copy()
    found[:2] += np.uint8(off)
    assert self_test._picture("gpu", dtype, found, exact, 1.0).state == state


# ----------------------------------------------------------------------------- on MLX's CPU device


@pytest.fixture
def mlx() -> Any:
    """The probes of MLX."""
    pytest.importorskip("mlx.core")
    from mlxdiff.backends import mlx_probe

    return mlx_probe


@pytest.fixture
def layers() -> Any:
    """The layers of MLX."""
    pytest.importorskip("mlx.core")
    from mlxdiff.backends import mlx_layers

    return mlx_layers


@pytest.mark.mlx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_right(name: str, dtype: str, mlx: Any, layers: Any) -> None:
    check = self_test._judged(
        loading.make_backend("mlx"), layers, OPERATIONS[name], Leg("cpu", dtype, mlx.on_cpu)
    )
    assert check.state == OK, check
    assert check.seconds is not None and check.seconds > 0


@pytest.mark.mlx
def test_every_layer_is_tested(layers: Any) -> None:
    """A layer that the networks get must be among the operations."""
    own = {
        name
        for name, value in vars(layers).items()
        if getattr(value, "__module__", "") == layers.__name__ and not name.startswith("_")
    }
    base = {"Module", "activation"}  # a base class; a table of the others
    # What makes, moves or picks values, and computes none.
    moves = set(
        "parameter asarray cast arange where clip concatenate split pad pad_heads "
        "broadcast_to".split()
    )
    text = Path(self_test.__file__).read_text(encoding="utf-8")
    left = [
        name for name in sorted(own - base - moves - {"evaluate"}) if f"layers.{name}(" not in text
    ]
    assert left == ["relu", "tanh"]  # by name, in one loop


@pytest.mark.mlx
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_modes_are_right(dtype: str, mlx: Any, layers: Any) -> None:
    legs = [Leg("cpu", dtype, mlx.on_cpu)]
    checks = list(self_test._quantized(loading.make_backend("mlx"), layers, legs, large=False))
    assert len(checks) == 9 and all(check.state == OK for check in checks), checks


@pytest.mark.mlx
def test_a_wrong_or_missing_kernel_is_found(mlx: Any, layers: Any) -> None:
    backend = loading.make_backend("mlx")
    right = OPERATIONS["linear"]

    def raises(layers: Any, arrays: Any) -> Any:
        raise RuntimeError("no kernel")

    planted = {
        "does not run: RuntimeError: no kernel": raises,
        "more than rounding": lambda layers, arrays: 1.001 * right.run(layers, arrays),
        "has the shape": lambda layers, arrays: right.run(layers, arrays)[:, :1],
    }
    for words, run in planted.items():
        operation = Operation("linear", right.inputs, run, right.judge, right.terms)
        check = self_test._judged(backend, layers, operation, Leg("cpu", "float32", mlx.on_cpu))
        assert check.state == FAULT and words in check.text


@pytest.mark.mlx
def test_the_switch_without_a_gpu_and_with_one_that_ignores_it(mlx: Any) -> None:
    """MLX's CPU device computes the same bits either way (``test_exact`` has a double)."""
    assert self_test._switch(mlx, False).state == OK
    check = self_test._switch(mlx, True)
    assert check.state == NOTE and "changes nothing" in check.text


# ------------------------------------------------------------------------------------ command line


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", "--self-test", *arguments])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few operations, one mode, two pictures."""
    few = [OPERATIONS[name] for name in ("conv 1x1", "group norm", "linear")]
    monkeypatch.setattr(self_test, "operations", lambda large: few)
    monkeypatch.setattr(self_test, "modes", lambda: [self_test.Quantization(4)])
    monkeypatch.setattr(self_test, "_PICTURES", 3)


@pytest.mark.mlx
@pytest.mark.usefixtures("short", "mlx")
def test_a_line_to_post() -> None:
    done = run("--json")
    assert done.exit_code == 0 and done.stdout.count("\n") == 1, done.output
    record = json.loads(done.stdout)
    assert record["schema"] == self_test.SCHEMA and record["state"] == OK
    assert {"date", "machine", "versions", "device", "seconds", "checks"} <= set(record)
    fields = {"check", "device", "dtype", "state", "error", "allowed", "seconds", "text"}
    assert all(set(check) == fields for check in record["checks"])
    assert str(Path.home()) not in done.stdout
    names = {check["check"] for check in record["checks"]}
    assert {"built-in model against NumPy", "memory over the estimate"} <= names
    assert "growth over 3 pictures" in names


@pytest.mark.mlx
@pytest.mark.usefixtures("short", "mlx")
def test_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_builtin", lambda *a: iter(()))
    done = run()
    assert done.exit_code == 0, done.output
    for words in ("allowed", "group norm", "quantized linear, affine-4-64", "a wait", ": ok, "):
        assert words in done.output


@pytest.mark.mlx
@pytest.mark.usefixtures("short", "mlx")
def test_a_fault_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_builtin", lambda *a: iter(()))
    monkeypatch.setattr(self_test, "_difference", lambda *a: math.inf)
    done = run("--quiet")
    assert done.exit_code == 1 and "fault" in done.output and " ok " not in done.output
    as_json = run("--json")
    record = json.loads(as_json.stdout, parse_constant=pytest.fail)  # no Infinity, no NaN
    assert as_json.exit_code == 1 and record["state"] == FAULT


def test_without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str = "auto", dtype: str | None = None) -> Any:
        raise UsageError("MLX cannot be imported (no libcuda)")

    monkeypatch.setattr(self_test, "make_backend", make)
    done = run()
    assert (
        done.exit_code == 2 and "the self-test is a test of MLX, and there is none" in done.output
    )


@pytest.mark.mlx
def test_exact_must_come_before_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_CONV_WINOGRAD", raising=False)
    pytest.importorskip("mlx.core")
    assert "before MLX is imported" in run("--exact").output
