"""Reader of the plain part of YAML in which configs of the LDM code are written.

It reads nested mappings and lists in block form, lists of scalars in brackets, scalars, quotes and
comments. Anything else of YAML (anchors, tags, block scalars, mappings in braces, several
documents) is an error that names the line: a config is read whole or not at all. Nothing is ever
executed, and the cost is linear in the length of the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 1_000_000
"""A longer text is no config."""
MAX_DEPTH = 32

_KEY = re.compile(r"""(?P<key>"[^"]*"|'[^']*'|[^\s"'#\[\]{},&*!|>%@`:?-][^:#]*):(?:\s|$)""")
_COMMENT = re.compile(r"(?:^|\s)#")
_INTEGER = re.compile(r"[-+]?\d{1,18}")
_FLOAT = re.compile(r"[-+]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:[eE][-+]?\d{1,4})?")
_WORDS = {
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "on", "On"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "off", "Off"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
}


class NotPlain(ValueError):
    """A text that is not plain YAML. The message names the line."""


@dataclass(frozen=True)
class _Line:
    """One line with content: its number from 1, its indentation, its text without comment."""

    number: int
    indent: int
    text: str

    def fault(self, what: str) -> NotPlain:
        return NotPlain(f"line {self.number} {what}")


def parse(text: str) -> Any:
    """Return the value of a text: dicts, lists, str, int, float, bool and None.

    Raises: NotPlain.
    """
    if len(text) > MAX_BYTES:
        raise NotPlain(f"it has {len(text)} characters; a config has at most {MAX_BYTES}")
    lines = [line for line in map(_line, *_numbered(text)) if line.text]
    if lines and lines[0].text == "---":
        lines.pop(0)
    if not lines:
        return None
    value, rest = _block(lines, 0, lines[0].indent, 0)
    if rest < len(lines):
        raise lines[rest].fault("is indented differently")
    return value


def _numbered(text: str) -> tuple[range, list[str]]:
    raw = text.removeprefix("\ufeff").split("\n")
    return range(1, len(raw) + 1), raw


def _line(number: int, raw: str) -> _Line:
    body = raw.rstrip("\r").lstrip(" ")
    line = _Line(number, len(raw.rstrip("\r")) - len(body), _without_comment(body).strip())
    if body.startswith("\t") and line.text:
        raise line.fault("is indented by a tab")
    return line


def _without_comment(body: str) -> str:
    """Cut a comment off; a # inside quotes is none."""
    if '"' not in body and "'" not in body:
        found = _COMMENT.search(body)
        return body[: found.start()] if found else body
    quote = ""
    for i, char in enumerate(body):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char == "#" and (i == 0 or body[i - 1].isspace()):
            return body[:i]
    return body


def _is_item(line: _Line) -> bool:
    return line.text == "-" or line.text.startswith("- ")


def _block(lines: list[_Line], start: int, indent: int, depth: int) -> tuple[Any, int]:
    """Read the block of this indentation from a line on. Return its value and the next line."""
    if depth > MAX_DEPTH:
        raise lines[start].fault("is nested too deeply")
    if _is_item(lines[start]):
        return _list(lines, start, indent, depth)
    return _mapping(lines, start, indent, depth)


def _list(lines: list[_Line], start: int, indent: int, depth: int) -> tuple[list[Any], int]:
    items, i = [], start
    while i < len(lines) and lines[i].indent == indent and _is_item(lines[i]):
        line = lines[i]
        inner = line.text[1:].lstrip()
        if not inner:
            value, i = _value_below(lines, i, indent, depth)
        elif _KEY.match(inner) or inner.startswith("- "):
            # The item is a block that begins on this line.
            at = line.indent + len(line.text) - len(inner)
            lines[i] = _Line(line.number, at, inner)
            value, i = _block(lines, i, at, depth + 1)
        else:
            value, i = _scalar(line, inner), i + 1
        items.append(value)
    return items, i


def _mapping(lines: list[_Line], start: int, indent: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    i = start
    while i < len(lines) and lines[i].indent == indent and not _is_item(lines[i]):
        line = lines[i]
        match = _KEY.match(line.text)
        if match is None:
            raise line.fault(f"is not plain YAML: {line.text[:40]!r}")
        key = match["key"].strip().strip("\"'")
        if key in found:
            raise line.fault(f"gives {key} a second time")
        rest = line.text[match.end() :].strip()
        if rest:
            found[key], i = _scalar(line, rest), i + 1
        else:
            found[key], i = _value_below(lines, i, indent, depth, lists_here=True)
    return found, i


def _value_below(
    lines: list[_Line], at: int, indent: int, depth: int, lists_here: bool = False
) -> tuple[Any, int]:
    """Return the block below a line that ends in a key or a dash; None if there is none.

    Args:
        lists_here: a list may have the indentation of its key.
    """
    below = at + 1
    if below == len(lines):
        return None, below
    deeper = lines[below].indent > indent
    if deeper or (lists_here and lines[below].indent == indent and _is_item(lines[below])):
        return _block(lines, below, lines[below].indent, depth + 1)
    return None, below


def _scalar(line: _Line, text: str) -> Any:
    """Read a scalar, or a list of scalars in brackets."""
    if text.startswith("["):
        if not text.endswith("]") or any(char in text[1:-1] for char in "[]{}\"'"):
            raise line.fault("is not plain YAML: a list of plain values in one line is expected")
        inner = text[1:-1].strip().removesuffix(",")
        return [_scalar(line, one.strip()) for one in inner.split(",")] if inner else []
    if text[:1] in ("'", '"'):
        if len(text) < 2 or text[-1] != text[0] or text[0] in text[1:-1] or "\\" in text:
            raise line.fault("is not plain YAML: a text in plain quotes is expected")
        return text[1:-1]
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in "{&*!|>%@`":
        raise line.fault(f"is not plain YAML: {text[:40]!r}")
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
