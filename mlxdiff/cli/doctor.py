"""``mlxdiff doctor``: find what is slow or broken here."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click

from mlxdiff.cli import ProgressBar, common_options, show_notes
from mlxdiff.cli.completion import files, like
from mlxdiff.errors import UsageError

_ONLY = {
    "--files": "--reference",
    "--download": "--reference",
    "--backend": "--reference",
    "--exact": "--self-test or --reference",
}


@click.command()
@click.option("--online", is_flag=True, help="Also try to reach the Hugging Face hub.")
@click.option(
    "--self-test",
    is_flag=True,
    help="Run every operation of the models on MLX and check its result; takes about a minute.",
)
@click.option(
    "--reference",
    shell_complete=like("model"),
    metavar="MODEL",
    help="Draw the pictures whose numbers diffusers publishes, and compare. MODEL is a short name, "
    "a hub id, NAME=PATH, or all.",
)
@click.option(
    "--files",
    shell_complete=files,
    metavar="FOLDER",
    help="Folder with the pictures and arrays that the published tests fetch.",
)
@click.option("--download", is_flag=True, help="Fetch weights that are missing.")
@click.option(
    "--backend",
    metavar="NAME",
    shell_complete=like("backend"),
    help="auto, mlx or numpy; auto by default.",
)
@click.option("--exact", is_flag=True, help="On a GPU, compute as exactly as the type allows.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@common_options
@click.pass_context
def doctor(
    ctx: click.Context,
    online: bool,
    self_test: bool,
    reference: str | None,
    files: str | None,
    download: bool,
    backend: str | None,
    exact: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find what is slow or broken on this machine, and say what to do about it.

    The exit code is 0, even if there is advice, or 2 if mlxdiff cannot run. --quiet shows problems
    only. --self-test and --reference check numbers instead; the exit code is then 1 if a number is
    wrong, and --json prints one line to post.

    \b
    mlxdiff doctor --self-test --json >> self-test.jsonl
    mlxdiff doctor --reference sd14
    mlxdiff doctor --reference sd15=~/models/sd15 --files pictures
    """
    if self_test and reference is not None:
        raise UsageError("--self-test and --reference are two commands; give one of them")
    given = {"--files": files, "--download": download, "--backend": backend, "--exact": exact}
    for option, value in given.items():
        if value and reference is None and not (option == "--exact" and self_test):
            raise UsageError(
                f"{option} belongs to {_ONLY[option]}; add that, or leave {option} out"
            )
    if online and (self_test or reference is not None):
        raise UsageError("--online belongs to the plain doctor; leave it out")
    show_notes(quiet)
    if self_test:
        _self_test(ctx, exact, as_json, quiet)
    elif reference is not None:
        options = {"files": files, "backend": backend or "auto", "exact": exact}
        _reference(ctx, reference, as_json, quiet, download=download, **options)
    else:
        _examine(ctx, online, as_json, quiet)


def _examine(ctx: click.Context, online: bool, as_json: bool, quiet: bool) -> None:
    """Look at the machine."""
    from mlxdiff.report.doctor import FAULT, OK, examine

    findings = []
    for finding in examine(online):
        findings.append(finding)
        if not as_json and not (quiet and finding.state == OK):
            _show(finding.state, finding.text, finding.remedy)
    if as_json:
        click.echo(json.dumps([finding.to_dict() for finding in findings], ensure_ascii=False))
    if any(finding.state == FAULT for finding in findings):
        ctx.exit(2)


def _self_test(ctx: click.Context, exact: bool, as_json: bool, quiet: bool) -> None:
    """Run the self-test."""
    if exact:  # before anything imports MLX
        from mlxdiff.machine.exact import require

        require()
    from mlxdiff.report import self_test

    def show(check: self_test.Check) -> None:
        if not as_json and not (quiet and check.state == self_test.OK):
            click.echo(self_test.row(check))

    if not as_json:
        click.echo(self_test.HEADER)
    record = self_test.self_test(show)
    if as_json:
        click.echo(json.dumps(record))
    elif not quiet:
        versions = record["versions"]
        click.echo(
            f"MLX {versions['mlx']} on {record['device']}, mlxdiff {versions['mlxdiff']}: "
            f"{record['state']}, {record['seconds']:g} s"
        )
    if record["state"] == self_test.FAULT:
        ctx.exit(1)


def _reference(ctx: click.Context, model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Reproduce published numbers."""
    from mlxdiff.report import reference

    def show(outcome: reference.Outcome) -> None:
        if not as_json and not (quiet and outcome.state != reference.MISS):
            click.echo("\n".join(reference.lines(outcome)))

    with ProgressBar("fetching", quiet) as progress:
        record = reference.reference(model, on_outcome=show, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(record))
    if all(case["state"] == reference.SKIPPED for case in record["cases"]):
        reasons = {case["reason"]: case["case"] for case in reversed(record["cases"])}
        reason, case = next(reversed(reasons.items()))
        raise UsageError(f"no case could be drawn; the first, {case}: {reason}")
    if record["state"] == reference.MISS:
        ctx.exit(1)


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
