"""``mlxdiff convert``: a checkpoint becomes a folder of MLX arrays."""

from __future__ import annotations

import json
import time

import click

from mlxdiff.cli import ProgressBar, common_options, show_notes


@click.command()
@click.argument("source")
@click.argument("dest", type=click.Path())
@click.option(
    "--dtype",
    default="float16",
    help="float16 (default), float32 or bfloat16: how weights are kept.",
)
@click.option(
    "-q",
    "--quantize",
    metavar="BITS",
    help="2, 3, 4, 5, 6 or 8 bits a weight, or mxfp4, nvfp4, mxfp8. Default: not.",
)
@click.option("--group-size", type=int, help="Weights that share a scale: 32, 64 (default), 128.")
@click.option("--recipe", help="mixed, uniform or linear. Default: the best for these bits.")
@click.option("--revision", help="Hub id: branch, tag or commit.")
@click.option("--variant", help="Weight files of this variant, such as fp16.")
@click.option("--config", help="Single file: a folder with its configs, or the parts it lacks.")
@click.option(
    "--prediction-type",
    help="Single file: epsilon, v_prediction or sample, whatever the file looks like.",
)
@click.option("--ema", is_flag=True, help="Single file: the moving averages, where it has both.")
@click.option("--force", is_flag=True, help="Replace DEST if it exists.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@common_options
def convert(
    source: str,
    dest: str,
    dtype: str,
    quantize: str | None,
    group_size: int | None,
    recipe: str | None,
    revision: str | None,
    variant: str | None,
    config: str | None,
    prediction_type: str | None,
    ema: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert SOURCE, a diffusers folder, a single file or a hub id, to the new folder DEST.

    Every tensor is accounted for: one that is missing, left over or of a wrong shape is an error.
    """
    from mlxdiff.convert import convert as run

    show_notes(quiet)
    start = time.perf_counter()
    with ProgressBar("converting", quiet) as progress:
        report = run(
            source,
            dest,
            dtype=dtype,
            revision=revision,
            variant=variant,
            force=force,
            progress=progress,
            config=config,
            prediction_type=prediction_type,
            ema=ema,
            quantize=quantize,
            group_size=group_size,
            recipe=recipe,
        )
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        click.echo(str(report))
        click.echo(f"{dest}  {time.perf_counter() - start:.1f} s")
