"""Improve a fitted run by the error of its end: all its numbers and timesteps at once.

`fit_sampler` fits one step after another, each as near to the fine solution as possible. It does
not see the effect of a step on later steps. Here only the end counts: Gauss-Newton with derivatives
by finite differences, over batches of pictures. The normal equations of earlier batches stay and
fade (recursive least squares), so each batch is evaluated once in a pass. Pictures with a large
error, which have turned into others, have a small weight, because no derivative shows how to turn
them back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import to_x0

try:
    from .teacher import Network, distances, solver, usual
except ImportError:  # for a script, Python puts this folder on the path
    from teacher import Network, distances, solver, usual

HISTORY = 5  # predictions of x_0 in a step
BY = 0.01  # finite differences: of a whitened number,
TIME_UNIT = 10.0  # and of a timestep, by a fiftieth; it is solved for in tens
SMALLEST = 1e-5  # share of the largest variance below which a direction stays fixed
FADE = 0.95
TURNED = 5.0  # at this multiple of the median error, a picture counts half
PRIOR = 3e-3  # weight of the initial run; it falls with the square of the number of batches
DAMPING = 0.3, 1e-5  # falling with their cube, and at least


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Some pictures: their prompts, their noise and the ends of the fine solution, (B, h, w, C)."""

    prompts: Sequence[str]
    noise: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """Timesteps, and the numbers of each step."""

    times: tuple[int, ...]
    numbers: tuple[np.ndarray, ...]


_Kept = list[tuple[np.ndarray, list[np.ndarray]]]  # x at each step, and the latest x_0 there


class Walk:
    """Runs of some pictures, from the start or from a later step."""

    def __init__(self, network: Network, pictures: Pictures, scale: float) -> None:
        self.network, self.pictures, self.scale = network, pictures, scale
        self.prediction = network.config.get("prediction_type", "epsilon")

    def end(self, run: Run, kept: _Kept | None = None) -> np.ndarray:
        """Return the end of the run, (B, h, w, C). ``kept`` is filled on the way."""
        return self._finish(run, 0, self.pictures.noise, [], kept)

    def step(self, run: Run, i: int, x: np.ndarray, x0s: list[np.ndarray]) -> np.ndarray:
        """Return the end of the run that does step i from x with these predictions."""
        row, numbers = self._rows(run)[i], run.numbers[i]
        return self._finish(run, i + 1, _stepped(row, numbers, x, x0s), x0s)

    def _finish(
        self,
        run: Run,
        begin: int,
        x: np.ndarray,
        x0s: list[np.ndarray],
        kept: _Kept | None = None,
    ) -> np.ndarray:
        rows = self._rows(run)
        for i in range(begin, len(rows)):
            of_x, of_output = map(np.float32, to_x0(self.prediction, *rows[i].level))
            output = self.network(x, run.times[i], self.pictures.prompts, self.scale)
            x0s = [of_x * x + of_output * output, *x0s][:HISTORY]
            if kept is not None:
                kept.append((x, x0s))
            x = _stepped(rows[i], run.numbers[i], x, x0s)
        return x

    def _rows(self, run: Run) -> tuple[Row, ...]:
        return solver(self.network.config, run.times).rows


def _stepped(row: Row, numbers: np.ndarray, x: np.ndarray, x0s: Sequence[np.ndarray]) -> np.ndarray:
    terms = zip(usual(row, len(numbers)) + numbers, (x, *x0s), strict=True)
    return sum(np.float32(weight) * values for weight, values in terms)


def whitened(kept: _Kept, unit: float) -> list[np.ndarray]:
    """Return each step's directions of its numbers that move x by a deviation, as columns."""
    found = []
    for x, x0s in kept:
        features = np.stack([x, *x0s]).reshape(1 + len(x0s), -1).astype(np.float64)
        products = features @ features.T / features.shape[1]
        sizes = np.sqrt(np.diagonal(products))
        variances, vectors = np.linalg.eigh(products / sizes[:, None] / sizes)
        large = variances > SMALLEST * variances[-1]
        columns = vectors[:, large] / np.sqrt(variances[large])
        found.append(unit * columns / sizes[:, None])
    return found


def refine(
    network: Network,
    run: Sequence[Any],
    batches: Sequence[Pictures],
    scale: float,
) -> list[Any]:
    """Return the improved run.

    Args:
        network: see `teacher.Network`.
        run: [[timestep, numbers], ...], in the form of the file.
        batches: pictures, in the order of learning. A batch can occur again.
        scale: guidance scale.
    Returns: a run in the form of ``run``.
    """
    start = _read(run)
    unit = float(np.concatenate([batch.ends for batch in batches]).std())
    kept: _Kept = []
    Walk(network, batches[0], scale).end(start, kept)
    learned = _Learned(start, whitened(kept, unit))
    for batch in batches:
        learned.learn(Walk(network, batch, scale), unit)
    return [
        [time, [float(f"{value:.6g}") for value in values]]
        for time, values in zip(learned.run.times, learned.run.numbers, strict=True)
    ]


def missed(network: Network, run: Sequence[Any], pictures: Pictures, scale: float) -> np.ndarray:
    """Return the error of each picture's end, (B,), in standard deviations of the latents."""
    return distances(Walk(network, pictures, scale).end(_read(run)), pictures.ends)


def _read(run: Sequence[Any]) -> Run:
    """Read the form of the file, with a number for each x_0 of the history."""
    wide = [min(1 + HISTORY, 2 + i) for i in range(len(run))]
    return Run(
        tuple(time for time, _ in run),
        tuple(
            np.pad(np.array(numbers, float), (0, width - len(numbers)))
            for width, (_, numbers) in zip(wide, run, strict=True)
        ),
    )


class _Learned:
    """The current run, and the normal equations that it comes from.

    Args:
        start: the initial run.
        directions: result of `whitened`. The unknowns are the movement of each step's numbers along
            these directions, and all timesteps except the first.
    """

    def __init__(self, start: Run, directions: Sequence[np.ndarray]) -> None:
        self.start, self.directions, self.run = start, directions, start
        self.split = np.cumsum([part.shape[1] for part in directions])
        self.prior = self.now = np.append(
            np.zeros(self.split[-1]), np.array(start.times[1:]) / TIME_UNIT
        )
        self.matrix = np.zeros((len(self.now), len(self.now)))
        self.right = np.zeros(len(self.now))
        self.batches = 0

    def learn(self, walk: Walk, unit: float) -> None:
        """Add a batch to the normal equations."""
        kept: _Kept = []
        end = walk.end(self.run, kept)
        slopes = np.stack(self._slopes(walk, end, kept))
        rest = walk.pictures.ends - end
        each = np.sqrt((rest**2).mean((1, 2, 3)))
        weight = (1.0 / (1.0 + (each / (TURNED * np.median(each))) ** 2)).astype(np.float32)
        per_value = np.broadcast_to(weight[:, None, None, None], rest.shape).reshape(-1)
        flat = slopes.reshape(len(slopes), -1)
        weighted = flat * (per_value / (per_value.sum() * unit**2))
        matrix = (weighted @ flat.T).astype(np.float64)
        right = (weighted @ rest.reshape(-1)).astype(np.float64) + matrix @ self.now
        fade = min(FADE, self.batches / (self.batches + 1))
        self.matrix = fade * self.matrix + (1.0 - fade) * matrix
        self.right = fade * self.right + (1.0 - fade) * right
        self.batches += 1
        self._solve()

    def _slopes(self, walk: Walk, end: np.ndarray, kept: _Kept) -> list[np.ndarray]:
        """Return the derivative of the end by each unknown."""
        run, of_numbers, of_times = self.run, [], []
        for i, (x, x0s) in enumerate(kept):
            for direction in self.directions[i].T:
                numbers = list(run.numbers)
                numbers[i] = numbers[i] + BY * direction
                moved = dataclasses.replace(run, numbers=tuple(numbers))
                of_numbers.append((walk.step(moved, i, x, x0s) - end) / BY)
        for i in range(1, len(kept)):
            times = list(run.times)
            times[i] = _beside(run.times, i)
            moved = dataclasses.replace(run, times=tuple(times))
            change = (times[i] - run.times[i]) / TIME_UNIT
            of_times.append((walk.step(moved, i - 1, *kept[i - 1]) - end) / change)
        return [*of_numbers, *of_times]

    def _solve(self) -> None:
        """Solve the normal equations: first whole timesteps, then the numbers."""
        scale = np.diagonal(self.matrix) + 1e-3
        most, least = DAMPING
        damping = max(most / self.batches**3, least) * scale
        prior = PRIOR / self.batches**2 * scale
        matrix = self.matrix + np.diag(prior + damping)
        right = self.right + prior * self.prior + damping * self.now
        free = self.split[-1]
        times = _whole(np.linalg.solve(matrix, right)[free:] * TIME_UNIT, self.run.times)
        fixed = np.array(times[1:]) / TIME_UNIT
        along = np.linalg.solve(matrix[:free, :free], right[:free] - matrix[:free, free:] @ fixed)
        self.now = np.append(along, fixed)
        steps = zip(
            self.start.numbers, self.directions, np.split(along, self.split[:-1]), strict=True
        )
        self.run = Run(times, tuple(before + part @ much for before, part, much in steps))


def _beside(times: Sequence[int], i: int) -> int:
    """Return a timestep near the i-th one that keeps the order."""
    by = max(1, round(0.02 * times[i]))
    below = times[i + 1] if i + 1 < len(times) else -1
    return times[i] - by if times[i] - by > below else times[i] + by


def _whole(times: np.ndarray, before: tuple[int, ...]) -> tuple[int, ...]:
    """Return falling whole timesteps that start with the first old one, or else the old ones."""
    found = [round(float(time)) for time in times]
    for i in range(len(found) - 2, -1, -1):
        found[i] = max(found[i], found[i + 1] + 1)
    falls = not found or (before[0] > found[0] and found[-1] >= 0)
    return (before[0], *found) if falls else before
