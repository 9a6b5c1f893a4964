"""A command whose ``--help`` shows its options in sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


class SectionedCommand(click.Command):
    """Shows each option under the title of its ``section``; those without one under the last.

    Args:
        sections: the titles, in order.
    """

    def __init__(self, *args: Any, sections: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; say what to type in place of a wrong one."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            from mlxdiff.cli.advice import explained

            if (message := explained(error, self, given)) is None:
                raise
            raise click.UsageError(message, ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        records: dict[str, list[tuple[str, str]]] = {title: [] for title in self.sections}
        for parameter in self.get_params(ctx):
            if not isinstance(parameter, click.Option):
                continue
            if (record := parameter.get_help_record(ctx)) is not None:
                records[getattr(parameter, "section", self.sections[-1])].append(record)
        for title, found in records.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)
