"""``mlxdiff info``: describe a model, a LoRA or a drawn picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.errors import printable


@click.command()
@click.argument("path", required=False)
@click.option("--config", help="Folder with the configs or parts that a single file lacks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@common_options
def info(path: str | None, config: str | None, as_json: bool, quiet: bool) -> None:
    """Describe PATH: a picture, a LoRA, or a model (a folder, a single file or a hub id).

    Without PATH, describe the built-in model.
    """
    from mlxdiff.adapters import lora
    from mlxdiff.convert.detect import is_weights

    show_notes(quiet)
    is_picture = path is not None and os.path.isfile(path) and not is_weights(Path(path))
    if is_picture:
        facts = _picture(str(path))
    elif path is not None and lora.is_lora(path):
        facts = lora.describe(path)
    else:
        facts = _model(path, config)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        for line in _lines(facts):
            click.echo(line)


def _picture(path: str) -> dict[str, Any]:
    from mlxdiff.pictures.metadata import read

    return read(path).to_dict()


def _model(path: str | None, config: str | None) -> dict[str, Any]:
    from mlxdiff import library
    from mlxdiff.convert import describe, open_source
    from mlxdiff.loading import BUILTIN
    from mlxdiff.report.bench import expected_memory

    place = BUILTIN if path is None else library.local_path(path) or path
    facts = describe(place, config)
    memory = expected_memory(open_source(place, config=config))
    return facts | ({} if memory is None else {"memory": memory})


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
