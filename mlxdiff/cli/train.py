"""``mlxdiff train``: the commands that teach a model something. Each is in a module of its own."""

from __future__ import annotations

import importlib

import click

# name -> module with a click command of the same name, one-line help.
COMMANDS = {
    "lora": ("mlxdiff.cli.train_lora", "A LoRA: a style or a subject, in a small file."),
    "embedding": ("mlxdiff.cli.train_commands", "A word of your own (textual inversion)."),
    "controlnet": ("mlxdiff.cli.train_commands", "A ControlNet: pictures that follow a picture."),
    "unconditional": ("mlxdiff.cli.train_commands", "A new model of pixels, from scratch."),
    "finetune": ("mlxdiff.cli.train_commands", "All weights of a small model."),
    "distill": ("mlxdiff.cli.train_commands", "Few steps in place of many."),
}


class _Group(click.Group):
    """Imports a command on use, so that ``--help`` is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[name][0]), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])


@click.command(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def train() -> None:
    """Teach a model from a folder of pictures.

    \b
    mlxdiff train lora pictures/ -m sd15 --steps 1000
    """
