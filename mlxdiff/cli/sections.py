"""A command whose ``--help`` shows its options in sections."""

from __future__ import annotations

from typing import Any

import click


class SectionedCommand(click.Command):
    """Shows options under the titles that ``sections`` gives them, others at the end.

    Args:
        sections: title -> names of parameters (not of flags), in order.
    """

    def __init__(self, *args: Any, sections: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = {title: names.split() for title, names in sections.items()}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        helps = set(ctx.help_option_names)  # click's own name for that option is not to rely on
        left = {
            "help" if helps & set(o.opts) else o.name: record
            for o in options
            if (record := o.get_help_record(ctx))
        }
        for title, names in self.sections.items():
            records = [left.pop(name) for name in names if name in left]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if left:
            with formatter.section("Others"):
                formatter.write_dl(list(left.values()))
