"""Watch a run and stop it: stages, steps, seconds left; a token that cancels."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mlxdiff.errors import Cancelled

STAGES = ("download", "load", "encode", "step", "decode")
"""Stages in their usual order. Stages repeat: each picture is decoded, each network loaded."""

_TIMED = 8  # steps that tell how long the next ones take


@dataclass(frozen=True)
class Progress:
    """What is being done now.

    Attributes:
        stage: one of ``STAGES``.
        item: the file that is fetched, or the network that is loaded; "" elsewhere.
        done, total: bytes, while files are fetched.
        picture: index of the picture, from 0.
        pictures: number of pictures of the run; 0 before there is a run.
        step: finished steps of the picture.
        steps: steps of each picture.
        seconds_left: expected to the end of the run; None: unknown.
    """

    stage: str
    item: str = ""
    done: int = 0
    total: int = 0
    picture: int = 0
    pictures: int = 0
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


OnProgress = Callable[[Progress], object]


class Cancel:
    """Stops what it was given to. Any thread may call ``cancel``.

    cancel = mlxdiff.Cancel()
    threading.Timer(60, cancel.cancel).start()
    pipe.generate("a lighthouse", cancel=cancel)  # raises mlxdiff.Cancelled after a minute
    """

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Stop after the step, the stage or the piece of a file that is being worked on."""
        self._event.set()

    @property
    def is_cancelled(self) -> bool:
        """Return True once ``cancel`` was called."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise Cancelled once ``cancel`` was called."""
        if self.is_cancelled:
            raise Cancelled("it was cancelled")


class Watch:
    """Tells a caller of the progress of a run, and stops the run for it.

    Args:
        pictures, steps: of the run.
        on_progress: called with each Progress; None: nobody is told.
        cancel: stops the run; None: nothing does.
    """

    def __init__(
        self,
        pictures: int,
        steps: int,
        on_progress: OnProgress | None = None,
        cancel: Cancel | None = None,
    ) -> None:
        self.pictures, self.steps = pictures, steps
        self.picture = self.step = 0
        self._tell, self._cancel = on_progress, cancel
        self._seconds: deque[float] = deque(maxlen=_TIMED)

    def check(self) -> None:
        """Raise Cancelled if the run is to stop."""
        if self._cancel is not None:
            self._cancel.check()

    def begin(self, picture: int) -> None:
        """Begin a picture."""
        self.picture, self.step = picture, 0

    def advance(self, seconds: float) -> None:
        """Count a finished step."""
        self.step += 1
        self._seconds.append(seconds)
        self.tell("step")

    def tell(self, stage: str, item: str = "") -> None:
        """Tell the caller of a stage."""
        if self._tell is not None:
            self._tell(
                Progress(
                    stage,
                    item,
                    picture=self.picture,
                    pictures=self.pictures,
                    step=self.step,
                    steps=self.steps,
                    seconds_left=self._seconds_left,
                )
            )

    @property
    def _seconds_left(self) -> float | None:
        if not self._seconds:
            return None
        later = self.pictures - self.picture - 1
        steps = self.steps - self.step + later * self.steps
        return steps * sum(self._seconds) / len(self._seconds)


def downloads(
    progress: Callable[..., None] | None,
    on_progress: OnProgress | None,
    cancel: Cancel | None,
) -> Callable[..., None] | None:
    """Join what watches a download: a callback of bytes, one of Progress, a token that cancels."""
    if on_progress is None and cancel is None:
        return progress

    def tell(done: int, total: int, item: str) -> None:
        if cancel is not None:
            cancel.check()
        if progress is not None:
            progress(done, total, item)
        if on_progress is not None:
            on_progress(Progress("download", item, done, total))

    return tell
