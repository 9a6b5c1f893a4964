"""Fit the sampler `fitted` to a model: the timesteps and numbers that need the fewest steps.

    python fit_sampler.py MODEL                 # the built-in model's prompts
    python fit_sampler.py MODEL --prompts FILE  # another model: one prompt a line

MODEL is a diffusers folder or a converted one (of the built-in model: mlxdiff/builtin). The numbers
go into its scheduler/scheduler_config.json. mlxdiff reads them there, and diffusers skips them. The
same call gives the same numbers. For each guidance scale:

1. Compute a fine solution of the probability-flow ODE for some prompts and seeds, with the
predicted x_0 at each of its levels.
2. Choose timesteps among its levels. A step from x_i to x_k uses the x_0 at i and at the level p
before. Over all pictures it has a least-squares error that depends only on (p, i, k). Dynamic
programming finds the sequence with the smallest sum. This needs no calls of the network. The right
weight of errors near pure noise varies: they fade, or they grow and turn a picture into another
one. So several weights are tried.
3. Fit the numbers along the solver's own run, step after step. Each step lands as near as possible
to the fine solution, from the point that the earlier steps have reached. If the pictures do not
decide a number, it stays that of DPM-Solver++ 2M (ridge regression towards it).
4. Take the sequence whose run ends nearest to the fine solution. Then move its levels one at a time
while this brings the end nearer. The measure is the mean over the pictures, not the mean square,
because a picture that turned into another one has little to do with the rest.
5. Improve short runs without guidance as a whole, by the ends of many more pictures (`refine.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.samplers.fitted import KEY
from mlxdiff.samplers.plan import Row
from mlxdiff.samplers.scheduler import to_x0

try:
    from . import data
    from .refine import Pictures, missed, refine
    from .teacher import (
        LEVELS,
        PARTS,
        Network,
        cached,
        distances,
        fine_solution,
        solver,
        usual,
    )
except ImportError:  # for a script, Python puts this folder on the path
    import data
    from refine import Pictures, missed, refine
    from teacher import (
        LEVELS,
        PARTS,
        Network,
        cached,
        distances,
        fine_solution,
        solver,
        usual,
    )

COUNTS = (4, 5, 6, 7, 8, 10, 12, 15, 20, 25)
GUIDANCE = (1.0, 4.0, 7.5)
FIRST_SEED = 10_000  # far from the seeds of a benchmark
EARLY = 0.05, 0.5, 1.5, 4.0  # the square of an error at pure noise counts so much of one at the end
STRIDES = 2, 1  # largest move of a level, in levels,
MOVED = 12  # in runs of up to this many steps; longer runs gain nothing
REFINED = 8  # up to this many steps; with guidance it gains nothing (docs/samplers.md)
REFINED_WITH = 32  # pictures at a time
PASSES = 2  # over all of them
RANGE_PICTURES = 12  # of the pictures, for a range of scales
HISTORY = 3  # predictions of x_0 in a step
RIDGE = 1e-5


def step_errors(x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """Return mean square errors of the best step from level i to k with x_0 of i and p: [p, i, k].

    The first step has no p. It is at [0, 0, k].
    """
    levels = len(x0)
    vectors = np.concatenate([x, x0]).reshape(len(x) + levels, -1)
    products = (vectors @ vectors.T).astype(np.float64) / vectors.shape[1]

    def error(features: np.ndarray, target: np.ndarray) -> np.ndarray:
        right = products[features, target[..., None]]
        solved = _solve(products[features[..., :, None], features[..., None, :]], right)
        return np.maximum(products[target, target] - (solved * right).sum(-1), 0.0)

    errors = np.full((levels, levels, levels + 1), np.inf)
    ends = np.arange(1, levels + 1)
    errors[0, 0, 1:] = error(np.stack([0 * ends, 0 * ends + len(x)], -1), ends)
    for i in range(1, levels):
        p, k = np.meshgrid(np.arange(i), np.arange(i + 1, levels + 1), indexing="ij")
        errors[:i, i, i + 1 :] = error(np.stack([0 * p + i, 0 * p + len(x) + i, len(x) + p], -1), k)
    return errors


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve a ridge regression from its normal equations, with each variable in its own unit."""
    unit = np.sqrt(np.maximum(np.diagonal(matrix, axis1=-2, axis2=-1), 1e-30))
    scaled = matrix / unit[..., :, None] / unit[..., None, :] + RIDGE * np.eye(matrix.shape[-1])
    return np.linalg.solve(scaled, (right / unit)[..., None])[..., 0] / unit


def choose_levels(errors: np.ndarray, steps: int, early: float) -> tuple[int, ...]:
    """Return the `steps` levels, starting with the first, with the least total error."""
    count = len(errors)
    weight = 1.0 + (early - 1.0) * np.array([*LEVELS, 0]) / LEVELS[0]
    costs = errors * weight
    best = np.full((count, count), np.inf)  # of a run that reached level i from p
    best[0, 1:] = costs[0, 0, 1:count]
    came: list[np.ndarray] = []
    for _ in range(steps - 2):
        total = best[:, :, None] + costs[:, :, :count]
        came.append(total.argmin(0))
        best = total.min(0)
    p, i = np.unravel_index((best + costs[:, :, count]).argmin(), best.shape)
    path = [int(i), int(p)]
    for before in reversed(came):
        path.append(int(before[path[-1], path[-2]]))
    return tuple(path[::-1])


class Runs:
    """Runs over levels. Each step is fitted from the end of the steps before it.

    Runs with the same beginning share it.

    Args:
        network: see `Network`.
        x: the fine solution at LEVELS and at the end, (L + 1, B, h, w, C).
    """

    def __init__(
        self, network: Network, x: np.ndarray, prompts: Sequence[str], scale: float
    ) -> None:
        self.network, self.x, self.prompts, self.scale = network, x, prompts, scale
        self.prediction = network.config.get("prediction_type", "epsilon")
        self._arrived: dict[tuple[int, ...], tuple[np.ndarray, list[Any]]] = {}
        self._predicted: dict[tuple[int, ...], list[np.ndarray]] = {}

    def run(self, levels: tuple[int, ...]) -> list[Any]:
        """Return the run in the form of the file."""
        return self._arrive((*levels, len(LEVELS)))[-1]

    def errors(self, levels: tuple[int, ...]) -> np.ndarray:
        """Return the error of each picture's end, (B,), in standard deviations of the latents."""
        return distances(self._arrive((*levels, len(LEVELS)))[0], self.x[-1])

    def forget(self) -> None:
        """Drop the beginnings. Runs of another number of steps share almost none."""
        self._arrived.clear()
        self._predicted.clear()

    def _arrive(self, path: tuple[int, ...]) -> tuple[np.ndarray, list[Any]]:
        """Return the pictures at the last level of `path`, and the run up to it."""
        if len(path) == 1:
            return self.x[0], []
        if path not in self._arrived:
            begun, target = path[:-1], path[-1]
            current, run = self._arrive(begun)
            features = np.stack([current, *self._predict(begun)])
            row = self._row(path)
            flat = features.reshape(len(features), -1).astype(np.float64)
            usually = usual(row, len(features))
            missed = self.x[target].reshape(-1) - usually @ flat
            numbers = [float(f"{value:.6g}") for value in _solve(flat @ flat.T, flat @ missed)]
            current = np.tensordot(usually + numbers, features, 1).astype(np.float32)
            self._arrived[path] = current, [*run, [LEVELS[begun[-1]], numbers]]
        return self._arrived[path]

    def _predict(self, path: tuple[int, ...]) -> list[np.ndarray]:
        """Return the predictions of x_0 at the last level of `path` and before it, latest first."""
        if path not in self._predicted:
            current, time = self._arrive(path)[0], LEVELS[path[-1]]
            output = self.network(current, time, self.prompts, self.scale)
            of_x, of_output = to_x0(self.prediction, *self._row((*path, len(LEVELS))).level)
            before = self._predict(path[:-1]) if len(path) > 1 else []
            self._predicted[path] = [of_x * current + of_output * output, *before][:HISTORY]
        return self._predicted[path]

    def _row(self, path: tuple[int, ...]) -> Row:
        """Return the step of DPM-Solver++ 2M to the last level of `path`."""
        times = [LEVELS[level] for level in path if level < len(LEVELS)]
        return solver(self.network.config, times).rows[len(path) - 2]


def nearest(
    error: Callable[[tuple[int, ...]], float], starts: Iterable[tuple[int, ...]], move: bool
) -> tuple[int, ...]:
    """Return the best sequence of levels, with `move` improved one level at a time."""
    least, path = min((error(start), start) for start in starts)
    for stride in STRIDES if move else ():
        for i in reversed(range(1, len(path))):
            for to in (path[i] - stride, path[i] + stride):
                moved = (*path[:i], to, *path[i + 1 :])
                rising = all(low < high for low, high in itertools.pairwise((*moved, len(LEVELS))))
                if rising and (found := error(moved)) < least:
                    least, path = found, moved
    return path


def calibration_prompts(count: int) -> list[str]:
    """Return captions of the training distribution, half with one object and half with two."""
    rng = np.random.default_rng(2024)
    return [data.caption(data.random_spec(rng, 1 + i % 2), rng, True) for i in range(count)]


def write(folder: Path, fits: list[Any]) -> None:
    """Write the numbers into scheduler_config.json, one run a line."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop(KEY, None)
    entries = []
    for fit in fits:
        runs = []
        for steps, by_scale in fit["runs"].items():
            lines = ",\n".join(f"        {json.dumps(run)}" for run in by_scale)
            runs.append(f'      "{steps}": [\n{lines}\n      ]')
        scales, joined = json.dumps(fit["guidance"]), ",\n".join(runs)
        entries.append(f'    {{"guidance": {scales}, "runs": {{\n{joined}\n    }}}}')
    head, listed = json.dumps(config, indent=2).removesuffix("\n}"), ",\n".join(entries)
    text = f'{head},\n  "{KEY}": [\n{listed}\n  ]\n}}\n'
    assert json.loads(text) == {**config, KEY: fits}
    path.write_text(text, encoding="utf-8")
    if (manifest := folder / "mlxdiff.json").exists():  # a converted folder knows its files
        known = json.loads(manifest.read_text(encoding="utf-8"))
        raw = path.read_bytes()
        known["files"]["scheduler/scheduler_config.json"] = {
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
        manifest.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


class Fitting:
    """Common state of all fits of a model. The network is opened on first use.

    Args:
        args: arguments of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.network = Network(str(args.model), torch=args.torch, backend=args.backend)
        self.prompts = calibration_prompts(args.count)
        self.many = calibration_prompts(args.refine)  # they begin with the same
        if args.prompts:
            listed = args.prompts.read_text(encoding="utf-8").splitlines()
            self.prompts = [line for line in listed if line.strip()]
            self.many = [self.prompts[i % len(self.prompts)] for i in range(args.refine)]

    def solution(self, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Return x of the fine solution, and the errors of the steps between its levels."""
        seeds = range(FIRST_SEED, FIRST_SEED + len(self.prompts))
        fine = cached(
            self.args.cache,
            f"fine-{self._name(self.prompts, scale)}",
            lambda: fine_solution(self.network, self.network.noise(seeds), self.prompts, scale),
        )
        return fine["x"], step_errors(fine["x"], fine["x0"])

    def pictures(self, scale: float) -> list[Pictures]:
        """Return the pictures that refine the runs."""
        batches = []
        for start in range(0, len(self.many), REFINED_WITH):
            prompts = self.many[start : start + REFINED_WITH]
            noise = self.network.noise(range(FIRST_SEED + start, FIRST_SEED + start + len(prompts)))
            ends = cached(
                self.args.cache,
                f"ends-{self._name(prompts, scale)}-{start}",
                lambda noise=noise, prompts=prompts: {  # type: ignore[misc]
                    "x": fine_solution(self.network, noise, prompts, scale)["x"][-1]
                },
            )
            batches.append(Pictures(prompts, noise, ends["x"]))
        return batches

    def _name(self, prompts: Sequence[str], scale: float) -> str:
        told = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:8]
        return f"{self.network.fingerprint()}-{told}-{PARTS}-{scale:g}"

    def one(self, scale: float) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """Return the fit for a scale, and its fine solution."""
        x, errors = self.solution(scale)
        return self._fit({scale: Runs(self.network, x, self.prompts, scale)}, errors), x, errors

    def refined(self, scale: float, run: list[Any]) -> list[Any]:
        """Improve a run of this scale with its pictures."""
        batches = self.pictures(scale)
        if not batches:
            return run
        found = refine(self.network, run, batches * PASSES, scale)
        ends = []
        for one in (run, found):
            each = np.concatenate([missed(self.network, one, batch, scale) for batch in batches])
            ends.append(f"{np.mean(each):.4f} (median {np.median(each):.4f})")
        told = f"{len(run):2d} steps, guidance {scale:g}, refined: {ends[0]} to {ends[1]}"
        print(f"{told}; timesteps", [time for time, _ in found], flush=True)
        return found

    def between(self, ends: dict[float, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """Return the fit for a range, from the fine solutions of its ends."""
        few = slice(0, RANGE_PICTURES)
        runs = {
            scale: Runs(self.network, x[:, few], self.prompts[few], scale)
            for scale, (x, _) in ends.items()
        }
        return self._fit(runs, sum(errors for _, errors in ends.values()))

    def _fit(self, runs: dict[float, Runs], errors: Any) -> dict[str, Any]:
        """Return the entry of the file for these scales."""
        found: dict[str, Any] = {}

        def error(path: tuple[int, ...]) -> float:
            return float(np.mean([each.errors(path) for each in runs.values()]))

        for steps in self.args.steps:
            starts = {choose_levels(errors, steps, early) for early in EARLY}
            path = nearest(error, starts, move=len(runs) == 1 and steps <= MOVED)
            found[str(steps)] = [each.run(path) for each in runs.values()]
            told = "; ".join(
                f"guidance {scale:g}: {np.mean(each.errors(path)):.4f} (root mean square "
                f"{np.sqrt(np.mean(each.errors(path) ** 2)):.4f})"
                for scale, each in runs.items()
            )
            print(f"{steps:2d} steps, {told}; timesteps", [LEVELS[i] for i in path], flush=True)
            for each in runs.values():
                each.forget()
        return {"guidance": list(runs), "runs": found}


def _call(args: argparse.Namespace, method: str, *arguments: Any) -> Any:
    """Run a call in its own process."""
    return getattr(Fitting(args), method)(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a folder; its scheduler_config.json is changed")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    parser.add_argument("--count", type=int, default=32, help="prompts of the built-in world")
    parser.add_argument("--refine", type=int, default=256, help="pictures for that; 0: none")
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)
    parser.add_argument("--steps", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--torch", action="store_true", help="through diffusers' U-Net")
    parser.add_argument("--cache", type=Path, help="a folder that keeps the fine solutions")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    args = parser.parse_args()
    started, scales = time.time(), sorted(args.guidance)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        alone = list(pool.map(_call, repeat(args), repeat("one"), scales))
        fine = {scale: solution for scale, (_, *solution) in zip(scales, alone, strict=True)}
        pairs = [{low: fine[low], high: fine[high]} for low, high in itertools.pairwise(scales)]
        ranges = pool.map(_call, repeat(args), repeat("between"), pairs)
        for entry, *_ in alone:
            scale, runs = entry["guidance"][0], entry["runs"]
            if scale <= 1.0:
                short = [steps for steps in runs if int(steps) <= REFINED]
                old = [runs[steps][0] for steps in short]
                new = pool.map(_call, repeat(args), repeat("refined"), repeat(scale), old)
                runs |= {steps: [run] for steps, run in zip(short, new, strict=True)}
    write(args.model, [*(entry for entry, *_ in alone), *ranges])
    print(f"{args.model}: fitted, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
