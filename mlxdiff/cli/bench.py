"""``mlxdiff bench``: time a model on this machine."""

from __future__ import annotations

import json
from typing import Any

import click

from mlxdiff.cli import ProgressBar, common_options, show_notes, streams
from mlxdiff.cli.completion import like


@click.command()
@click.option(
    "-m",
    "--model",
    shell_complete=like("model"),
    help="Same as for generate. Default: the built-in model.",
)
@click.option("-W", "--width", type=int, help="Width in pixels. Default: the model's own.")
@click.option("-H", "--height", type=int, help="Height in pixels. Default: the model's own.")
@click.option("--steps", type=int, default=4, help="Number of sampling steps. Default: 4.")
@click.option(
    "-b", "--count", type=int, default=3, help="Number of pictures to time warm. Default: 3."
)
@click.option(
    "-g", "--guidance", "--cfg-scale", type=float, help="Guidance scale. Default: the model's own."
)
@click.option("--sampler", shell_complete=like("sampler"), help="Sampler. Default: auto.")
@click.option("--schedule", shell_complete=like("schedule"), help="Noise schedule. Default: auto.")
@click.option("--label", type=int, help="Class to draw, for a model without text.")
@click.option(
    "--vae", shell_complete=like("vae"), help="Another VAE or a TAESD. Same as for generate."
)
@click.option(
    "--backend",
    default="auto",
    shell_complete=like("backend"),
    help="auto (default), mlx or numpy.",
)
@click.option(
    "--dtype",
    default="auto",
    shell_complete=like("dtype"),
    help="auto (default), float32, float16 or bfloat16.",
)
@click.option(
    "-q",
    "--quantize",
    metavar="BITS",
    shell_complete=like("quantize"),
    help="Same as for generate.",
)
@click.option("--low-memory", is_flag=True, help="Same as for generate.")
@click.option("--vae-tiling/--no-vae-tiling", default=None, help="Same as for generate.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, to post.")
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
    """Draw some pictures and time them: seconds of each stage, cold and warm; peak memory; share of
    this machine's speed.

    No file is written. The JSON line (--json) contains no names of people, computers or folders.

    \b
    mlxdiff bench                                  time the built-in model, in seconds
    mlxdiff bench -m sd15 --json >> bench.jsonl    add a record to a file
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
                say = streams.show if streams.is_terminal() else streams.tell
                say(f"step {step.index + 1} of {step.total}, {step.seconds:.2f} s")

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
