"""``mlxdiff info``: describe any file: a model, what is added to one, or a drawn picture."""

from __future__ import annotations

import json
from typing import Any

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.cli.completion import files, like
from mlxdiff.errors import printable


@click.command()
@click.argument("path", required=False, shell_complete=like("model"))
@click.option(
    "--config",
    shell_complete=files,
    help="Folder with the configs or parts that a single file lacks.",
)
@click.option("--verify", is_flag=True, help="Compare a converted folder with its hashes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@common_options
def info(path: str | None, config: str | None, verify: bool, as_json: bool, quiet: bool) -> None:
    """Describe PATH: a picture, a model (a folder, a file or a hub id), or any other weight file.

    Without PATH, describe the built-in model.
    """
    from mlxdiff.report.info import describe

    show_notes(quiet)
    facts = describe(path, config, verify)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        for line in _lines(facts):
            click.echo(line)


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Format a nested mapping as ``key: value`` lines."""
    lines = []
    for key, value in facts.items():
        is_file = "." in key  # keep file names as they are
        label = printable(f"{indent}{key if is_file else key.replace('_', ' ')}:")
        if isinstance(value, dict):
            lines += [label, *_lines(value, indent + "  ")] if value else []
        elif isinstance(value, list):
            lines += [f"{label} {printable(', '.join(map(str, value)))}"] if value else []
        elif value is not None:
            lines.append(f"{label} {printable(str(value))}")
    return lines
