"""Kinds of values that an option takes.

A value comes in by three doors: an argument in Python, a word on the command line, JSON in the
metadata of a picture. Each kind checks all three alike, and says in words what it expects.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlxdiff.errors import UsageError
from mlxdiff.store.reference import is_address, parse


class Unfit(ValueError):
    """A value that an option does not take.

    Attributes:
        value: the value, or the one of several that does not fit.
        expected: what the option takes, in words.
        near: a value that may be meant.
    """

    def __init__(self, value: Any, expected: str, near: str = "") -> None:
        meant = f" (did you mean {near}?)" if near else ""
        super().__init__(f"{_shown(value)}{meant}; expected {expected}")
        self.value, self.expected = value, expected


@dataclass(frozen=True)
class Anything:
    """Any value: its reader checks it."""

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        return "a value"

    @property
    def metavar(self) -> str:
        """The placeholder for the value in ``--help``."""
        return "VALUE"

    @property
    def suggestions(self) -> Sequence[str]:
        """Words to complete on the command line."""
        return ()

    def accept(self, value: Any) -> Any:
        """Return the value in plain Python types. Raises: Unfit."""
        return value

    def parse(self, word: str) -> Any:
        """Read a word of the command line. Raises: Unfit."""
        return self.accept(word)


ANYTHING = Anything()


@dataclass(frozen=True)
class Picture(Anything):
    """A picture: path, Pillow image or array. Metadata hold its name only."""

    expected = "a path, a Pillow image or an array; open bytes and files with PIL.Image.open"
    metavar = "FILE"

    def accept(self, value: Any) -> Any:
        if isinstance(value, (str, os.PathLike)):
            fits = value != ""
        else:  # a Pillow image and arrays of all libraries offer themselves as arrays
            fits = hasattr(value, "__array__") or hasattr(value, "__array_interface__")
        if not fits or isinstance(value, np.generic):
            raise Unfit(value, self.expected)
        return no_address(value)


@dataclass(frozen=True)
class Footage(Picture):
    """A picture, or a video: a file, a folder, a list of pictures or an array (F, H, W, 3)."""

    def accept(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and value:
            return [super(Footage, self).accept(one) for one in value]
        return super().accept(value)


@dataclass(frozen=True)
class Text(Anything):
    """A text; may be empty."""

    expected = "a text"
    metavar = "TEXT"

    def accept(self, value: Any) -> Any:
        if not isinstance(value, str):
            raise Unfit(value, self.expected)
        return value


@dataclass(frozen=True)
class File(Text):
    """A file of this machine."""

    expected = "a path"
    metavar = "FILE"

    def accept(self, value: Any) -> Any:
        return no_address(super().accept(value))


@dataclass(frozen=True)
class Place(Anything):
    """A file, a folder or a hub id.

    Attributes:
        or_pipeline: whether a Pipeline that is open will do, too.
    """

    or_pipeline: bool = False

    metavar = "PATH"

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        return "a path, a hub id or a Pipeline" if self.or_pipeline else "a path or a hub id"

    def accept(self, value: Any) -> Any:
        # A Pipeline by what it can do: its class is above this module.
        is_pipeline = self.or_pipeline and hasattr(value, "generate")
        if not is_pipeline and not isinstance(value, (str, os.PathLike)):
            raise Unfit(value, self.expected)
        if value == "":  # an unset variable of a shell or a form
            raise Unfit(value, self.expected)
        # The address of a model on the hub is a reference to it.
        known = is_address(value) and "\0" not in value and parse(value) is not None
        return value if known else no_address(value)


@dataclass(frozen=True)
class NameOrPlace(Place):
    """One of these names, or a file or hub id."""

    names: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        return f"{', '.join(self.names)}, or a file"

    @property
    def suggestions(self) -> Sequence[str]:
        """See ``Anything.suggestions``."""
        return self.names


@dataclass(frozen=True)
class Flag(Anything):
    """True or false."""

    expected = "true or false"
    metavar = ""

    def accept(self, value: Any) -> Any:
        if not isinstance(value, (bool, np.bool_)):
            raise Unfit(value, self.expected)
        return bool(value)


@dataclass(frozen=True)
class Whole(Anything):
    """A whole number within bounds; None: no bound.

    Attributes:
        words: what fits, where the bounds alone do not say it well.
    """

    least: int | None = None
    most: int | None = None
    words: str = ""

    metavar = "INTEGER"

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        return self.words or f"a whole number{_bounds(self.least, self.most)}"

    def accept(self, value: Any) -> Any:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))
        if not whole or not _within(value, self.least, self.most):
            raise Unfit(value, self.expected)
        return int(value)

    def parse(self, word: str) -> Any:
        try:
            return self.accept(int(word))
        except ValueError:
            raise Unfit(_number_of(word), self.expected) from None


def _is_finite(value: Any) -> bool:
    """Return True for a number in the range of a float. JSON has integers beyond it."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Number(Anything):
    """A finite number within bounds; None: no bound.

    Attributes:
        above: the value must be greater than this.
        words: what fits, where the bounds alone do not say it well.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    words: str = ""

    metavar = "NUMBER"

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        if self.words:
            return self.words
        if self.above is not None:
            return f"a number above {self.above:g}"
        return f"a number{_bounds(self.least, self.most)}"

    def accept(self, value: Any) -> Any:
        real = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
        if not real or not _is_finite(value) or not _within(value, self.least, self.most):
            raise Unfit(value, self.expected)
        if self.above is not None and value <= self.above:
            raise Unfit(value, self.expected)
        return float(value)

    def parse(self, word: str) -> Any:
        value = _number_of(word)
        return self.accept(float(value) if isinstance(value, int) else value)


@dataclass(frozen=True)
class Numbers(Anything):
    """Several numbers of one kind, such as 512x768.

    Attributes:
        form: how they stand on the command line, such as HxW or Y,X.
        each: the kind of each number.
    """

    form: str
    each: Whole | Number

    @property
    def _separator(self) -> str:
        return "x" if "x" in self.form else ","

    @property
    def names(self) -> list[str]:
        """Names of the numbers."""
        return self.form.split(self._separator)

    @property
    def metavar(self) -> str:
        """The form."""
        return self.form

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        count = {2: "two", 4: "four"}[len(self.names)]
        each = self.each.expected.partition("number")
        return f"{count} {each[0].removeprefix('a ')}numbers{each[2]} ({self.form})"

    def accept(self, value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim == 1:
            value = tuple(value)
        if not isinstance(value, (tuple, list)) or len(value) != len(self.names):
            raise Unfit(value, self.expected)
        try:
            return tuple(self.each.accept(one) for one in value)
        except Unfit:
            raise Unfit(value, self.expected) from None

    def parse(self, word: str) -> Any:
        try:
            parts = [self.each.parse(part) for part in word.lower().split(self._separator)]
            return self.accept(parts)
        except Unfit:
            raise Unfit(word, self.expected) from None


@dataclass(frozen=True)
class Ratio(Anything):
    """A shape, width to height, such as 16:9.

    Attributes:
        most: how many times one side may be as long as the other.
    """

    most: int

    metavar = "W:H"

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        return f"width to height, such as 16:9, at most {self.most}:1"

    def accept(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.parse(value)
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise Unfit(value, self.expected)
        try:
            width, height = (Whole(least=1).accept(one) for one in value)
        except Unfit:
            raise Unfit(value, self.expected) from None
        if max(width, height) > self.most * min(width, height):
            raise Unfit(value, self.expected)
        return width, height

    def parse(self, word: str) -> Any:
        try:
            return self.accept([Whole(least=1).parse(part) for part in word.split(":")])
        except Unfit:
            raise Unfit(word, self.expected) from None


@dataclass(frozen=True)
class SeedAndShare(Anything):
    """A seed, and a share from 0 to 1."""

    metavar = "SEED:STRENGTH"
    expected = "a seed and a strength from 0 to 1 (SEED:STRENGTH), such as 11:0.3"

    def accept(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.parse(value)
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise Unfit(value, self.expected)
        try:
            return Whole().accept(value[0]), Number(0, 1).accept(value[1])
        except Unfit:
            raise Unfit(value, self.expected) from None

    def parse(self, word: str) -> Any:
        seed, _, share = word.partition(":")
        try:
            return Whole().parse(seed), Number(0, 1).parse(share)
        except Unfit:
            raise Unfit(word, self.expected) from None


@dataclass(frozen=True)
class NumberList(Anything):
    """Numbers of one kind, as many as there are: 14.6,7.5,0.8.

    Attributes:
        each: the kind of each number.
    """

    each: Whole | Number

    metavar = "LIST"

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        return f"a list of numbers{self.each.expected.partition('number')[2]}, such as 14.6,7.5,0.8"

    def accept(self, value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim == 1:
            value = tuple(value)
        if not isinstance(value, (tuple, list)) or not value:
            raise Unfit(value, self.expected)
        try:
            return tuple(self.each.accept(one) for one in value)
        except Unfit:
            raise Unfit(value, self.expected) from None

    def parse(self, word: str) -> Any:
        try:
            return self.accept([self.each.parse(part) for part in word.split(",")])
        except Unfit:
            raise Unfit(word, self.expected) from None


@dataclass(frozen=True)
class Choice(Anything):
    """One of several words.

    Attributes:
        words: the words.
        hint: what to do where none of them fits.
        spelled: returns the word that another name stands for, or None.
    """

    words: tuple[str, ...]
    hint: str = ""
    spelled: Callable[[str], str | None] | None = None

    @property
    def metavar(self) -> str:
        """The words, or NAME where there are many of them."""
        return f"[{'|'.join(self.words)}]" if len(self.words) <= 4 else "NAME"

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        return f"one of {', '.join(self.words)}{self.hint}"

    @property
    def suggestions(self) -> Sequence[str]:
        """The words."""
        return self.words

    def accept(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        if isinstance(value, str) and self.spelled is not None:
            if (word := self.spelled(value)) is not None:
                return word
        raise Unfit(value, self.expected, self._near(value))

    def _near(self, value: Any) -> str:
        """The word that may be meant, or ""."""
        if not isinstance(value, str) or len(value) < 3:
            return ""
        asked = value[:99].lower()
        found = [word for word in self.words if word.startswith(asked)]
        found += difflib.get_close_matches(asked, self.words, n=1, cutoff=0.7)
        return found[0] if found else ""


@dataclass(frozen=True)
class Worded(Anything):
    """Something with numbers of its own, described in one word: pag:scale=3.

    Attributes:
        read: makes it of the word, or raises UsageError; its ``text`` is the word again.
        words: the names with which it begins, if it begins with one.
        metavar: its form.
    """

    read: Callable[[str], Any]
    words: tuple[str, ...] = ()
    metavar: str = "NAME[:KEY=VALUE,...]"

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        names = f"one of {', '.join(self.words)}, alone or as " if self.words else ""
        return names + self.metavar

    @property
    def suggestions(self) -> Sequence[str]:
        """The names."""
        return self.words

    def accept(self, value: Any) -> Any:
        if not isinstance(value, str):
            raise Unfit(value, self.expected)
        try:
            return self.read(value).text
        except UsageError as error:
            raise Unfit(value, f"{self.expected} ({error})") from None


@dataclass(frozen=True)
class Bits(Anything):
    """Bits of a weight, a float mode, or the name of a recipe (``store.recipes.find_recipe``)."""

    words: tuple[str, ...]

    metavar = "BITS"

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        return f"one of {', '.join(self.words)}"

    @property
    def suggestions(self) -> Sequence[str]:
        """The bits and the modes."""
        return self.words

    def accept(self, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise Unfit(value, self.expected)
        return int(value)


@dataclass(frozen=True)
class Each(Anything):
    """One value, or a list of them: one for each ControlNet, say. Repeatable on the command line.

    Attributes:
        kind: the kind of each value.
    """

    kind: Anything

    @property
    def metavar(self) -> str:
        """The placeholder of one value."""
        return self.kind.metavar

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        return self.kind.expected

    @property
    def suggestions(self) -> Sequence[str]:
        """The suggestions for one value."""
        return self.kind.suggestions

    def accept(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [self.kind.accept(one) for one in value]
        if isinstance(value, np.ndarray) and value.ndim == 1:  # several numbers, never a picture
            return [self.kind.accept(one) for one in value]
        return self.kind.accept(value)

    def parse(self, word: str) -> Any:
        return self.kind.parse(word)


class Scaled(NamedTuple):
    """A file and its scale as words give them; the scale is None where none was given."""

    path: str
    scale: float | None


@dataclass(frozen=True)
class Files(Anything):
    """Files, each with a scale or a word.

    Attributes:
        form: how one stands on the command line: PATH[:SCALE] or PATH[:WORD].
        opened: the class of a file that is open already.
    """

    form: str
    opened: type

    @property
    def expected(self) -> str:
        """The accepted values, for messages."""
        word = "a word" if "WORD" in self.form else "a scale"
        return f"a list of paths, each alone or as (path, {word.removeprefix('a ')})"

    @property
    def metavar(self) -> str:
        """The form."""
        return self.form

    def accept(self, value: Any) -> Any:
        if isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Iterable):
            raise Unfit(value, self.expected)
        files = tuple(value)
        for one in files:
            path = one[0] if isinstance(one, tuple) and len(one) == 2 else one
            if path == "" or not isinstance(path, (str, os.PathLike, self.opened)):
                raise Unfit(one, self.expected)
            no_address(path)
        return files

    def parse(self, word: str) -> Any:
        """Read one file; a path that exists is never cut. Raises: Unfit."""
        return _worded(word) if "WORD" in self.form else _scaled(word)


def _scaled(word: str) -> Scaled:
    path, colon, scale = word.rpartition(":")
    if not colon or not path or os.path.exists(os.path.expanduser(word)):
        return Scaled(word, None)
    try:
        return Scaled(path, float(Number().accept(float(scale))))
    except ValueError as error:
        if not isinstance(error, Unfit) and not os.path.exists(os.path.expanduser(path)):
            return Scaled(word, None)  # the colon is one of the path
        raise Unfit(word, f"PATH:SCALE; its scale {scale!r} is not a number") from None


def _worded(word: str) -> tuple[str, str | None]:
    path, colon, token = no_address(word).rpartition(":")
    if not colon or not path or os.path.exists(os.path.expanduser(word)):
        return os.path.expanduser(word), None
    if not token.strip():
        raise Unfit(word, "a word after the colon; there is no word")
    return os.path.expanduser(path), token


def listed(value: Any) -> list[Any]:
    """The values of an argument: none, the one, or those of a list or tuple."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def no_address(value: Any) -> Any:
    """Return a value that is no web address, and no path with a NUL. Raises: Unfit."""
    if isinstance(value, (str, os.PathLike)) and "\0" in str(value):
        raise Unfit(value, "a path")  # no system opens it
    if is_address(value):
        raise Unfit(value, "a file: download it first, and give its path")
    return value


def _shown(value: Any) -> str:
    """Write a value out on one line, shortened."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _bounds(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f", {least:g} to {most:g}"
    return f", at least {least:g}" if least is not None else ""


def _within(value: Any, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _number_of(word: str) -> Any:
    """The number that a word stands for; the word where it stands for none."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word
