"""Options of the command line, made from the tables of ``run.options``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from mlxdiff.errors import in_python
from mlxdiff.run.options import (
    CommandOptions,
    FileOptions,
    LoadOptions,
    SeedOptions,
    ValueOptions,
)
from mlxdiff.run.table import Option, Options, entries
from mlxdiff.run.values import Anything, Choice, Each, Files, Flag, Unfit

TABLES: tuple[type, ...] = (LoadOptions, FileOptions, SeedOptions, ValueOptions, CommandOptions)
"""In the order of ``--help``, section by section."""
FEW = 6  # words that the help of an option has room for without a list of its own

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:  # generic from click 8.4 on, for type checkers only
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType


class TableOption(click.Option):
    """An option of a table.

    Args:
        section: the title in ``--help`` that it belongs to.
    """

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Value(ParamType):
    """A value of a kind of ``run.values``.

    Args:
        metavar: what stands for it in ``--help``; None: what its kind says.
    """

    def __init__(self, kind: Anything, metavar: str | None = None) -> None:
        self.kind, self.name = kind, metavar or kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.kind.parse(value)
        except Unfit as unfit:
            self.fail(str(unfit), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        known = [*self.kind.suggestions, *_NAMES.get(str(param.name), list)()]
        items = [CompletionItem(word) for word in known if word.startswith(incomplete)]
        if self.name.startswith(("FILE", "PATH", "FOLDER", "OUT")) or param.name == "preset":
            items.append(CompletionItem(incomplete, type="file"))
        return items


def _models() -> list[str]:
    """Short names of models, and models that are converted."""
    from mlxdiff import library
    from mlxdiff.store.catalogue import KNOWN, SHIPPED

    return [one.name for one in KNOWN] + [*SHIPPED] + [one.name for one in library.entries()]


def _presets() -> list[str]:
    from mlxdiff.batch.presets import config_folder

    return sorted(path.stem for path in (config_folder() / "presets").glob("*.toml"))


def _styles() -> list[str]:
    from mlxdiff.text.styles import STYLES

    return [*STYLES]


def _axes() -> list[str]:
    from mlxdiff.batch.words import MACHINE, options

    return [f"{name}=" for name, one in options().items() if one.section != MACHINE]


_NAMES: dict[str, Callable[[], list[str]]] = {
    "model": _models,
    "refiner": _models,
    "preset": _presets,
    "style": _styles,
    "vary_option": _axes,
}
"""Options whose values have names that are looked up."""


# Arguments of functions that have no table, and those that have another name in Python.
_FLAGS = {
    "ema": "--ema",
    "force": "--force",
    "overwrite": "--force",
    "group_size": "--group-size",
    "recipe": "--recipe",
    "to": "--to",
    "verify": "--verify",
}


def on_command_line(name: str, value: Any, form: str) -> str:
    """Name an option by its flag; one that has none as in Python (``errors.argument``)."""
    found = [entries(table)[name] for table in TABLES if name in entries(table)]
    if not found and name not in _FLAGS:
        from mlxdiff.training import options

        known = [one for one in vars(options).values() if dataclasses.is_dataclass(one)]
        tables: list[Any] = [one for one in known if issubclass(one, Options)]  # type: ignore[arg-type]
        found = [entries(one)[name] for one in tables if name in entries(one)]
    flags = [flag for entry in found for flag in entry.flags if flag.startswith("--")]
    if name in _FLAGS:
        flags = [_FLAGS[name]]
    if not flags:
        return in_python(name, value, form)
    yes, _, no = flags[0].partition("/")
    if value is False and no:
        return no
    said = form if value is None or isinstance(value, bool) else str(value)
    return f"{yes} {said}" if said else yes


def table_options(command: F) -> F:
    """Give a command every option of all tables that has a flag. What is not given is None."""
    return options_of(*TABLES)(command)


def options_of(*tables: type) -> Callable[[F], F]:
    """Give a command every option of these tables that has a flag. What is not given is None."""

    def decorate(command: F) -> F:
        # Decorators apply from the bottom up.
        for table in reversed(tables):
            for entry in reversed(list(entries(table).values())):
                if entry.flags:
                    command = _decorator(entry)(command)
        return command

    return decorate


def options_named(table: type, *names: str) -> Callable[[F], F]:
    """Give a command some options of a table. What is not given is None."""

    def decorate(command: F) -> F:
        for name in reversed(names):
            command = _decorator(entries(table)[name])(command)
        return command

    return decorate


def given_to(table: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a table that are given."""
    own = entries(table)
    return {name: v for name, v in given.items() if name in own and v not in (None, ())}


def _decorator(entry: Option) -> Callable[[Any], Any]:
    kind, text = entry.kind, entry.help
    if isinstance(kind, Choice) and len(kind.words) > FEW:
        text += f" One of: {', '.join(kind.words)}."
    value: dict[str, Any] = {"is_flag": True}
    if not isinstance(kind, Flag):
        value = {
            "type": Value(kind, entry.metavar),
            "metavar": entry.metavar or kind.metavar,
            "multiple": isinstance(kind, (Each, Files)),
        }
    return click.option(
        *entry.flags,
        entry.name,
        cls=TableOption,
        section=entry.section,
        default=None,
        help=text,
        **value,
    )
