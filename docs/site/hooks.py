"""What the site needs beyond the pages: links out of docs/, and the reference of the options.

A page links to files of the repository (`../examples/...`), so that it also reads well there. On the
site a picture is copied, and any other file is a link to the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)[^)\s#]+)(#[^)\s]*)?\)")
_FOLDER = "repository"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pictures that pages show from outside docs/, and the page of options."""
    for page in list(files.documentation_pages()):
        for picture, _, target, _ in _LINK.findall(page.content_string):
            if picture and files.get_file_from_path(place := f"{_FOLDER}/{_inside(target)}") is None:
                source = str(ROOT / _inside(target))
                files.append(File.generated(config, place, abs_src_path=source))
    files.append(File.generated(config, "reference-options.md", content=options_page()))
    return files


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Replace the links that leave docs/."""

    def replaced(found: re.Match[str]) -> str:
        picture, text, target, anchor = found.groups()
        inside = _inside(target)
        if picture:
            return f"![{text}]({_FOLDER}/{inside})"
        if not (ROOT / inside).exists():
            raise FileNotFoundError(f"{text}: links to {target}, which does not exist")
        kind = "tree" if (ROOT / inside).is_dir() else "blob"
        return f"[{text}]({config.repo_url}/{kind}/main/{inside}{anchor or ''})"

    return _LINK.sub(replaced, markdown)


def _inside(target: str) -> str:
    return posixpath.normpath(posixpath.join("docs", target))


def options_page() -> str:
    """Return the reference of all options, from the tables of `mlxdiff.run.options`."""
    from mlxdiff.cli.options import TABLES
    from mlxdiff.run.options import SECTIONS
    from mlxdiff.run.table import entries

    lines = [
        "# Options",
        "",
        "Every option of `mlxdiff generate`, with its name in Python. This page is made from the table of "
        "options (`mlxdiff/run/options.py`). `mlxdiff generate --help` prints the same. "
        "`mlxdiff capabilities -m MODEL` says which of them a model honours.",
    ]
    options = [one for table in TABLES for one in entries(table).values()]
    for section in SECTIONS:
        found = [one for one in options if one.section == section]
        if not found:
            continue
        lines += ["", f"## {section}", "", "| option | in Python | what it does |", "|---|---|---|"]
        for one in found:
            flags = ", ".join(f"`{flag}`" for flag in one.flags) or "-"
            names = f"; elsewhere: {', '.join(f'`{e}`' for e in one.elsewhere)}" if one.elsewhere else ""
            python = "-" if one.doc == "" and not one.help else f"`{one.name}`"
            text = (one.help or one.doc).replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {flags} | {python} | {text}{names} |")
    return "\n".join(lines) + "\n"
