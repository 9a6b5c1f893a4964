"""``mlxdiff bench``: how fast a model draws on this machine."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from mlxdiff.cli import ProgressBar, common_options, show_notes


@click.command()
@click.option("-m", "--model", help="As for generate. Default: the built-in model.")
@click.option("-W", "--width", type=int, help="Pixels. Default: the model's own.")
@click.option("-H", "--height", type=int, help="Pixels. Default: the model's own.")
@click.option("--steps", type=int, default=4, help="Of the sampler. Default: 4.")
@click.option(
    "-b", "--count", type=int, default=3, help="Pictures after the first, timed warm. Default: 3."
)
@click.option("-g", "--guidance", "--cfg-scale", type=float, help="Default: the model's own.")
@click.option("--sampler", help="Default: auto.")
@click.option("--schedule", help="Default: auto.")
@click.option("--label", type=int, help="A model without text: the class to draw.")
@click.option("--vae", help="Another VAE, or a TAESD, as for generate.")
@click.option("--backend", default="auto", help="auto (default), mlx or numpy.")
@click.option("--dtype", default="auto", help="auto (default), float32, float16 or bfloat16.")
@click.option("-q", "--quantize", metavar="BITS", help="As for generate.")
@click.option("--low-memory", is_flag=True, help="As for generate.")
@click.option("--vae-tiling/--no-vae-tiling", default=None, help="As for generate.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON on stdout, to post.")
@common_options
def bench(
    model: str | None,
    steps: int,
    count: int,
    vae: str | None,
    backend: str,
    dtype: str,
    quantize: str | None,
    low_memory: bool,
    vae_tiling: bool | None,
    as_json: bool,
    quiet: bool,
    **picture: Any,
) -> None:
    """Draw some pictures; say how long each stage takes, cold and warm, how much memory it takes,
    and what share of this machine's speed that is.

    Nothing is written. The JSON line (--json) holds no names of people, computers or folders.

    \b
    mlxdiff bench                              the built-in model, seconds
    mlxdiff bench -m sd15 --json >> bench.jsonl
    """
    from mlxdiff.loading import load
    from mlxdiff.report.bench import bench as run
    from mlxdiff.report.bench import table

    show_notes(quiet)
    with ProgressBar("fetching", quiet) as progress:

        def open_pipeline() -> Any:
            return load(
                model,
                backend=backend,
                dtype=dtype,
                quantize=quantize,
                low_memory=low_memory,
                vae_tiling=vae_tiling,
                vae=vae,
                progress=progress,
            )

        def on_step(step: Any) -> None:
            if not quiet:
                end = "\n" if step.index == step.total - 1 else ""
                done = f"\rstep {step.index + 1} of {step.total}, {step.seconds:.2f} s{end}"
                print(done, end="", file=sys.stderr, flush=True)

        record = run(
            open_pipeline,
            pictures=count,
            steps=steps,
            on_step=on_step,
            **{name: value for name, value in picture.items() if value is not None},
        )
    if as_json:
        click.echo(json.dumps(record))
    else:
        for line in table(record):
            click.echo(line)
