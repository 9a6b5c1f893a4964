"""``mlxdiff convert``: a checkpoint becomes a folder of MLX arrays."""

from __future__ import annotations

import json
import sys
import time

import click

from mlxdiff.cli import common_options, show_notes


@click.command()
@click.argument("source")
@click.argument("dest", type=click.Path())
@click.option(
    "--dtype",
    default="float16",
    help="float16 (default), float32 or bfloat16: how weights are kept.",
)
@click.option("--revision", help="Hub id: branch, tag or commit.")
@click.option("--variant", help="Weight files of this variant, such as fp16.")
@click.option("--force", is_flag=True, help="Replace DEST if it exists.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@common_options
def convert(
    source: str,
    dest: str,
    dtype: str,
    revision: str | None,
    variant: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert SOURCE, a diffusers folder or a hub id, to the new folder DEST.

    Every tensor is accounted for: one that is missing, left over or of a wrong shape is an error.
    """
    from mlxdiff.convert import convert as run

    show_notes(quiet)
    start = time.perf_counter()
    bar = click.progressbar(
        length=1,
        label="converting",
        item_show_func=lambda name: name,
        file=sys.stderr,
        show_eta=False,
    )

    def progress(done: int, total: int, name: str) -> None:
        bar.length = max(total, 1)
        bar.update(done - bar.pos, name)

    try:
        report = run(
            source,
            dest,
            dtype=dtype,
            revision=revision,
            variant=variant,
            force=force,
            progress=None if quiet else progress,
        )
    finally:
        if bar.pos:
            bar.render_finish()
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        click.echo(str(report))
        click.echo(f"{dest}  {time.perf_counter() - start:.1f} s")
