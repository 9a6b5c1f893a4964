"""The record of a run: a line of JSON for each step, and a plot of the loss."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxdiff.errors import CheckpointError
from mlxdiff.machine.disk import read_document
from mlxdiff.machine.temporary import temporary_file
from mlxdiff.pictures import plot

FILE = "log.jsonl"
PLOT = "loss.png"
_MOST = 1 << 30  # bytes of a log that is read


class Log:
    """A log that grows by a line a step.

    Args:
        folder: of the run.
        step: steps that the run has done; lines of later ones, which a killed process left, go.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.path = folder, folder / FILE
        self.lines = [line for line in read(folder) if line["step"] <= step] if step else []
        with temporary_file(folder) as (temporary, file):
            file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())
            file.flush()
            os.replace(temporary, self.path)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the line of a step."""
        self.lines.append(dict(line))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def plot(self, title: str) -> Path:
        """Draw the loss of all steps, and its running mean; return the picture's path."""
        losses = [line["loss"] for line in self.lines]
        steps = [line["step"] for line in self.lines]
        lines = {
            "loss": list(zip(steps, losses, strict=True)),
            "running mean": list(zip(steps, plot.smoothed(losses), strict=True)),
        }
        path = self.folder / PLOT
        with temporary_file(self.folder) as (temporary, file):
            plot.curves(lines, title).save(file, "PNG")
            file.flush()
            os.replace(temporary, path)
        return path


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, up to the first that a killed process left unfinished."""
    found: list[dict[str, Any]] = []
    try:
        text = read_document(folder / FILE, _MOST).decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder / FILE}: cannot be read ({error.strerror})") from None
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            float(entry["loss"]), int(entry["step"])
        except (ValueError, TypeError, KeyError):
            break
        found.append(entry)
    return found
