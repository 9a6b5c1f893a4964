"""The commands of ``mlxdiff train`` that are their tables of options and a function."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.cli.options import given_to, options_of
from mlxdiff.cli.sections import SectionedCommand
from mlxdiff.cli.streams import tell
from mlxdiff.training import options as tables


def _command(name: str, table: type, text: str) -> click.Command:
    """Make a command of ``mlxdiff.training.train_NAME.train_NAME``."""

    def call(folder: Path, quiet: bool, **given: Any) -> None:
        show_notes(quiet)
        module = importlib.import_module(f"mlxdiff.training.train_{name}")
        say = (lambda line: None) if quiet else tell
        done = getattr(module, f"train_{name}")(folder, **given_to(table, given), say=say)
        for line in done.lines():
            click.echo(line)

    call.__doc__ = text
    decorated = options_of(table)(common_options(call))
    folder = click.argument("folder", type=click.Path(path_type=Path))
    return click.command(
        name,
        cls=SectionedCommand,
        sections=tables.SECTIONS,
        context_settings={"show_default": False},
        help=inspect.cleandoc(text),
    )(folder(decorated))


embedding = _command(
    "embedding",
    tables.TrainEmbeddingOptions,
    """Teach a model a word from the pictures of FOLDER (textual inversion).

    Every caption must have the word. No weight of the model changes: the result is a few vectors.

    \b
    mlxdiff train embedding robot/ --word robbi --init-word toy --caption "a photo of robbi"
    """,
)
controlnet = _command(
    "controlnet",
    tables.TrainControlNetOptions,
    """Train a ControlNet on the pictures of FOLDER: edges, or other maps, decide what stands where.

    It starts from the model's own weights.

    \b
    mlxdiff train controlnet pictures/ --control edges -m sd15 --batch 4
    """,
)
unconditional = _command(
    "unconditional",
    tables.TrainUnconditionalOptions,
    """Train a new model of pixels on the pictures of FOLDER, from scratch (Ho et al. 2020).

    It draws pictures like them, from noise, without a prompt.

    \b
    mlxdiff train unconditional digits/ --classes --resolution 32 --batch 32 --steps 5000
    """,
)
finetune = _command(
    "finetune",
    tables.TrainFinetuneOptions,
    """Train all weights of a model's U-Net on the pictures of FOLDER.

    For small models: it takes 16 bytes of memory for each weight. Else train a LoRA.

    \b
    mlxdiff train finetune pictures/ -m MODEL --lr 1e-5 --ema 0.999
    """,
)
distill = _command(
    "distill",
    tables.TrainDistillOptions,
    """Teach a model to draw in a few steps without guidance what takes it many with it.

    Latent consistency distillation (Luo et al. 2023): a LoRA (LCM-LoRA), or with --whole a model
    that takes the guidance scale as an input. It learns on the pictures of FOLDER, with captions.

    \b
    mlxdiff train distill pictures/ -m sd15 --rank 64 --targets all -o few.safetensors
    mlxdiff generate "a fox" -m sd15 --lora few.safetensors --sampler lcm --steps 4 -g 1
    """,
)
