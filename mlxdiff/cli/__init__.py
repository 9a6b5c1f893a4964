"""The command line: parse arguments and print results; compute nothing.

Subcommands are imported on use, so that ``mlxdiff --help`` is fast. Exit codes: 0 for success; 2
for an error that the user can fix (one line, no traceback); 1 for a fault of mlxdiff; 130 for
Ctrl-C, 143 for SIGTERM, 129 for SIGHUP. These signals clean up first (``machine.stopping``).
"""

from __future__ import annotations

import importlib
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import click

import mlxdiff
from mlxdiff.cli import streams
from mlxdiff.cli.advice import AdvisedGroup
from mlxdiff.cli.streams import let_go, make_printable, tell
from mlxdiff.errors import MlxdiffError, naming, printable
from mlxdiff.machine import stopping

# name -> module with a click command of the same name, one-line help.
COMMANDS = {
    "generate": ("mlxdiff.cli.generate", "Draw pictures from a prompt."),
    "upscale": ("mlxdiff.cli.upscale", "Enlarge pictures by a network (ESRGAN)."),
    "score": ("mlxdiff.cli.score", "Compare pictures with words, or with each other."),
    "convert": ("mlxdiff.cli.convert", "Convert a model to a folder that loads fast."),
    "train": ("mlxdiff.cli.train", "Teach a model from a folder of pictures."),
    "info": ("mlxdiff.cli.info", "Describe a model, a LoRA or a drawn picture."),
    "bench": ("mlxdiff.cli.bench", "Time a model on this machine; make a record to post."),
    "doctor": ("mlxdiff.cli.doctor", "Find what is slow or broken here, and what to do."),
    "models": ("mlxdiff.cli.models", "List and remove converted models; list short names."),
    "samplers": ("mlxdiff.cli.samplers", "List samplers and schedules; say which one to take."),
    "serve": ("mlxdiff.cli.serve", "Serve a page and HTTP interfaces; keep the model loaded."),
    "capabilities": ("mlxdiff.cli.capabilities", "List options as JSON, for programs."),
    "mcp": ("mlxdiff.cli.mcp", "Serve tools to agents (Model Context Protocol)."),
}
_DEBUG = "mlxdiff.debug"
F = TypeVar("F", bound=Callable[..., Any])


class _UserError(click.ClickException):
    """An error that the user can fix; shown as one line."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class _Fault(click.ClickException):
    """A fault of mlxdiff."""

    exit_code = 1


class Main(AdvisedGroup):
    """A group that imports its commands on use and shows each failure as one line."""

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

    def main(self, *args: Any, **kwargs: Any) -> Any:
        make_printable()
        try:
            with stopping.handled(), naming(_flag):
                return super().main(*args, **kwargs)
        except OSError as error:  # click writes help and versions before it invokes a command
            tell(f"Error: {error.strerror or error}")
            raise SystemExit(_UserError.exit_code) from None
        finally:
            let_go()

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        found = super().resolve_command(ctx, args)
        stopping.begin_work()  # the modules of the command are imported
        return found

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # on a broken pipe, click exits quietly
        except KeyboardInterrupt as stop:
            tell("Interrupted; no partial files remain.")
            code = stop.code if isinstance(stop, stopping.Stopped) else 130
            raise click.exceptions.Exit(code) from None
        except Exception as error:
            if ctx.meta.get(_DEBUG):
                raise
            if isinstance(error, MlxdiffError):
                raise _UserError(str(error)) from None
            if isinstance(error, OSError) and error.strerror:
                where = f"{error.filename}: " if error.filename else ""
                raise _UserError(f"{where}{error.strerror}") from None
            if isinstance(error, MemoryError):
                raise _UserError(f"out of memory ({error}); try a smaller size") from None
            raise _Fault(
                f"a fault of mlxdiff: {type(error).__name__}: {error}; "
                "run again with --debug and please report the output"
            ) from None


def common_options(command: F) -> F:
    """Add ``--quiet`` and ``--debug`` to a subcommand."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
        ctx.meta[_DEBUG] = value
        return value

    for option in (
        click.option(
            "--debug", is_flag=True, callback=remember, expose_value=False, help="Show tracebacks."
        ),
        click.option("--quiet", is_flag=True, help="Show no progress and no notes."),
    ):
        command = option(command)
    return command


def _flag(name: str, value: Any, form: str) -> str:
    """Name an option by its flag in messages. The table of options is only imported for one."""
    from mlxdiff.cli.options import on_command_line

    return on_command_line(name, value, form)


class ProgressBar:
    """Work that is counted, on one line of the terminal; nothing if quiet or if none is reported.

        with ProgressBar("fetching", quiet) as progress:
            load(..., progress=progress)

    A new total begins a new count. Where stderr is no terminal, only the label is printed, once.
    """

    def __init__(self, label: str, quiet: bool) -> None:
        self.label, self.quiet = label, quiet
        self._total = -1
        self._begun = (0.0, 0)  # when the count began, and at how much

    def __enter__(self) -> Callable[[int, int, str], None] | None:
        return None if self.quiet else self.advance

    def advance(self, done: int, total: int, item: str) -> None:
        """Show how far the work is.

        Args:
            done, total: bytes (or pieces) done, and in all.
            item: name of the current item.
        """
        now = time.monotonic()
        if total != self._total:
            if self._total < 0 and not streams.is_terminal():
                tell(self.label)
            self._total, self._begun = total, (now, done)
        start, first = self._begun
        tail = f"{100 * done // max(total, 1)} %"
        if done > first and now > start:
            left = (now - start) * (total - done) / (done - first)
            tail += f", {streams.clock(left)} left"
        share = done / max(total, 1)
        streams.show(streams.with_bar(self.label, share, f"{tail}  {printable(item)}".rstrip()))

    def __exit__(self, *error: object) -> None:
        streams.clear()


class _Notes(logging.Handler):
    """Show on stderr what the library reports; show each text once. A warning is a note."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.said:
            self.said.add(message)
            prefix = "Note: " if record.levelno >= logging.WARNING else ""
            tell(f"{prefix}{printable(message)}")


def show_notes(quiet: bool) -> None:
    """Print to stderr what the library reports, unless quiet.

    What Python's modules and other libraries say about a strange file is for developers: our
    errors say it to users.
    """
    if not click.get_current_context().meta.get(_DEBUG):
        warnings.filterwarnings("ignore", module="PIL")
        for name in ("PIL", "huggingface_hub"):
            logging.getLogger(name).addHandler(logging.NullHandler())
            logging.getLogger(name).propagate = False
    logger = logging.getLogger("mlxdiff")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.NullHandler() if quiet else _Notes()]
    logger.propagate = False


@click.command(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mlxdiff.__version__, prog_name="mlxdiff")
def main() -> None:
    """Stable Diffusion on Apple Silicon and other small machines.

    Draw with the built-in model:

    mlxdiff generate "a red circle on a blue background"
    """
