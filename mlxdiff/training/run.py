"""From an opened session to a finished run: what every command does after its own preparation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxdiff.pipeline import Pipeline
from mlxdiff.training.data import Data
from mlxdiff.training.loop import Objective, Report, Task
from mlxdiff.training.plan import Plan
from mlxdiff.training.process import Process
from mlxdiff.training.session import Encoding, Progress, Session


@dataclass(frozen=True)
class Done:
    """What came of a command.

    Attributes:
        plan: what was expected.
        report: of the run; None after a dry run.
    """

    plan: Plan
    report: Report | None

    def lines(self) -> list[str]:
        """Return it in words."""
        if self.report is None:
            return self.plan.lines()
        files = [str(file) for file in self.report.files]
        return [*files, f"{self.report.steps} steps, loss {self.report.loss:.4f}"]


Say = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


def run(
    opened: Session,
    data: Data,
    process: Process,
    expected: Plan,
    task: Callable[[], Task],
    *,
    open_result: Callable[[list[Path]], Pipeline],
    say: Say,
    objective: Callable[[Any], Objective] | None = None,
    drawing: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Done:
    """Tell the notes, encode the pictures, train.

    Args:
        expected: what it will take. After a dry run that is all.
        task: makes what is trained, when all is encoded.
        open_result: opens a pipeline with written results, for validation pictures.
        say: shows a line.
        objective: makes what training makes small, of the task; None: the usual one.
        drawing: how validation pictures are drawn, where not as usual.
        facts: for the metadata of the result, beside what every run has there.
    """
    for note in data.notes:
        say(f"Note: {note}")
    if opened.options.dry_run:
        return Done(expected, None)
    again = ", blocks computed again for their gradient (less memory)"
    steps = f"{data.size} pictures, {opened.options.steps} steps"
    say(steps + (again if expected.checkpointing else ""))
    data.prepare(Encoding(say))
    if opened.pipe is not None:
        opened.pipe.model.cache.release_all()
    trained = task()
    report = opened.train(
        trained,
        data,
        process,
        facts=opened.facts(data, **facts),
        open_result=open_result,
        progress=Progress(opened.options.steps, say),
        objective=None if objective is None else objective(trained),
        drawing=drawing,
    )
    return Done(expected, report)
