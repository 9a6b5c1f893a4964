"""Tables of options: what an entry says, and what follows from it.

A table is a frozen dataclass whose fields are made by ``option``. The field gives the Python name,
the type and the default; its annotation names a kind of ``run.values`` (``Annotated``); the entry
gives the rest. ``takes`` makes a function that has every option of a table as an argument: checked
when it is called, and seen by ``help()``, IDEs and type checkers.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import re
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import (
    Annotated,
    Any,
    ClassVar,
    Concatenate,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from mlxdiff.errors import UsageError, argument
from mlxdiff.run.values import ANYTHING, Anything, Unfit

P = ParamSpec("P")
Self = TypeVar("Self")
Table = TypeVar("Table")
R = TypeVar("R")


@dataclass(frozen=True)
class Option:
    """An entry of a table.

    Attributes:
        flags: on the command line; none: Python only.
        section: its title in ``--help``.
        help: one or two sentences for ``--help``.
        doc: the same for Python, where it must differ.
        metavar: what stands for its value in ``--help``; None: what its kind says.
        part: the part of a model that honours it (``run.kind.PARTS``); "": every model does.
        key: its name in the metadata of a picture; None: they do not hold it.
        elsewhere: names that other programs give it.
        name, kind, annotation, default: of the field.
        positional: whether Python takes it without its name.
    """

    flags: tuple[str, ...]
    section: str
    help: str
    doc: str
    metavar: str | None
    part: str
    key: str | None
    elsewhere: tuple[str, ...]
    name: str = ""
    kind: Anything = ANYTHING
    annotation: Any = Any
    default: Any = None
    positional: bool = False

    @property
    def flag(self) -> str:
        """The flag that messages name."""
        long = [flag for flag in self.flags if flag.startswith("--")]
        return (long or ["?"])[0].partition("/")[0]


def option(
    *flags: str,
    section: str = "",
    default: Any = None,
    help: str = "",
    doc: str = "",
    metavar: str | None = None,
    part: str = "",
    key: str | None = "",
    elsewhere: str = "",
) -> Any:
    """A field of a table; see ``Option``. The key is the field's own name unless given."""
    entry = Option(flags, section, help, doc or help, metavar, part, key, tuple(elsewhere.split()))
    return field(default=default, metadata={"option": entry})


class Options:
    """Base of all tables.

    Attributes:
        taken_by: the function that takes these options, for messages.
    """

    taken_by: ClassVar[str] = ""


@functools.cache
def entries(table: Any) -> Mapping[str, Option]:
    """The options of a table by Python name, in order."""
    hints = _type_hints(table)
    found = {}
    for one in fields(table):
        if (entry := one.metadata.get("option")) is None:
            continue
        found[one.name] = replace(
            entry,
            name=one.name,
            key=one.name if entry.key == "" else entry.key,
            kind=_kind(hints[one.name]),
            annotation=_plain(hints[one.name]),
            default=None if one.default is MISSING else one.default,
            positional=not one.kw_only,
        )
    return types.MappingProxyType(found)


def _type_hints(table: Any) -> dict[str, Any]:
    """The evaluated annotations of a table's fields. Python 3.10 cannot evaluate KW_ONLY's."""
    known = {one.name for one in fields(table)}
    found: dict[str, Any] = {}
    for base in reversed(table.__mro__):
        own = {name: hint for name, hint in inspect.get_annotations(base).items() if name in known}
        holder = types.SimpleNamespace(__annotations__=own)
        names = vars(sys.modules[base.__module__])
        found |= get_type_hints(holder, names, include_extras=True)
    return found


def make(table: Callable[..., Table], given: Mapping[str, Any]) -> Table:
    """The options of a table: those given, checked, and the defaults; None stands for a default.

    Raises: UsageError for a name that is not in the table, or a value that an option does not take.
    """
    known = entries(table)
    values = {}
    for name, value in given.items():
        if name not in known:
            raise UsageError(_unknown(name, table))
        if value is None:
            continue
        try:
            values[name] = known[name].kind.accept(value)
        except Unfit as unfit:
            raise UsageError(f"{argument(name)} is {unfit}") from None
    return table(**values)


def takes(
    table: Callable[P, Table],
) -> Callable[[Callable[[Self, Table], R]], Callable[Concatenate[Self, P], R]]:
    """Let a method take every option of a table as an argument.

    The method itself gets them as one object. Its docstring has ``{options}`` where they stand.
    """

    def decorate(method: Callable[[Self, Table], R]) -> Callable[Concatenate[Self, P], R]:
        @functools.wraps(method)
        def call(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
            return method(self, make(table, _named(table, args, kwargs)))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        _describe(call, table, [own], method)
        return call

    return decorate


def function_of(
    table: Callable[P, Table],
) -> Callable[[Callable[[Table], R]], Callable[P, R]]:
    """Do the same as ``takes``, for a function."""

    def decorate(function: Callable[[Table], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(make(table, _named(table, args, kwargs)))

        _describe(call, table, [], function)
        return call

    return decorate


def _named(table: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    first = [entry.name for entry in entries(table).values() if entry.positional]
    if len(args) > len(first):
        raise UsageError(
            f"{table.taken_by} takes {' and '.join(first)} without a name; give the others by name"
        )
    given = dict(zip(first, args, strict=False))
    if twice := sorted(set(given) & set(kwargs)):
        raise UsageError(f"{twice[0]} is given twice")
    return given | dict(kwargs)


def _unknown(name: str, table: Any) -> str:
    """Explain the fault of a name that is in no table, or in another one."""
    said = f"there is no argument {name!r}"
    known = entries(table)
    if found := [entry.name for entry in known.values() if name in entry.elsewhere]:
        return f"{said}; did you mean {found[0]}?"
    for other in _all_tables():
        for entry in entries(other).values():
            if other.taken_by and name in (entry.name, *entry.elsewhere):
                return f"{said}; {entry.name} is an argument of {other.taken_by}"
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"{said}; did you mean {near[0]}?"
    return f"{said}; there are {', '.join(known)}"


def _all_tables(base: Any = Options) -> list[Any]:
    found: list[Any] = []
    for table in base.__subclasses__():
        found += [table, *_all_tables(table)]
    return found


def _describe(
    call: Any, table: Any, own: list[inspect.Parameter], function: Callable[..., Any]
) -> None:
    """Give a function the signature and the docstring that a table makes."""
    parameters = list(own)
    lines = []
    for entry in entries(table).values():
        parameters.append(
            inspect.Parameter(
                entry.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if entry.positional
                else inspect.Parameter.KEYWORD_ONLY,
                default=entry.default,
                annotation=entry.annotation,
            )
        )
        lines.append(
            textwrap.fill(
                f"{entry.name}: {_as_phrase(_in_python(entry.doc))}",
                width=92,
                initial_indent=" " * 4,
                subsequent_indent=" " * 8,
                break_on_hyphens=False,
                break_long_words=False,
            )
        )
    returns = inspect.signature(function).return_annotation
    call.__signature__ = inspect.Signature(parameters, return_annotation=returns)
    call.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not p.empty}
    call.__annotations__["return"] = returns
    if function.__doc__:
        call.__doc__ = inspect.cleandoc(function.__doc__).replace(
            "{options}", "\n".join(lines).lstrip()
        )


def _in_python(text: str) -> str:
    """A text of a table with the Python names of the options that it names by flags."""
    names = {
        flag: entry.name
        for table in _all_tables()
        for entry in entries(table).values()
        for flag in entry.flags
    }
    return re.sub(r"--[a-z0-9-]+", lambda found: names.get(found[0], found[0]), text)


def _as_phrase(sentence: str) -> str:
    """A sentence that goes on after a colon; names such as SDXL keep their capitals."""
    return sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() else sentence


def _kind(hint: Any) -> Anything:
    """The kind of values that an annotation names."""
    if get_origin(hint) is Annotated:
        found = [one for one in hint.__metadata__ if isinstance(one, Anything)]
        if found:
            return found[-1]
    for part in get_args(hint):
        if (kind := _kind(part)) != ANYTHING:
            return kind
    return ANYTHING


def _plain(hint: Any) -> Any:
    """An annotation without what ``Annotated`` adds, at its top and in a union."""
    if get_origin(hint) is Annotated:
        return _plain(hint.__origin__)
    if get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_plain, get_args(hint)))
    return hint
