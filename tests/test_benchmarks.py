"""Every benchmark can be loaded; the one whose tables are in the docs runs, small."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.mlx
@pytest.mark.parametrize("benchmark", sorted(BENCHMARKS.glob("*.py")), ids=lambda p: p.stem)
def test_it_is_loaded(benchmark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert "main" in runpy.run_path(str(benchmark)) or benchmark.stem == "random_model"


def test_few_step(tmp_path: Path) -> None:
    small = "--part samplers --prompts 1 --reference 30 --counts 6 8 --guidance 1 --out .".split()
    run = [sys.executable, str(BENCHMARKS / "few_step.py"), *small]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "few_step.json").read_text(encoding="utf-8"))
    errors = {
        name: cells["8"]["error"]
        for name, cells in found["samplers"]["scales"]["1"]["methods"].items()
    }
    assert len(errors) == 6 and max(errors.values()) < 0.2
    assert 0.1 < found["part"] < 0.4
