"""``mlxdiff mcp``: tools for agents over standard input and output."""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.cli.options import options_named
from mlxdiff.cli.serve import LOADING, gallery_option, make_engine, shelf_options
from mlxdiff.errors import UsageError, in_python, naming
from mlxdiff.run.options import LoadOptions


@click.command()
@shelf_options
@gallery_option
@options_named(LoadOptions, *LOADING)
@common_options
def mcp(quiet: bool, **given: Any) -> None:
    """Draw for agents, by the Model Context Protocol over standard input and output.

    Tools: generate, edit, info, models.
    """
    show_notes(quiet=True)  # notes are for who asked, and stand in the job
    if importlib.util.find_spec("mcp") is None:
        raise UsageError(
            "mlxdiff mcp needs mcp; install it: pip install 'mlxdiff[mcp]', or '.[mcp]' in a clone"
        )
    from mlxdiff.serve.mcp import run
    from mlxdiff.serve.request import Limits

    engine, shelf = make_engine(**given)
    try:
        with naming(in_python):  # the names of the fields of a tool
            run(engine, shelf, Limits())
    finally:
        engine.close()
