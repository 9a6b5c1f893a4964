"""``mlxdiff doctor``: each thing that can be wrong, found and explained."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlxdiff import loading
from mlxdiff.cli import main
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.machine import probe
from mlxdiff.report import doctor
from mlxdiff.store import hub


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the probes say, by backend; no time is spent on them."""
    said = {"numpy": 100e9, "mlx": 90e9}
    monkeypatch.setattr(probe, "matmul_rate", lambda backend, *a: said[backend.name])
    for name in probe.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(probe, "load_average", lambda: 0.1)
    return said


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def found(*arguments: str) -> dict[str, dict[str, str]]:
    """Findings by topic."""
    result = run("--json", *arguments)
    assert result.exit_code == 0, result.output
    return {finding["topic"]: finding for finding in json.loads(result.stdout)}


def test_all_is_said_and_the_network_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    result = run()
    assert result.exit_code == 0, result.output
    for words in ("complete: builtin, emoji", "NumPy multiplies", "of memory", "has room for"):
        assert words in " ".join(result.stdout.split())


def test_findings_are_stable_for_programs() -> None:
    findings = json.loads(run("--json").stdout)
    assert all(set(f) == {"topic", "state", "text", "remedy"} for f in findings)
    assert all(f["state"] in ("ok", "advice", "fault") for f in findings)
    assert all(f["remedy"] for f in findings if f["state"] != "ok")
    assert {"versions", "installation", "numpy", "mlx", "memory", "library", "hub"} <= {
        f["topic"] for f in findings
    }


@pytest.mark.mlx
def test_a_slow_blas_in_mlx(rates: dict[str, float]) -> None:
    if loading.make_backend("mlx").has_gpu():
        pytest.skip("MLX computes on a GPU here")
    assert found()["mlx-blas"]["state"] == "ok"
    rates["mlx"] = 5e9
    finding = found()["mlx-blas"]
    assert finding["state"] == "advice"
    assert "5 GFLOP/s, NumPy at 100 GFLOP/s" in finding["text"]
    assert "LD_PRELOAD=" in finding["remedy"]


def test_a_numpy_without_blas(rates: dict[str, float]) -> None:
    rates["numpy"] = rates["mlx"] = 1e9
    assert found()["numpy"]["state"] == "advice"


def test_no_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str = "auto", dtype: str | None = None) -> Any:
        if name == "mlx":
            raise UsageError("MLX cannot be imported (no libcuda)")
        return real(name, dtype)

    real = loading.make_backend
    monkeypatch.setattr(loading, "make_backend", make)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(probe, "system", lambda: "macOS 15")
    monkeypatch.setattr(probe, "processor", lambda: "Apple M1")
    monkeypatch.setattr(probe, "is_translated", lambda: True)
    findings = found()
    assert "The GPU is not used: MLX cannot be imported" in findings["mlx"]["text"]
    assert "arm64" in findings["python"]["remedy"]


@pytest.mark.parametrize(
    ("value", "words"), [("1", "fewer threads"), ("64", "more threads"), ("4", "all used")]
)
def test_threads(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "usable_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert words in found()["threads"]["text"]


def test_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "load" not in found()
    monkeypatch.setattr(probe, "load_average", lambda: 1000.0)
    assert found()["load"]["state"] == "advice"


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MLXDIFF_HOME", str(tmp_path / "a file" / "below"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    findings = found()
    assert findings["library"]["state"] == findings["temporary-folder"]["state"] == "advice"
    assert "MLXDIFF_HOME" in findings["library"]["remedy"]
    monkeypatch.setattr(doctor, "free_space", lambda folder: 10**9)
    assert "has room for 1 GB" in found()["hub-cache"]["text"]


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "already" in found("--online")["hub"]["text"]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "--online" in found()["hub"]["text"]
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        finding = found("--online")["hub"]
    assert finding["state"] == "advice" and "does not answer" in finding["text"]
    monkeypatch.setattr(hub, "reach", lambda: None)
    assert "The hub answers" in found("--online")["hub"]["text"]


def test_a_broken_installation_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise CheckpointError("builtin/unet: truncated")

    monkeypatch.setattr(loading, "load", load)
    result = run()
    assert result.exit_code == 2
    assert "fault" in result.stdout and "install mlxdiff again" in " ".join(result.stdout.split())
    quiet = run("--quiet")
    assert "ok" not in quiet.stdout.split() and "fault" in quiet.stdout


def test_a_check_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError("no such counter")

    monkeypatch.setattr(probe, "memory_bytes", broken)
    findings = found()
    assert "no such counter" in findings["memory"]["text"]
    assert "hub" in findings
