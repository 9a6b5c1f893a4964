"""What to type instead: for commands and options that do not exist, and for a prompt in parts."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Sequence

import click

from mlxdiff.errors import UsageError

_COMMANDS = {
    "help": "--help",
    "version": "--version",
    "draw": "generate",
    "txt2img": "generate",
    "img2img": "generate -i PICTURE",
    "run": "generate",
    "imagine": "generate",
    "quantize": "convert -q 4",
    "server": "serve",
    "schedulers": "samplers",
    "list": "models",
    "ls": "models",
    "pull": 'generate -m MODEL "..."',  # a model is fetched when it is first used
    "download": 'generate -m MODEL "..."',
    "benchmark": "bench",
    "rm": "remove",
    "delete": "remove",
    "uninstall": "remove",
}
_OPTIONS = {
    "-V": "--version",
    "-w": "-W",
    "--size": "--width and --height",
    "--resolution": "--width and --height",
    "--cfg": "--guidance",
    "--out": "--output",
    "--negative": "--negative-prompt",
    "--scheduler": "--sampler, and --schedule for its noise levels",
}
"""Words of other programs that no option lists as its name elsewhere."""


class AdvisedGroup(click.Group):
    """A group that says what to type in place of a command that does not exist."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Raises: UsageError with advice."""
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            raise UsageError(unknown_command(ctx.command_path, args, known))
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments. An option before the command may belong behind it."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if (message := misplaced_option(ctx, error.option_name, given)) is None:
                raise
            raise click.UsageError(message, ctx) from None


def unknown_command(path: str, words: Sequence[str], known: Iterable[str]) -> str:
    """Explain a command that does not exist.

    Args:
        path: what was typed before it ("mlxdiff").
        words: what was typed from it on.
        known: the commands that exist.
    """
    first, names = words[0], list(known)
    if (other := _COMMANDS.get(first.lower())) is not None:
        if other.startswith("-") or other.split()[0] in names:
            return f"there is no command {first!r}; type {path} {other}"
    if path.endswith(" models") and first.lower() in ("list", "ls", "show"):
        return f"there is no command {first!r}; {path} alone lists the models"
    if near := difflib.get_close_matches(first.lower(), names, n=1):
        return f"there is no command {first!r}; did you mean {path} {near[0]}?"
    if "generate" in names and (" " in first or len(words) > 1):
        return f"there is no command {first!r}; to draw it: {path} generate {_prompt(words)}"
    return f"there is no command {first!r}; there are {', '.join(names)}"


def misplaced_option(ctx: click.Context, name: str, words: Sequence[str]) -> str | None:
    """Say where an option of the group belongs; None: it is unknown everywhere.

    Args:
        ctx: of the group.
        words: all that was typed behind its name.
    """
    if (here := _OPTIONS.get(name)) and any(here in p.opts for p in ctx.command.params):
        return f"there is no option {name}; it is {here} here"
    group = ctx.command
    assert isinstance(group, click.Group)
    if (command := group.get_command(ctx, "generate")) is None:
        return None
    if not any(name in p.opts for p in command.params):
        return None
    return f"{name} stands behind the command: {ctx.command_path} generate {shlex.join(words)}"


def unknown_option(name: str) -> str | None:
    """Return what an option of another program is called here; None: unknown there, too."""
    from mlxdiff.cli.options import TABLES
    from mlxdiff.run.table import entries

    if name in _OPTIONS:
        return _OPTIONS[name]
    plain = name.lstrip("-").replace("-", "_")
    for table in TABLES:
        for entry in entries(table).values():
            if entry.flags and plain in (entry.name, *entry.elsewhere):
                return entry.flag
    return None


def prompt_in_parts(path: str, words: Sequence[str]) -> str:
    """Say that a prompt of several words needs quotes."""
    return f"the prompt has several parts; quote it: {path} {_prompt(words)}"


def _prompt(words: Sequence[str]) -> str:
    """The words before the first option as one prompt, quoted for a shell; then the rest."""
    plain = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    rest = f" {shlex.join(words[plain:])}" if plain < len(words) else ""
    return quoted_for_shell(" ".join(words[:plain])) + rest


def quoted_for_shell(text: str) -> str:
    """Return a prompt as a shell takes it, in double quotes where they do."""
    return f'"{text}"' if not set(text) & set('"$`\\!') else shlex.quote(text)


def explained(error: click.UsageError, command: click.Command, args: Sequence[str]) -> str | None:
    """Return a better message for a fault in the arguments of a command; None: click's is good."""
    if isinstance(error, click.NoSuchOption):
        if (here := unknown_option(error.option_name)) is not None:
            return f"there is no option {error.option_name}; it is {here} here"
    elif "extra argument" in error.message and command.params and args:
        path = error.ctx.command_path if error.ctx else f"mlxdiff {command.name}"
        if (advice := _belongs_elsewhere(args)) is not None:
            return advice
        if not args[0].startswith("-"):
            return prompt_in_parts(path, args)
    return None


def _belongs_elsewhere(args: Sequence[str]) -> str | None:
    """Name the place of a word that is no part of a prompt; None: there is no such word."""
    for option, path, scale in zip(args, args[1:], args[2:], strict=False):
        if option == "--lora" and re.fullmatch(r"-?\d*\.?\d+", scale):
            return f"the scale of a LoRA follows a colon: --lora {path}:{scale}"
    for word in args[:2]:
        if word.lower().endswith((".png", ".jpg", ".jpeg", ".webp")) and os.path.isfile(word):
            return f"a picture to start from is named by an option: -i {shlex.quote(word)}"
    return None
