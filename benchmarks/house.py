"""Measure the structure of a checkout: sizes, import floors, circles, the longest functions.

    python benchmarks/house.py                # this checkout
    python benchmarks/house.py ../old         # another one, such as a worktree of an older commit

The floor of a file is the number of files in the longest chain of imports below it, with the file
included. An import from a lower to a higher room closes a circle of rooms. A room is a folder, or a
file that lies flat in ``mlxdiff/``. Imports inside functions count too.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path

Graph = dict[str, set[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(root: Path) -> dict[str, Path]:
    """Return dotted name -> file, for the package and ``convert``."""
    found = {}
    for folder, package in (("mlxdiff", "mlxdiff"), ("convert", "mlxdiff.convert")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: Iterable[str]) -> set[str]:
    """Return the package's own modules that a file imports anywhere, except imports for types."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in known else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return (found & set(known)) - {name}


def room(name: str) -> str:
    """Return the flat file or the folder of a module."""
    return name.split(".")[1] if "." in name else "__init__"


def floors(graph: Graph) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the floor of each node, and the arrows that close a circle (not counted)."""
    level: dict[str, int] = {}
    upward: list[tuple[str, str]] = []
    way: list[str] = []

    def climb(node: str) -> int:
        if node not in level:
            way.append(node)
            below = [0]
            for other in sorted(graph[node]):
                if other in way:
                    upward.append((node, other))
                else:
                    below.append(climb(other))
            way.pop()
            level[node] = 1 + max(below)
        return level[node]

    for node in sorted(graph):
        climb(node)
    return level, upward


def code_lines(text: str) -> int:
    """Count the lines of code: no blank lines, comments or docstrings."""
    docs = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in skip and token.type != tokenize.ENDMARKER
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - docs)


def functions(paths: Mapping[str, Path]) -> list[tuple[str, Function]]:
    """Return every function with its module."""
    return [
        (name, node)
        for name, path in paths.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, Function)
    ]


def length(function: Function) -> int:
    """Count the lines of a function without its docstring."""
    body = function.body
    size = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        size -= (body[0].end_lineno or 0) - body[0].lineno + 1
    return size


def parameters(function: Function) -> int:
    """Count the named parameters without self."""
    spec = function.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def measure(root: Path) -> dict[str, str]:
    """Return the figures of this script, by name."""
    paths = modules(root)
    graph = {name: imports(name, path, paths) for name, path in paths.items()}
    rooms: Graph = {room(name): set() for name in paths}
    for name, others in graph.items():
        rooms[room(name)] |= {room(other) for other in others} - {room(name)}
    file_floors, file_circles = floors(graph)
    room_floors, upward = floors(rooms)
    flat = [p for p in paths.values() if p.parent == root / "mlxdiff"]
    every = functions(paths)
    long_name, long = max(every, key=lambda pair: length(pair[1]))
    wide_name, wide = max(every, key=lambda pair: parameters(pair[1]))
    return {
        "code lines": str(sum(code_lines(p.read_text(encoding="utf-8")) for p in paths.values())),
        "files": str(len(paths)),
        "files that lie flat": str(len(flat)),
        "rooms": str(len(rooms)),
        "floors of files": str(max(file_floors.values())),
        "floors of rooms": str(max(room_floors.values())),
        "arrows between rooms": str(sum(map(len, rooms.values()))),
        "circles of files": ", ".join(" -> ".join(pair) for pair in file_circles) or "0",
        "imports upward": ", ".join(" -> ".join(pair) for pair in upward) or "0",
        "longest function": f"{length(long)} lines, {long_name}.{long.name}",
        "longest signature": f"{parameters(wide)} parameters, {wide_name}.{wide.name}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parent.parent)
    for name, value in measure(parser.parse_args().checkout).items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
