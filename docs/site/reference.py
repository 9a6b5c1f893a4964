"""The reference pages, made from the docstrings and from the table of options."""

from __future__ import annotations

import inspect
import re
from typing import Any

_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
_ENTRY = re.compile(r"^([\w*., ]+?): (.*)$")

PYTHON = (
    ("Opening a model", ("load",)),
    ("Drawing", ("Pipeline", "Run", "Step", "Picture", "Result")),
    ("Watching and stopping", ("Progress", "Cancel")),
    ("Judging and enlarging", ("load_judge", "load_upscaler")),
    (
        "Errors",
        ("MlxdiffError", "UsageError", "ConfigError", "CheckpointError", "HubError", "Cancelled"),
    ),
)


def options_page() -> str:
    """Return the reference of all options, from the tables of `mlxdiff.run.options`."""
    from mlxdiff.cli.options import TABLES
    from mlxdiff.run.options import SECTIONS
    from mlxdiff.run.table import entries

    lines = [
        "# Options",
        "",
        "Every option of `mlxdiff generate`, and its name in Python. The page is made from the"
        " table of options in the code. `mlxdiff generate --help` prints the same;"
        " `mlxdiff capabilities -m MODEL` says which of them a model honours. The names of other"
        " programs are not accepted, but an error gives ours.",
    ]
    options = [one for table in TABLES for one in entries(table).values()]
    for section in SECTIONS:
        if not (found := [one for one in options if one.section == section]):
            continue
        lines += ["", f"## {section}", "", "| option | in Python | what it does | elsewhere |"]
        lines += ["|---|---|---|---|"]
        for one in found:
            flags = ", ".join(f"`{flag}`{{ .whole }}" for flag in one.flags) or "-"
            elsewhere = ", ".join(f"`{name}`" for name in one.elsewhere)
            name, what = f"`{one.name}`{{ .whole }}", _cell(one.help or one.doc)
            lines.append(f"| {flags} | {name} | {what} | {elsewhere} |")
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """Return the reference of what `mlxdiff` exports."""
    import mlxdiff
    import mlxdiff.convert

    lines = [
        "# Python",
        "",
        "What `import mlxdiff` gives. Everything is typed; [in a program](embedding.md) tells how"
        " the parts belong together.",
    ]
    for title, names in PYTHON:
        lines += ["", f"## {title}"]
        for name in names:
            lines += _described(f"mlxdiff.{name}", getattr(mlxdiff, name))
    lines += ["", "## Converting"]
    lines += _described("mlxdiff.convert.convert", mlxdiff.convert.convert)
    return "\n".join(lines) + "\n"


def _described(name: str, thing: Any) -> list[str]:
    """Return the lines of one function or class, with its public methods."""
    lines = ["", f"### {name}", ""]
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    if not inspect.isclass(thing):
        lines += [f"```python\n{name.rpartition('.')[2]}{_signature(thing)}\n```", ""]
    lines += _markdown(inspect.getdoc(thing) or "")
    if inspect.isclass(thing) and not is_error:
        for key, member in vars(thing).items():
            if key.startswith("_") or not inspect.getdoc(member):
                continue
            if isinstance(member, property):
                lines += ["", f"**`.{key}`**: {_cell(inspect.getdoc(member) or '')}"]
            elif inspect.isfunction(member):
                lines += ["", f"#### {name.rpartition('.')[2]}.{key}", ""]
                lines += [f"```python\n{key}{_signature(member)}\n```", ""]
                lines += _markdown(inspect.getdoc(member) or "")
    return lines


def _signature(function: Any) -> str:
    """Return a signature, an argument a line where it is long."""
    signature = inspect.signature(function)
    kept = [one for name, one in signature.parameters.items() if name != "self"]
    signature = signature.replace(parameters=kept)
    text = str(signature).replace("'", "")
    if len(text) < 88:
        return text
    parts, star = [], False
    for one in kept:
        if one.kind is one.KEYWORD_ONLY and not star:
            star = True
            parts.append("*")
        parts.append(str(one).replace("'", ""))
    back = signature.return_annotation
    arrow = "" if back is signature.empty else f" -> {getattr(back, '__name__', back)}"
    return "(\n    " + ",\n    ".join(parts) + f",\n){arrow}"


def _markdown(text: str) -> list[str]:
    """Return a docstring in Google's style as lines of Markdown."""
    lines: list[str] = []
    section, entries = "", list[list[str]]()

    def close() -> None:
        nonlocal section
        if entries:
            lines.extend(["", f"| {section.lower()} | |", "|---|---|"])
            lines.extend(f"| `{name}` | {_cell(what)} |" for name, what in entries)
            lines.append("")
            entries.clear()
        section = ""

    for line in text.splitlines():
        head, colon, rest = line.partition(":")
        if head in _SECTIONS and colon:
            close()
            if rest.strip() or head in ("Returns", "Yields"):
                lines += ["", f"**{head}:** {_cell(rest)}"]
            else:
                section = head
        elif section and line.startswith("    "):
            found = _ENTRY.match(line[4:])
            if found and not line[4:].startswith(" "):
                entries.append([found[1], found[2]])
            elif entries:
                entries[-1][1] += " " + line.strip()
            else:
                lines.append(line.strip())
        else:
            if section and line.strip():
                close()
            lines.append(line if line.startswith("    ") else _code(line))
    close()
    return lines


def _code(text: str) -> str:
    return text.replace("``", "`")


def _cell(text: str) -> str:
    """Return text for a cell of a table."""
    text = _code(" ".join(text.split()))
    text = re.sub(r"<(?![^`]*`(?:[^`]*`[^`]*`)*[^`]*$)", "&lt;", text).replace("|", "\\|")
    return re.sub(r"\bdocs/([a-z_-]+)\.md\b", r"[\1](\1.md)", text)
