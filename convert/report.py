"""Report of a conversion, tensor by tensor, as text and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ComponentReport:
    """The conversion of one component.

    Attributes:
        name: for example "unet".
        file: weight file or index, relative to the source.
        converted: number of used tensors.
        parameters: number of values in them.
        transforms: name of a layout change -> number of tensors.
        ignored: (name, reason) of each unused tensor.
        dtypes: stored type in the source -> number of tensors.
        bytes_in, bytes_out: size of the used tensors in the source and in the result.
    """

    name: str
    file: str
    converted: int
    parameters: int
    transforms: dict[str, int]
    ignored: tuple[tuple[str, str], ...]
    dtypes: dict[str, int]
    bytes_in: int
    bytes_out: int

    def lines(self) -> list[str]:
        """Return the lines of the text report."""
        lines = [
            f"{self.name}: {self.converted} tensors, {human_count(self.parameters)} parameters, "
            f"{human_bytes(self.bytes_in)} ({'/'.join(self.dtypes)}) -> "
            f"{human_bytes(self.bytes_out)}"
        ]
        return lines + _ignored_lines(self.ignored)


def _ignored_lines(ignored: tuple[tuple[str, str], ...]) -> list[str]:
    reasons = Counter(reason for _, reason in ignored)
    return [f"  {count} ignored: {reason}" for reason, count in reasons.items()]


@dataclass(frozen=True)
class Report:
    """The conversion of a model. ``str()`` is for people, ``to_dict()`` for programs.

    ``ignored`` lists (name, reason) of values in a single file that belong to no component.
    ``recipe`` is the quantization recipe, or None if not quantized.
    """

    source: str
    dest: Path
    family: str
    dtype: str
    components: tuple[ComponentReport, ...]
    notes: tuple[str, ...]
    seconds: float
    ignored: tuple[tuple[str, str], ...] = ()
    recipe: str | None = None

    @property
    def bytes_out(self) -> int:
        return sum(c.bytes_out for c in self.components)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {
            "dest": str(self.dest),
            "bytes_out": self.bytes_out,
            "components": [asdict(c) | {"ignored": _named(c.ignored)} for c in self.components],
            "ignored": _named(self.ignored),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [line for component in self.components for line in component.lines()]
        if self.ignored:
            lines += ["outside the components:", *_ignored_lines(self.ignored)]
        lines += [f"note: {note}" for note in self.notes]
        kind = self.dtype if self.recipe is None else f"{self.recipe} and {self.dtype}"
        lines.append(
            f"{self.source} ({self.family}) -> {self.dest}: {human_bytes(self.bytes_out)} in "
            f"{kind}, {self.seconds:.1f} s; every tensor is accounted for"
        )
        return "\n".join(lines)


def _named(ignored: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"name": name, "reason": reason} for name, reason in ignored]


def human_bytes(size: int) -> str:
    """Format a size in powers of ten: 1719000000 -> "1.72 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"


def human_count(count: int) -> str:
    """Format a count: 859520964 -> "860 M"."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)
