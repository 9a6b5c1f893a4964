"""The tools of development: one version of each everywhere, tiers that exist, a list of targets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import QUICK

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned() -> dict[str, str]:
    """Name -> version of the `dev` extra; fail for a tool without an exact version."""
    block = re.search(r"^dev = \[(.*?)^\]", _text("pyproject.toml"), re.MULTILINE | re.DOTALL)
    assert block is not None
    tools = re.findall(r'"([^"]+)"', block[1])
    found = {}
    for tool in tools:
        name, version = tool.split("==")
        found[name] = version
    return found


def test_every_tool_has_one_exact_version() -> None:
    assert {"ruff", "mypy", "pytest", "pytest-xdist", "hypothesis"} <= set(pinned())


def test_pre_commit_has_the_same_ruff() -> None:
    revisions = re.findall(
        r"ruff-pre-commit\s+rev: v([\d.]+)$", _text(".pre-commit-config.yaml"), re.MULTILINE
    )
    assert revisions == [pinned()["ruff"]]


@pytest.mark.parametrize("name", [".github/workflows/tests.yml", ".ci/run"])
def test_ci_installs_tools_through_make_only(name: str) -> None:
    """So that it has the versions of the `dev` extra."""
    assert not re.search(r"\b(pip|pipx|uvx?)\s+(install|run)\b|\buvx\b", _text(name))


def test_the_quick_tier_names_files_that_exist() -> None:
    files = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    assert files >= QUICK


def test_help_lists_every_target() -> None:
    makefile = _text("Makefile")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^make (\w+) +\S", said.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split())
