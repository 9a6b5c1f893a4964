"""Say what is being done: a bar on stderr for people, events on stdout for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

import mlxdiff
from mlxdiff.cli import ProgressBar

if TYPE_CHECKING:
    from mlxdiff.run.drawing import Step
    from mlxdiff.run.progress import Progress

EVENTS = "mlxdiff.events/1"
"""Schema of the events. Fields and events are added to it, never changed or removed."""


class Reporter:
    """Says nothing. Others say a part of it."""

    def fetching(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context that gives the callback for downloads."""
        return contextlib.nullcontext()

    @property
    def on_progress(self) -> Callable[[Progress], object] | None:
        """The callback for stages and steps; None: there is no need for it."""
        return None

    def advance(self, step: Step) -> None:
        """Say that a step is done."""

    def finish(self) -> None:
        """Make room for another line."""

    def event(self, event: str, **facts: Any) -> None:
        """Say that something has happened."""


class Bar(Reporter):
    """A progress bar on stderr for each picture; nothing where stderr is gone."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._is_lost = False

    def fetching(self) -> contextlib.AbstractContextManager[Any]:
        """See ``Reporter``."""
        return ProgressBar("fetching", quiet=False)

    def advance(self, step: Step) -> None:
        """See ``Reporter``."""
        if self._is_lost:
            return
        try:
            if self._bar is None or step.index == 0:
                self.finish()
                self._bar = click.progressbar(
                    length=step.total,
                    label=f"seed {step.seed}",
                    item_show_func=lambda s: f"{s:.2f} s/step" if s is not None else None,
                    file=sys.stderr,
                )
            self._bar.update(1, step.seconds)
            if step.index + 1 == step.total:
                self.finish()  # what comes next may print a line: the decoder is read
        except (OSError, ValueError):
            self._is_lost, self._bar = True, None

    def finish(self) -> None:
        """See ``Reporter``."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.render_finish()


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
