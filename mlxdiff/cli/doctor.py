"""``mlxdiff doctor``: find what is slow or broken here."""

from __future__ import annotations

import json
import textwrap

import click

from mlxdiff.cli import common_options, show_notes


@click.command()
@click.option("--online", is_flag=True, help="Also try to reach the Hugging Face hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@common_options
@click.pass_context
def doctor(ctx: click.Context, online: bool, as_json: bool, quiet: bool) -> None:
    """Find what is slow or broken on this machine, and say what to do about it.

    The exit code is 0, even if there is advice, or 2 if mlxdiff cannot run. --quiet shows problems
    only.
    """
    from mlxdiff.report.doctor import FAULT, OK, examine

    show_notes(quiet)
    findings = []
    for finding in examine(online):
        findings.append(finding)
        if not as_json and not (quiet and finding.state == OK):
            _show(finding.state, finding.text, finding.remedy)
    if as_json:
        click.echo(json.dumps([finding.to_dict() for finding in findings], ensure_ascii=False))
    if any(finding.state == FAULT for finding in findings):
        ctx.exit(2)


def _show(state: str, text: str, remedy: str) -> None:
    """Print a finding as a paragraph that starts with its state."""
    indent = " " * 8
    lines = textwrap.wrap(
        text, 92, initial_indent=f"{state:8}", subsequent_indent=indent, break_on_hyphens=False
    )
    if remedy:
        lines += textwrap.wrap(
            f"What to do: {remedy}.",
            92,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    click.echo("\n".join(lines))
