"""What Tab completes where an option has no table (``cli.options``)."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def like(name: str) -> Complete:
    """Complete as the option of this name does in ``mlxdiff generate``."""

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from mlxdiff.cli.generate import generate

        option = next(one for one in generate.params if one.name == name)
        return option.shell_complete(ctx, incomplete)

    return complete


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of files and folders."""
    return [CompletionItem(incomplete, type="file")]


def kept(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete names of converted models."""
    from mlxdiff import library

    names = (entry.name for entry in library.entries())
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def one_of(*words: str) -> Complete:
    """Complete one of these words."""

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]

    return complete
