"""When the deep features of an earlier evaluation are near enough to be used again.

The error is measured, not assumed. Each whole evaluation but the first also runs the last layer on
the features of the whole one before: the difference of the two outputs is the error that reuse
would have had there. It grows with the distance in timesteps, about evenly over a short way. So the
evaluations that follow use old features as long as the rate of the last measurement, times their
distance from the last whole evaluation, stays within the error that the user allows.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Reuse:
    """The decisions for one picture.

    Attributes:
        allowed: the largest error of an output, relative to its root mean square.
        rate: error for each timestep of distance, as last measured; None: not measured yet.
        whole: timestep of the last whole evaluation; None: there was none.
        skipped: evaluations that used old features.
        errors: all errors that were measured.
    """

    allowed: float
    rate: float | None = None
    whole: float | None = None
    skipped: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def skips(self, index: int, t: float) -> bool:
        """Decide about an evaluation; True: old features are near enough.

        Args:
            index: its number, from 0.
            t: its timestep.
        """
        if self.whole is None or self.rate is None:
            return False
        if self.rate * abs(t - self.whole) > self.allowed:
            return False
        self.skipped.append(index)
        return True

    def measure(self, t: float, error: float | None) -> None:
        """Take note of a whole evaluation.

        Args:
            t: its timestep.
            error: of its output on the features of the whole one before; None: there are none.
        """
        if error is not None and self.whole is not None and t != self.whole:
            self.rate = error / abs(t - self.whole)
            self.errors.append(error)
        self.whole = t

    def said(self, total: int) -> str:
        """What was skipped, in words."""
        which = ", ".join(str(index + 1) for index in self.skipped) or "none"
        largest = max(self.errors, default=0.0)
        return (
            f"feature reuse: {len(self.skipped)} of {total} evaluations used old features "
            f"({which}); the largest error measured is {largest:.3f} of {self.allowed:g} allowed"
        )
