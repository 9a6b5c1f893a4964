"""``mlxdiff convert``: convert a checkpoint to a folder of MLX arrays."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from mlxdiff.cli import ProgressBar, common_options, show_notes
from mlxdiff.cli.completion import files, like, one_of
from mlxdiff.errors import UsageError
from mlxdiff.run.options import LoadOptions
from mlxdiff.run.table import entries
from mlxdiff.run.values import Unfit


@click.command()
@click.argument("source", shell_complete=like("model"))
@click.argument("dest", type=click.Path())
@click.option(
    "--dtype",
    shell_complete=like("dtype"),
    default="float16",
    help="Type of the stored weights: float16 (default), float32 or bfloat16.",
)
@click.option(
    "-q",
    "--quantize",
    shell_complete=like("quantize"),
    metavar="BITS",
    help="Bits per weight: 2, 3, 4, 5, 6 or 8; or mxfp4, nvfp4, mxfp8. Default: no quantization.",
)
@click.option(
    "--group-size",
    type=int,
    help="Number of weights that share a scale: 32, 64 (default) or 128.",
)
@click.option(
    "--recipe",
    shell_complete=one_of("mixed", "uniform", "linear"),
    help="Which weights get how many bits: mixed, uniform or linear. Default: the best for BITS.",
)
@click.option(
    "--to",
    shell_complete=one_of("mlxdiff", "diffusers", "single"),
    default="mlxdiff",
    help="Form of DEST: mlxdiff (default), diffusers (a folder) or single (a .safetensors file).",
)
@click.option(
    "--lora",
    "loras",
    shell_complete=files,
    multiple=True,
    metavar="PATH[:SCALE]",
    help="Add a LoRA to the weights. Repeat it to add several.",
)
@click.option("--revision", help="Branch, tag or commit, for a hub id.")
@click.option("--variant", help="Use the weight files of this variant, such as fp16.")
@click.option(
    "--config",
    shell_complete=files,
    help="Folder with the configs or parts that a single file lacks.",
)
@click.option(
    "--prediction-type",
    help="epsilon, v_prediction or sample, for a single file; overrides what it says.",
)
@click.option(
    "--zero-snr/--no-zero-snr",
    default=None,
    help="Whether a single file was trained to zero terminal SNR; overrides what it says.",
)
@click.option(
    "--ema", is_flag=True, help="Use the moving averages, for a single file that has both."
)
@click.option("--force", is_flag=True, help="Replace DEST if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@common_options
def convert(
    source: str,
    dest: str,
    loras: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Convert SOURCE (a diffusers folder, a single file or a hub id) to DEST.

    Every tensor is checked: a missing, an extra or a misshapen tensor is an error.
    """
    from mlxdiff.convert import convert as run

    show_notes(quiet)
    start = time.perf_counter()
    with ProgressBar("converting", quiet) as progress:
        report = run(source, dest, change=_baked(loras), progress=progress, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        click.echo(str(report))
        click.echo(f"{dest}  {time.perf_counter() - start:.1f} s")


def _baked(words: tuple[str, ...]) -> Any:
    from mlxdiff.run.baking import Baking

    if not words:
        return None
    try:
        asked = [entries(LoadOptions)["loras"].kind.parse(word) for word in words]
    except Unfit as unfit:
        raise UsageError(f"--lora {unfit}") from None
    return Baking([(one.path, 1.0 if one.scale is None else one.scale) for one in asked])
