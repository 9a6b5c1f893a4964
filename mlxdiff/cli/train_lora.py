"""``mlxdiff train lora``: pictures with captions in, a LoRA out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.cli.options import given_to, options_of
from mlxdiff.cli.sections import SectionedCommand
from mlxdiff.cli.streams import tell
from mlxdiff.training.options import SECTIONS, TrainLoraOptions


@click.command(cls=SectionedCommand, sections=SECTIONS, context_settings={"show_default": False})
@click.argument("folder", type=click.Path(path_type=Path))
@options_of(TrainLoraOptions)
@common_options
def lora(folder: Path, quiet: bool, **given: Any) -> None:
    """Train a LoRA on the pictures of FOLDER.

    A picture's caption is a .txt file of the same name beside it, or a line of metadata.jsonl, or
    the name of a folder such as 10_name (each picture ten times in an epoch).

    \b
    mlxdiff train lora pictures/ -m sd15 --steps 1500 --rank 8
    mlxdiff train lora dog/ -m sdxl -q 4 --caption "a photo of sks dog" --dry-run
    """
    show_notes(quiet)
    from mlxdiff.training.train_lora import train_lora

    say = (lambda text: None) if quiet else tell
    for line in train_lora(folder, **given_to(TrainLoraOptions, given), say=say).lines():
        click.echo(line)
