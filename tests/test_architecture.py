"""Imports point one way (docs/architecture.md); this holds them to it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A part imports parts of the floors above its own in this list, nothing else.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "_version"),
    ("machine",),
    ("weights",),
    ("networks", "samplers", "noise", "brownian", "tokenizer"),
    ("pictures", "store"),
    ("convert",),
    ("adapters",),
    ("text", "library", "backends"),
    ("run",),
    ("pipeline",),
    ("loading",),
    ("batch",),
    ("report", "training"),
    ("serve",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
MOST_FLAT_MODULES = 14
# Only these parts may import these packages.
ONLY_IN = {
    "mlx": {"backends", "training"},  # a gradient and an optimizer's state are MLX's arrays
    "click": {"cli"},
    "huggingface_hub": {"store"},
    "PIL": {"pictures", "run", "pipeline"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "mcp": {"serve"},
}
NEVER = {"torch", "diffusers", "transformers", "scipy", "matplotlib"}


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to: errors, store, convert, ..."""
    relative = path.relative_to(ROOT)
    return "convert" if relative.parts[0] == "convert" else relative.with_suffix("").parts[1]


def imported(source: str, package: str) -> set[str]:
    """Absolute names of all modules that a source file imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def violations(part: str, source: str) -> list[str]:
    """What a source file of this part imports against the rules."""
    found = []
    for name in imported(source, f"mlxdiff.{part}"):
        top, *rest = name.split(".")
        if top in NEVER or part not in ONLY_IN.get(top, {part}):
            found.append(f"{part} imports {top}")
        if top == "mlxdiff" and rest and rest[0] in LEVEL and rest[0] != part:
            if LEVEL[rest[0]] >= LEVEL[part]:
                found.append(f"{part} imports mlxdiff.{rest[0]}")
    return sorted(set(found))


SOURCES = sorted(
    path
    for folder in ("mlxdiff", "convert")
    for path in (ROOT / folder).rglob("*.py")
    if part_of(path) not in ("__init__", "__main__")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in LEVEL, f"{part} stands on none of the floors"
    assert violations(part, path.read_text(encoding="utf-8")) == []


def test_few_modules_lie_flat() -> None:
    assert len(list((ROOT / "mlxdiff").glob("*.py"))) <= MOST_FLAT_MODULES


@pytest.mark.parametrize(
    ("part", "statement"),
    [
        ("samplers", "import mlx.core as mx"),
        ("convert", "from mlxdiff.backends import mlx"),
        ("networks", "import mlx.core as mx"),
        ("errors", "import mlxdiff.networks.config"),
        ("networks", "from ..backends import numpy_layers"),
        ("weights", "def f():\n    import torch"),
        ("tokenizer", "from mlxdiff import store"),
        ("pipeline", "from mlxdiff.cli import main"),
    ],
)
def test_a_planted_violation_is_found(part: str, statement: str) -> None:
    assert violations(part, statement)
