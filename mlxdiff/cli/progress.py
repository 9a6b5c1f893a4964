"""Say what is being done: a bar on stderr for people, events on stdout for programs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlxdiff
from mlxdiff.cli import ProgressBar, streams

if TYPE_CHECKING:
    from mlxdiff.run.drawing import Step
    from mlxdiff.run.progress import Progress

EVENTS = "mlxdiff.events/1"
"""Schema of the events. Fields and events are added to it, never changed or removed."""

STAGE_WORDS = {"load": "loading {}", "encode": "encoding", "decode": "decoding"}
"""What is shown of the stages of a run (``run.progress``); the item goes into the braces."""


class Reporter:
    """Says nothing. Others say a part of it."""

    def fetching(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context that gives the callback for downloads."""
        return contextlib.nullcontext()

    @property
    def on_progress(self) -> Callable[[Progress], object] | None:
        """The callback for stages and steps; None: there is no need for it."""
        return None

    def advance(self, step: Step, index: int) -> None:
        """Say that a step is done of the picture of this index, of all pictures of the command."""

    def finish(self) -> None:
        """Make room for another line."""

    def event(self, event: str, **facts: Any) -> None:
        """Say that something has happened."""


class Bar(Reporter):
    """The stage, the steps and the time left, on one line of the terminal for each picture.

    Where stderr is no terminal: only the seed, when the first step is done.

    Args:
        pictures: of the whole command; their number is shown if there are several.
    """

    def __init__(self, pictures: int = 1) -> None:
        self._pictures = pictures
        self._left: float | None = None  # seconds
        self._is_drawing = False  # there are steps to come

    def fetching(self) -> contextlib.AbstractContextManager[Any]:
        """See ``Reporter``."""
        return ProgressBar("fetching", quiet=False)

    @property
    def on_progress(self) -> Callable[[Progress], object]:
        """See ``Reporter``."""
        return self._show_stage

    def _show_stage(self, progress: Progress) -> None:
        self._left = progress.seconds_left
        if progress.stage != "step":
            what = progress.item.replace("_", " ")
            streams.show(STAGE_WORDS.get(progress.stage, progress.stage).format(what))

    def advance(self, step: Step, index: int) -> None:
        """See ``Reporter``."""
        if step.index == 0 and not streams.is_terminal():
            streams.tell(f"seed {step.seed}")
        self._is_drawing = step.index + 1 < step.total
        head = f"seed {step.seed}"
        if self._pictures > 1:
            head = f"picture {index + 1} of {self._pictures}, {head}"
        tail = f"step {step.index + 1} of {step.total}, {step.seconds:.2f} s each"
        if self._left is not None and self._is_drawing:
            tail += f", {streams.clock(self._left)} left"
        streams.show(streams.with_bar(head, (step.index + 1) / step.total, tail))

    def finish(self) -> None:
        """See ``Reporter``. The line of a picture that is not finished stays."""
        if self._is_drawing:
            streams.keep()
        else:
            streams.clear()
        self._is_drawing = False


class Events(Reporter):
    """One JSON object a line for everything that happens (docs/embedding.md).

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def fetching(self) -> contextlib.AbstractContextManager[Any]:
        """See ``Reporter``."""
        return contextlib.nullcontext(self._fetched)

    def _fetched(self, done: int, total: int, item: str) -> None:
        self.event("progress", stage="download", item=item, done=done, total=total)

    @property
    def on_progress(self) -> Callable[[Progress], object]:
        """See ``Reporter``."""
        return lambda progress: self.event("progress", **progress.to_dict())

    def event(self, event: str, **facts: Any) -> None:
        """See ``Reporter``."""
        if event == "begin":
            facts = {"schema": EVENTS, "version": mlxdiff.__version__, **facts}
        self._say(json.dumps({"event": event, **facts}))
