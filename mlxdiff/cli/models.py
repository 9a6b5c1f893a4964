"""``mlxdiff models``: list and remove converted models; list short names."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.cli.advice import AdvisedGroup
from mlxdiff.cli.completion import kept


@click.group(cls=AdvisedGroup, invoke_without_command=True)
@click.option("--known", "show_known", is_flag=True, help="List the models with a short name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@common_options
@click.pass_context
def models(ctx: click.Context, show_known: bool, as_json: bool, quiet: bool) -> None:
    """List the models that were downloaded from the hub and converted, with their sizes.

    They are stored in $MLXDIFF_HOME/models (default: ~/.cache/mlxdiff/models).

    \b
    mlxdiff models --known         list short names for -m, licences and strengths
    mlxdiff models remove sdxl     free disk space
    """
    show_notes(quiet)
    if ctx.invoked_subcommand is not None:
        return
    if show_known:
        _list_known(as_json)
    else:
        _list_kept(as_json)


@models.command()
@click.argument("names", nargs=-1, required=True, shell_complete=kept)
@click.option("--json", "as_json", is_flag=True, help="Print the removed models as JSON.")
@common_options
def remove(names: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Remove the converted copies of NAMES (short names or hub ids).

    Add @COMMIT to a name to remove one of several revisions. Downloaded files stay in the cache of
    huggingface_hub, which other programs share.
    """
    from mlxdiff import library
    from mlxdiff.store import cache

    show_notes(quiet)
    removed = library.remove(*names)
    if as_json:
        click.echo(json.dumps([entry.to_dict() for entry in removed]))
    else:
        for entry in removed:
            click.echo(f"removed {entry.name} ({entry.dtype}), {_size(entry.size)}")
    if not quiet:
        for repo in dict.fromkeys("/".join(entry.name.split("/")[:2]) for entry in removed):
            if size := cache.cached_bytes(repo):
                click.echo(
                    f"Note: the downloaded files of {repo} ({_size(size)}) stay in "
                    f"{cache.cache_folder()}; `hf cache rm model/{repo}` removes them",
                    err=True,
                )


def _list_kept(as_json: bool) -> None:
    from mlxdiff import library

    entries = library.entries()
    if as_json:
        click.echo(json.dumps([entry.to_dict() for entry in entries]))
        return
    if not entries:
        click.echo(f"No models yet in {library.folder()}.", err=True)
        click.echo("mlxdiff models --known lists models to start with.", err=True)
        return
    rows = [("NAME", "FAMILY", "SIZE", "TYPE", "REVISION", "DATE")]
    rows += [
        (
            f"{entry.name} ({entry.short})" if entry.short else entry.name,
            entry.family,
            _size(entry.size),
            entry.dtype,
            entry.revision[:7],
            time.strftime("%Y-%m-%d", time.localtime(entry.date)),
        )
        for entry in entries
    ]
    _table(rows)
    total = sum(entry.size for entry in entries)
    click.echo(f"{_size(total)} in {library.folder()}")


def _list_known(as_json: bool) -> None:
    from mlxdiff.store.catalogue import ABOUT, KNOWN, SHIPPED

    if as_json:
        click.echo(json.dumps([vars(known) for known in KNOWN]))
        return
    for name, (licence, note) in ABOUT.items():
        size = sum(file.stat().st_size for file in SHIPPED[name].rglob("*") if file.is_file())
        click.echo(f"{name:18} {_size(size):>8}  {note}")
        click.echo(f"{'':18} {'':8}  in this package, {licence}")
    for known in KNOWN:
        click.echo(f"{known.name:18} {_size(known.megabytes * 10**6):>8}  {known.note}")
        click.echo(f"{'':18} {'':8}  {known.repo}, {known.licence}")
    click.echo("Sizes: converted copies in float16. Licences: see the model cards.")


def _table(rows: list[Any]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())


def _size(size: int) -> str:
    from mlxdiff.convert.report import human_bytes

    return human_bytes(size)
