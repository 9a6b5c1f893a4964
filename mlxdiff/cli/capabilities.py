"""``mlxdiff capabilities``: options and what a model honours, for programs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.errors import UsageError


@click.command()
@click.option(
    "-m", "--model", help="Folder, single file or name of a converted model; builtin, emoji."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the schema of each option.")
@common_options
def capabilities(model: str | None, as_json: bool, quiet: bool) -> None:
    """List all options of generate; with -m MODEL, say which of them it honours.

    Nothing is fetched, and no network is loaded.
    """
    from mlxdiff import library
    from mlxdiff.serve.schema import capabilities as described
    from mlxdiff.serve.shelf import BUILTIN_NAME

    show_notes(quiet)
    place: Path | None = None
    if model is not None:
        place = library.local_path(model) or Path(model).expanduser()
        if not place.exists():
            raise UsageError(
                f"{model}: is not on this machine; convert it first: mlxdiff convert {model}"
            )
    found = described(place, model or BUILTIN_NAME)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    for one in found["options"]:
        if one["flags"]:
            why = "" if one.get("honoured", True) else f"  (not honoured: {one['reason']})"
            click.echo(f"{', '.join(one['flags'])}{why}")
