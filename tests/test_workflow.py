"""The workflow file says what it should: jobs, limits, labels, and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
JOBS: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["jobs"]
RUNNERS = {"ubuntu-latest", "macos-15", "macos-26"}
"""Labels whose machines exist; GitHub ended macos-14 in November 2026."""


def labels(job: dict[str, Any]) -> set[str]:
    """The machines that a job runs on."""
    if job["runs-on"] == "${{ matrix.os }}":
        return set(job["strategy"]["matrix"]["os"])
    return {job["runs-on"]}


def commands(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_ends_and_its_machine_exists(name: str) -> None:
    job = JOBS[name]
    assert 0 < job["timeout-minutes"] <= 90
    assert labels(job) <= RUNNERS
    assert job["steps"][0]["uses"].startswith("actions/checkout@")


def test_what_gates() -> None:
    informs = {
        name: job["continue-on-error"] for name, job in JOBS.items() if "continue-on-error" in job
    }
    assert informs == {"metal": "${{ vars.METAL_GATES != 'true' }}", "metal-suite": True}
    assert "METAL_GATES to true" in TEXT  # says how to switch it
    for name in ("macos", "metal", "metal-suite"):
        assert labels(JOBS[name]) == {"macos-15", "macos-26"}


def test_what_the_metal_job_runs() -> None:
    run = commands(JOBS["metal"])
    for command in ("doctor --self-test\n", "doctor --self-test --exact\n", "tests/test_metal.py"):
        assert command in run
    from mlxdiff.report.self_test import modes

    asked = re.search(r"for mode in ([\w ]+);", run)
    assert asked is not None
    assert set(asked[1].split()) == {
        str(how.bits) if how.mode == "affine" else how.mode for how in modes()
    }


@pytest.mark.parametrize("name", JOBS)
def test_commands_exist(name: str) -> None:
    run = commands(JOBS[name])
    targets = set(re.findall(r"^([\w.$()/-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
    for line in re.findall(r"^\s*make (.+)$", run, re.M):
        for target in line.split():
            assert target in targets or target == ".venv/.installed", target
    for file in re.findall(r"(tests/\S+\.py|\.ci/\S+)", run):
        assert (ROOT / file).is_file(), file
