"""``mlxdiff bench`` and what it measures with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from golden_data import checkpoint

from mlxdiff.cli import main
from mlxdiff.convert import open_source
from mlxdiff.loading import load, make_backend
from mlxdiff.machine import probe
from mlxdiff.report.bench import SCHEMA, bench, expected_memory


@pytest.fixture(autouse=True)
def quick_probes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow BLAS would take seconds; the probes have a test of their own."""
    if "probe" not in request.node.name:
        monkeypatch.setattr(probe, "matmul_rate", lambda *a, **k: 2e9)
        monkeypatch.setattr(probe, "copy_rate", lambda *a, **k: 1e9)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


QUICK = ("-W", "32", "-H", "32", "--steps", "2", "--count", "2")


def shape_of(value: Any) -> Any:
    """A record with types in place of values."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    return "number" if isinstance(value, (int, float)) else type(value).__name__


SPREAD = {"min": "number", "median": "number"}
RECORD = {
    "schema": "str",
    "date": "str",
    "model": {
        "name": "str",
        "family": "str",
        "parameters": {"text_encoder": "number", "unet": "number", "vae": "number"},
    },
    "run": {
        "width": "number",
        "height": "number",
        "steps": "number",
        "evaluations": "number",
        "batch": "number",
        "guidance": "number",
        "sampler": "str",
        "schedule": "str",
        "backend": "str",
        "device": "str",
        "dtype": "str",
        "quantization": "NoneType",
        "low_memory": "number",
        "vae_tiling": "number",
        "pictures": "number",
    },
    "machine": {
        "processor": "str",
        "cores": "number",
        "memory_bytes": "number",
        "system": "str",
        "architecture": "str",
        "load": "number",
    },
    "ceiling": {"copy_gb_per_s": "number"},
    "work": {
        "batch": "number",
        "multiply_adds": {"text_encoder": "number", "step": "number", "vae": "number"},
        "weight_bytes_per_step": "number",
    },
    "seconds": {
        "open": "number",
        "cold": dict.fromkeys(
            ("load", "text_encoder", "first_step", "step", "unet", "vae", "total"), "number"
        ),
        "warm": dict.fromkeys(("text_encoder", "step", "unet", "vae", "total"), SPREAD),
    },
    "memory": {
        "peak_bytes": "number",
        "counted": "str",
        "estimate": {
            "peak_bytes": "number",
            "stages": dict.fromkeys(("text_encoder", "unet", "vae"), "number"),
            "weights": dict.fromkeys(("text_encoder", "unet", "vae"), "number"),
        },
    },
    "share": {"matmul": "number", "weights": "number"},
}


def test_the_record_has_the_keys_of_its_schema(backend: str) -> None:
    """People post these lines: a key that goes, or changes its meaning, needs a new schema."""
    result = run("-m", str(checkpoint("sd15")), "--backend", backend, "--json", "--quiet", *QUICK)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    record = json.loads(line)
    assert record["schema"] == SCHEMA == "mlxdiff-bench/1"
    assert {"python", "mlxdiff", "numpy", "mlx"} <= set(record.pop("versions"))
    rates = record["ceiling"].pop("matmul_gflops")
    assert record["run"]["dtype"] in rates
    if record["machine"]["memory_bytes"] is None:  # a system that does not tell
        record["machine"]["memory_bytes"] = 0
    assert shape_of(record) == RECORD
    assert record["run"]["evaluations"] == 2
    # Two floating-point operations a multiply-add, at 2 GFLOP/s.
    step = record["seconds"]["warm"]["step"]["min"]
    macs = record["work"]["multiply_adds"]["step"]
    assert record["share"]["matmul"] == pytest.approx(macs / 1e9 / step, rel=0.02, abs=1e-4)


def test_a_record_tells_nothing_of_its_owner(tmp_path: Path) -> None:
    import getpass
    import platform
    import shutil

    shutil.copytree(checkpoint("sd15"), folder := tmp_path / "my secret model")
    result = run("-m", str(folder), "--backend", "numpy", "--json", "--quiet", *QUICK)
    record = json.loads(result.stdout)
    assert record["model"]["name"] == "local"
    for word in ("secret", str(tmp_path), str(Path.home()), platform.node()):
        assert not word or word not in result.stdout
    assert f'"{getpass.getuser()}"' not in result.stdout


def test_a_table_for_people() -> None:
    result = run("--backend", "numpy", "--steps", "1", "--count", "1", "-g", "1")
    assert result.exit_code == 0, result.output
    for words in ("builtin (sd1), 64x64", "text encoder", "a step", "GFLOP/s", "at batch 1"):
        assert words in result.stdout
    assert "step 1 of 1" in result.stderr


def test_quantized_weights_are_named(backend: str) -> None:
    result = run("--backend", backend, "-q", "8", "--json", "--quiet", *QUICK)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert "8" in record["run"]["quantization"]
    assert "builtin" in record["model"]["name"]


@pytest.mark.parametrize(
    "name", ["ddpm-labels", "sdxl", "lcm", "sd15-inpainting", "sdxl-pix2pix", "sd-turbo"]
)
def test_every_kind_of_model(name: str) -> None:
    size = {} if name.startswith("ddpm") else {"width": 32, "height": 32}
    record = bench(
        lambda: load(checkpoint(name), backend="numpy"), pictures=1, steps=2, on_step=None, **size
    )
    pixels = name.startswith("ddpm")
    assert ("text_encoder" in record["work"]["multiply_adds"]) is not pixels
    batches = {"sdxl-pix2pix": 3, "lcm": 1, "sd-turbo": 1, "ddpm-labels": 1}
    assert record["work"]["batch"] == batches.get(name, 2)
    assert ("image" in record["seconds"]["cold"]) is (name in ("sd15-inpainting", "sdxl-pix2pix"))


@pytest.mark.parametrize("name", ["ddpm-labels", "sdxl", "sd15-inpainting", "sdxl-pix2pix"])
def test_info_tells_the_memory_to_expect(name: str) -> None:
    expected = expected_memory(open_source(checkpoint(name)))
    assert expected is not None
    assert 0 < expected["peak_bytes_low_memory"] <= expected["peak_bytes"]


def test_what_cannot_be_timed_is_said() -> None:
    result = run("--count", "0", "--backend", "numpy")
    assert result.exit_code == 2
    assert "count is 0" in result.stderr
    assert run("-m", "no/such/folder").exit_code == 2


def test_the_probes_measure(backend: str) -> None:
    chosen = make_backend(backend)
    assert probe.matmul_rate(chosen, "float32", seconds=0.01) > 1e6
    assert probe.copy_rate(chosen, seconds=0.01) > 1e6


def test_facts() -> None:
    facts = probe.facts()
    assert facts["cores"] >= 1 and facts["processor"]
    json.dumps(facts)
    assert probe.versions()["mlxdiff"]
