"""Parse the prompt syntax of AUTOMATIC1111's web UI, before the text is tokenized.

    (word) (word:1.3) [word]      weights 1.1, 1.3 and 1/1.1; nested weights multiply
    \\( \\) \\[ \\] \\\\                literal characters
    BREAK                         start a new chunk of 75 tokens
    [from:to:when] [to:when] [from::when]   prompt editing: change the text after a step
    [a|b]                         alternation: change the text at every step
    <lora:name:0.8>               apply a LoRA at a strength; the tag is removed from the text

Source: stable-diffusion-webui, modules/prompt_parser.py (our tests include its doc tests) and
modules/extra_networks.py. Two differences: the web UI turns ``BREAK`` inside brackets into a word
of negative weight, here it starts a new chunk; the web UI drops unknown tags, here they are errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mlxdiff.errors import UsageError, argument, quoted
from mlxdiff.tokenizer import check_length

UP, DOWN = 1.1, 1 / 1.1

MAX_DEPTH = 100
"""Deepest nesting of brackets in prompt editing."""


class Piece(NamedTuple):
    """A piece of text with one weight; a text of None marks the end of a chunk."""

    text: str | None
    weight: float = 1.0


class Network(NamedTuple):
    """A parsed ``<lora:name:0.8>`` tag: strengths for the U-Net and for the text encoders."""

    name: str
    unet: float
    text_encoder: float


# ------------------------------------------------------------------------------------------ weights

_SIGN = re.compile(
    r"""
    \\(?P<escaped>[\\()\[\]]?)
    | (?P<open>[(\[])
    | :\s*(?P<weight>[+-]?[.\d]+)\s*\)
    | (?P<close>[)\]])
    | [^\\()\[\]:]+
    | :
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")


def weigh(text: str) -> list[Piece]:
    """Split a prompt into pieces, in order; merge neighbours of equal weight.

    Raises: UsageError if a weight is not a number, or the prompt is too long.
    """
    check_length(text)
    texts: list[str | None] = []
    factors: list[tuple[int, int, float]] = []  # first piece, end, factor; inner brackets first
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        factors.append((start, len(texts), factor))

    for match in _SIGN.finditer(text):
        sign = match[0]
        if match["escaped"] is not None:
            texts.append(match["escaped"])
        elif match["open"]:
            opened[sign].append(len(texts))
        elif match["weight"] and opened["("]:
            multiply(opened["("].pop(), _number(match["weight"], sign))
        elif sign == ")" and opened["("]:
            multiply(opened["("].pop(), UP)
        elif sign == "]" and opened["["]:
            multiply(opened["["].pop(), DOWN)
        else:
            parts = _BREAK.split(sign)
            for i, part in enumerate(parts):
                part = part.lstrip() if i > 0 else part
                part = part.rstrip() if i + 1 < len(parts) else part
                texts += [*[None] * (i > 0), part]
    # An unclosed bracket extends to the end.
    for sign, factor in (("(", UP), ("[", DOWN)):
        for start in opened[sign]:
            multiply(start, factor)
    weights = np.ones(len(texts))
    with np.errstate(over="ignore", under="ignore"):
        for start, end, factor in factors:
            weights[start:end] *= factor
    if not np.isfinite(weights).all():
        raise UsageError("the weights of nested brackets multiply to infinity; use fewer brackets")
    return _merged(texts, weights.tolist()) or [Piece("")]


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"the weight in {quoted(where)} is not a number; write (word:1.2)")
    return value


def _merged(texts: list[str | None], weights: list[float]) -> list[Piece]:
    merged: list[Piece] = []
    run: list[str] = []  # texts of equal weight, not in ``merged`` yet

    def end_run(weight: float) -> None:
        if run:
            merged.append(Piece("".join(run), weight))
            run.clear()

    last = 1.0
    for text, weight in zip(texts, weights, strict=True):
        if text is None or weight != last:
            end_run(last)
        if text is None:
            merged.append(Piece(None, weight))
        else:
            run.append(text)
        last = weight
    end_run(last)
    return merged


# ------------------------------------------------------------------- prompt editing and alternation


class _Edit(NamedTuple):
    """``[before:after:when]``; each part is a tree: a list of texts, edits and alternations."""

    before: list[object]
    after: list[object]
    when: int


class _Alternation(NamedTuple):
    """``[a|b|...]``: the options take turns, one per step."""

    options: list[list[object]]


_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*\]")
_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+", re.DOTALL)


class _NoMatch(Exception):
    """Raised when a parse attempt fails; the caller backtracks."""


def edits(text: str, steps: int) -> list[tuple[int, str]]:
    """List the texts that a prompt becomes during a run.

    Args:
        text: the prompt.
        steps: number of steps in the run; a ``when`` with a decimal point is a fraction of it.
    Returns: (last, text) in order; each text applies up to and including step ``last``, from 0.
    Raises: UsageError if the prompt is too long, or its brackets are nested too deep.
    """
    check_length(text)
    try:
        tree = _Parser(text, steps).whole()
    except _NoMatch:  # as in the web UI: a stray bar, for example, makes the whole prompt plain
        return [(steps, text)]
    ends = sorted({steps, *_ends(tree, steps)})
    return [(end, "".join(_at(tree, end))) for end in ends]


class _Parser:
    """Parse one prompt by recursive descent; convert each ``when`` to a step number."""

    def __init__(self, text: str, steps: int) -> None:
        self.text, self.steps, self.place = text, steps, 0
        self.depth = 0
        self.failed: set[int] = set()  # places where no bracket matches: each is tried once

    def whole(self) -> list[object]:
        """Parse the whole prompt; treat unmatched brackets and colons as plain text."""
        tree = self.prompt()
        while self.place < len(self.text):
            sign = self.text[self.place]
            if sign not in "[]():":
                raise _NoMatch
            self.place += 1
            tree.append(sign)
            tree += self.prompt()
        return tree

    def prompt(self) -> list[object]:
        """Parse consecutive parts until none matches."""
        tree: list[object] = []
        while True:
            if match := _PLAIN.match(self.text, self.place):
                tree.append(match[0])
                self.place = match.end()
                continue
            start = self.place
            if start in self.failed:
                return tree
            if self.depth == MAX_DEPTH:
                raise UsageError(f"the prompt has more than {MAX_DEPTH} nested brackets; use fewer")
            self.depth += 1
            try:
                tree += self.bracketed()
            except _NoMatch:
                self.place = start
                self.failed.add(start)
                return tree
            finally:
                self.depth -= 1

    def bracketed(self) -> list[object]:
        """Parse ``(...)``, ``(...:...)``, ``[...]``, an edit or an alternation."""
        opening = self.text[self.place : self.place + 1]
        if opening not in ("(", "["):
            raise _NoMatch
        self.place += 1
        parts, separators = [self.prompt()], ""
        while (sign := self.text[self.place : self.place + 1]) in (":", "|") and sign:
            if opening == "[" and sign == ":" and "|" not in separators:
                number = _NUMBER.match(self.text, self.place + 1)
                if number is not None:
                    self.place = number.end()
                    return [self._edit(parts, number[1])]
            self.place += 1
            separators += sign
            parts.append(self.prompt())
        self.place += 1
        if opening == "(" and sign == ")" and separators in ("", ":"):
            return ["(", *(parts[0] if not separators else [*parts[0], ":", *parts[1]]), ")"]
        if opening == "[" and sign == "]" and not separators:
            return ["[", *parts[0], "]"]
        if opening == "[" and sign == "]" and set(separators) == {"|"}:
            return [_Alternation(parts)]
        raise _NoMatch

    def _edit(self, parts: list[list[object]], number: str) -> _Edit:
        if len(parts) > 2:
            raise _NoMatch
        when = float(number) * (self.steps if "." in number else 1)
        end = min(self.steps, int(when)) if math.isfinite(when) else self.steps
        return _Edit(parts[0] if len(parts) == 2 else [], parts[-1], end)


def _ends(tree: list[object], steps: int) -> Iterator[int]:
    """Yield the last step before each change."""
    for part in tree:
        if isinstance(part, _Edit):
            if part.when >= 1:
                yield part.when
            yield from _ends([*part.before, *part.after], steps)
        elif isinstance(part, _Alternation):
            yield from range(1, steps + 1)
            for option in part.options:
                yield from _ends(option, steps)


def _at(tree: list[object], step: int) -> Iterator[str]:
    """Yield the texts of a tree at a step."""
    for part in tree:
        if isinstance(part, _Edit):
            yield from _at(part.before if step <= part.when else part.after, step)
        elif isinstance(part, _Alternation):
            yield from _at(part.options[(step - 1) % len(part.options)], step)
        else:
            yield str(part)


# -------------------------------------------------------------------------------------- other marks

_NETWORK = re.compile(r"<(\w+):([^>]+)>")
_COMPOSED = re.compile(r"\bAND\b")
_WEIGHTED = re.compile(r"((?:\s|.)*?)(?:\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+)))?\s*")


def networks(text: str) -> tuple[str, list[Network]]:
    """Remove the ``<lora:...>`` tags from a prompt; return the text and the tags.

    Raises: UsageError for another kind of network, or if a strength is not a number.
    """
    found = []
    end = text.rfind(">") + 1  # beyond it each "<" would be followed to the end of the text
    for match in _NETWORK.finditer(text, 0, end):
        kind, (name, *arguments) = match[1], match[2].split(":")
        if kind not in ("lora", "lyco"):
            raise UsageError(
                f"the prompt has {quoted(match[0])}, an extra network of kind {quoted(kind)}; "
                "only <lora:name:strength> is supported; remove the tag"
            )
        given = dict(a.partition("=")[::2] for a in arguments if "=" in a)
        plain = [a for a in arguments if "=" not in a]
        if unknown := [*(set(given) - {"te", "unet"}), *plain[2:]]:
            raise UsageError(
                f"the prompt has {quoted(match[0])}: unknown argument {', '.join(unknown)}; write "
                "<lora:name:strength> or <lora:name:te=0.5:unet=1>"
            )
        text_encoder = _strength(given.get("te", plain[0] if plain else "1"), match[0])
        default = plain[1] if len(plain) > 1 else str(text_encoder)
        found.append(Network(name, _strength(given.get("unet", default), match[0]), text_encoder))
    return _NETWORK.sub("", text[:end]) + text[end:], found


def _strength(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(
            f"the prompt has {quoted(where)}: {quoted(text)} is not a number; write <lora:name:0.8>"
        )
    return value


def composition(text: str) -> list[tuple[str, float]]:
    """Return the prompts that ``AND`` joins, each with its weight: ``a cat AND a dog :1.2``.

    Raises: UsageError if all weights together are 0.
    """
    found = []
    for part in _COMPOSED.split(text):
        prompt, weight = _WEIGHTED.fullmatch(part).groups()  # type: ignore[union-attr]
        found.append((prompt.strip(), 1.0 if weight is None else float(weight)))
    if len(found) > 1 and sum(weight for _, weight in found) == 0.0:
        raise UsageError("the weights of the prompts that AND joins add up to 0; change one")
    return found if len(found) > 1 else [(text, 1.0)]


def refuse_composition(text: str) -> None:
    """Raise UsageError if a text that cannot be composed joins several prompts with ``AND``."""
    if _COMPOSED.search(text):
        raise UsageError(
            "AND in capitals composes prompts in A1111's syntax, and only in the prompt itself; "
            "write 'and' here, or use the plain syntax "
            f"({argument('prompt_syntax', 'plain')})"
        )
