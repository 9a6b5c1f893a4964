"""mlxdiff/reference and mlxdiff/models mirror each other, down to the arguments."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mlxdiff"
FILES = sorted(path.name for path in (PACKAGE / "reference").glob("*.py"))


def arguments(function: ast.FunctionDef) -> list[str]:
    spec = function.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    return names + [a.arg for a in (spec.vararg, spec.kwarg) if a is not None]


def outline(source: str) -> list[str]:
    """Public functions and classes in order, each with the arguments of its public methods."""
    lines = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            lines.append(f"def {node.name}({', '.join(arguments(node))})")
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            lines.append(f"class {node.name}")
            methods = [
                f"{node.name}.{m.name}({', '.join(arguments(m))})"
                for m in node.body
                if isinstance(m, ast.FunctionDef)
                and (not m.name.startswith("_") or m.name in ("__init__", "__call__"))
            ]
            # The base class differs: MLX brings its own Module.
            lines += [] if node.name == "Module" else methods
    return lines


def test_the_same_files() -> None:
    assert FILES == sorted(path.name for path in (PACKAGE / "models").glob("*.py"))


@pytest.mark.parametrize("name", FILES)
def test_the_same_classes_and_signatures(name: str) -> None:
    reference = outline((PACKAGE / "reference" / name).read_text(encoding="utf-8"))
    models = outline((PACKAGE / "models" / name).read_text(encoding="utf-8"))
    assert models == reference
