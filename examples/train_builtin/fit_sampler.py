"""Fit the sampler `fitted` to a model: the timesteps and numbers that need the fewest steps.

    python fit_sampler.py MODEL                 # the built-in model's prompts
    python fit_sampler.py MODEL --prompts FILE  # another model: one prompt a line

MODEL is a diffusers folder or a converted one (of the built-in model: mlxdiff/builtin); the numbers
go into its scheduler/scheduler_config.json, where mlxdiff reads them and diffusers skips them. The
same call gives the same numbers. For each guidance scale:

1. A fine solution of the probability-flow ODE is computed for some prompts and seeds, with the
   predicted x_0 at each of its levels.
2. Timesteps are chosen among its levels: a step from x_i to x_k by the x_0 at i and at the level p
   before has, over all pictures, a least-squares error that depends on (p, i, k) only; the sequence
   with the smallest sum is found by dynamic programming. This asks the network nothing. What
   errors near pure noise should weigh differs: they fade, or grow and turn a picture into another
   one. Where it matters two weights are tried, and the run with the smallest error stays.
3. The numbers are fitted along the solver's own run, step after step: each step lands as near as it
   can on the fine solution, from where the steps before have really led. What the pictures leave
   open stays as DPM-Solver++ 2M has it (ridge regression towards that).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

import mlxdiff
from mlxdiff.model import draw_noise
from mlxdiff.noise import Generator
from mlxdiff.samplers.dpm_solver import MULTISTEP
from mlxdiff.samplers.family import to_x0
from mlxdiff.samplers.fitted import KEY
from mlxdiff.samplers.plan import Plan
from mlxdiff.samplers.settings import Settings

try:
    from . import data
except ImportError:  # run as a script: the folder itself is on the path
    import data

COUNTS = (4, 5, 6, 7, 8, 10, 12, 15, 20, 25)
GUIDANCE = (1.0, 4.0, 7.5)
LEVELS = (*np.linspace(999, 40, 57).round().astype(int).tolist(), 33, 27, 21, 16, 12, 8, 5, 2, 0)
PARTS = 2  # steps of the fine solution from one level to the next
FIRST_SEED = 10_000  # far from the seeds that a benchmark would take
EARLY = 0.5  # what the square of an error at pure noise counts, of one at the picture being 1;
EARLY_UNGUIDED = 1.0, 4.0  # without guidance both are tried, up to 8 steps
RANGE_PICTURES = 8  # of the pictures, for a range of scales
HISTORY = 3  # predictions of x_0 in a step
RIDGE = 1e-5
BATCH = 16


class Network:
    """A model's U-Net, asked for many pictures at once: (x, t, prompts, scales) -> output.

    Args:
        folder: the model.
        torch: compute with diffusers' U-Net of the same weights; a third faster on a CPU.
        load: for `mlxdiff.load` (backend).
    """

    def __init__(self, folder: str | None, torch: bool = False, **load: Any) -> None:
        self.pipe = mlxdiff.load(folder, dtype="float32", **load)
        if self.pipe.model.is_sdxl:
            raise SystemExit("fit_sampler: SDXL is not supported yet")
        self.config = self.pipe.source.scheduler_config
        self.embeddings: dict[str, np.ndarray] = {}
        self.unet = self._through_torch() if torch else self._through_mlxdiff()

    def _through_mlxdiff(self) -> Any:
        backend, unet = self.pipe.backend, self.pipe.model.component("unet")

        def run(x: np.ndarray, t: float, text: np.ndarray) -> np.ndarray:
            out = unet(backend.asarray(x), t, encoder_hidden_states=backend.asarray(text))
            return backend.to_numpy(out)

        return run

    def _through_torch(self) -> Any:
        import torch
        from diffusers import UNet2DConditionModel

        torch.set_num_threads(1)
        config = json.loads((self.pipe.source.path / "unet" / "config.json").read_text())
        unet = UNet2DConditionModel.from_config(config).eval().to(memory_format=torch.channels_last)
        weights = {}
        for name, tensor in self.pipe.source.tensors("unet").items():
            value = np.array(tensor.read(), np.float32)
            weights[name] = torch.from_numpy(
                value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
            )
        unet.load_state_dict(weights)

        def run(x: np.ndarray, t: float, text: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                sample = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
                out = unet(sample, t, torch.from_numpy(text)).sample
            return out.permute(0, 2, 3, 1).contiguous().numpy()

        return run

    def fingerprint(self) -> str:
        """Differs where another model would answer otherwise."""
        found = hashlib.sha256()
        for part in ("unet", "text_encoder"):
            for name, tensor in sorted(self.pipe.source.tensors(part).items()):
                found.update(name.encode() + np.ascontiguousarray(tensor.read()).tobytes())
        return found.hexdigest()[:12]

    def text(self, prompt: str) -> np.ndarray:
        if prompt not in self.embeddings:
            self.embeddings[prompt] = self.pipe.encode_prompt(prompt).prompt_embeds
        return self.embeddings[prompt]

    def noise(self, seeds: Sequence[int]) -> np.ndarray:
        shape = self.pipe.model.latent_shape(*self.pipe.model.default_size)
        return np.concatenate([draw_noise(Generator(seed), shape) for seed in seeds])

    def __call__(self, x: np.ndarray, t: float, prompts: Sequence[str], scale: float) -> np.ndarray:
        """What the sampler asks: (B, h, w, C) float32, after guidance."""
        texts = np.concatenate([self.text(prompt) for prompt in prompts])
        if scale <= 1.0:
            return self._batches(x, t, texts)
        negative = np.repeat(self.text(""), len(x), axis=0)
        both = self._batches(np.concatenate([x, x]), t, np.concatenate([texts, negative]))
        output, without = both[: len(x)], both[len(x) :]
        return without + np.float32(scale) * (output - without)

    def _batches(self, x: np.ndarray, t: float, text: np.ndarray) -> np.ndarray:
        parts = [slice(i, i + BATCH) for i in range(0, len(x), BATCH)]
        return np.concatenate([self.unet(x[part], t, text[part]) for part in parts])


def cached(
    folder: Path | None, name: str, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `make` gives, from a file of an earlier call where there is one."""
    path = None if folder is None else folder / f"{name}.npz"
    if path is not None and path.exists():
        with np.load(path) as file:
            return dict(file)
    made = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.npz")
        np.savez(partial, **made)
        partial.replace(path)
    return made


def solver(config: dict[str, Any], times: Sequence[int]) -> Plan:
    """DPM-Solver++ 2M over given timesteps."""
    spacings = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
    fixed: dict[str, Any] = {f"use_{name}": False for name in spacings}
    fixed |= {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "heun"}
    settings = Settings(config, MULTISTEP.name, MULTISTEP.defaults, fixed, MULTISTEP.choices)
    grid = MULTISTEP.grid(settings, len(times), times)
    return Plan("dpmpp-2m", "custom", tuple(MULTISTEP.rows(settings, grid, 0, 0.0)), 1.0)


def fine_solution(
    network: Network, noise: np.ndarray, prompts: Sequence[str], scale: float
) -> dict[str, np.ndarray]:
    """x at LEVELS and at the end, (L + 1, B, ...), and the predicted x_0 at LEVELS, (L, B, ...)."""
    times = {
        round(first + (second - first) * part / PARTS)
        for first, second in zip(LEVELS, (*LEVELS[1:], LEVELS[-1]), strict=True)
        for part in range(PARTS)
    }
    plan = solver(network.config, sorted(times, reverse=True))
    x, state, found, predicted = noise, plan.start(), [], []
    for t in plan.timesteps:
        output, before = network(x, t, prompts, scale), x
        x, state = plan.step(x, output, state)
        if t in LEVELS:
            found.append(before)
            predicted.append(state.data[0])
    return {"x": np.stack([*found, x]), "x0": np.stack(predicted)}


def step_errors(x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """Mean square errors of the best step from level i to k with x_0 of i and p: [p, i, k].

    The first step, which has no p, stands at [0, 0, k].
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
    """Ridge regression from its normal equations, each variable in its own unit."""
    unit = np.sqrt(np.maximum(np.diagonal(matrix, axis1=-2, axis2=-1), 1e-30))
    scaled = matrix / unit[..., :, None] / unit[..., None, :] + RIDGE * np.eye(matrix.shape[-1])
    return np.linalg.solve(scaled, (right / unit)[..., None])[..., 0] / unit


def choose_levels(errors: np.ndarray, steps: int, early: float = EARLY) -> list[int]:
    """The `steps` levels, beginning with the first, whose steps' errors sum up to the least."""
    count = len(errors)
    weight = 1.0 + (early - 1.0) * np.array([*LEVELS, 0]) / LEVELS[0]
    costs = errors * weight
    best = np.full((count, count), np.inf)  # of a run that came to level i from p
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
    return path[::-1]


def fit(
    network: Network, x: np.ndarray, path: Sequence[int], prompts: Sequence[str], scale: float
) -> tuple[float, list[Any]]:
    """The run over the levels of `path`, as it stands in the file, and its error."""
    run: list[Any] = []
    usual = solver(network.config, [LEVELS[level] for level in path]).rows
    current, history = x[0], []
    prediction = network.config.get("prediction_type", "epsilon")
    for level, target, row in zip(path, [*path[1:], len(LEVELS)], usual, strict=True):
        of_x, of_output = to_x0(prediction, *row.level)
        output = network(current, LEVELS[level], prompts, scale)
        history = [of_x * current + of_output * output, *history][:HISTORY]
        features = np.stack([current, *history])
        flat = features.reshape(len(features), -1).astype(np.float64)
        usually = np.zeros(len(features))
        usually[: 1 + len(row.weights)] = row.scale, *row.weights
        missed = x[target].reshape(-1) - usually @ flat
        numbers = [float(f"{value:.6g}") for value in _solve(flat @ flat.T, flat @ missed)]
        run.append([LEVELS[level], numbers])
        current = np.tensordot(usually + numbers, features, 1).astype(np.float32)
    error = np.sqrt(((current - x[-1]) ** 2).mean((1, 2, 3))) / x[-1].std()
    total = float(np.sqrt((error**2).mean()))
    print(
        f"guidance {scale:g}, {len(path):2d} steps: error {total:.4f} (median "
        f"{np.median(error):.4f}) of the latents' deviation; timesteps",
        [LEVELS[level] for level in path],
        flush=True,
    )
    return total, run


def calibration_prompts(count: int) -> list[str]:
    """Captions of the training distribution, half of one object and half of two."""
    rng = np.random.default_rng(2024)
    return [data.caption(data.random_spec(rng, 1 + i % 2), rng, True) for i in range(count)]


def write(folder: Path, fits: list[Any]) -> None:
    """Put the numbers into scheduler_config.json, one run a line."""
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
    """All that the fits of a model share; the network is opened where it is used.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.network = Network(str(args.model), torch=args.torch, backend=args.backend)
        self.prompts = calibration_prompts(args.count)
        if args.prompts:
            listed = args.prompts.read_text(encoding="utf-8").splitlines()
            self.prompts = [line for line in listed if line.strip()]

    def solution(self, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """x of the fine solution, and the errors of the steps between its levels."""
        seeds = range(FIRST_SEED, FIRST_SEED + len(self.prompts))
        told = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:8]
        fine = cached(
            self.args.cache,
            f"fine-{self.network.fingerprint()}-{told}-{PARTS}-{scale:g}",
            lambda: fine_solution(self.network, self.network.noise(seeds), self.prompts, scale),
        )
        return fine["x"], step_errors(fine["x"], fine["x0"])

    def one(self, scale: float) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """The fit for a scale, and its fine solution."""
        x, errors = self.solution(scale)
        runs = {}
        for steps in self.args.steps:
            weights = EARLY_UNGUIDED if scale <= 1.0 and steps <= 8 else (EARLY,)
            paths = {tuple(choose_levels(errors, steps, early)) for early in weights}
            found = [fit(self.network, x, path, self.prompts, scale) for path in sorted(paths)]
            runs[str(steps)] = [min(found)[1]]
        return {"guidance": [scale], "runs": runs}, x, errors

    def between(self, ends: dict[float, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """The fit for a range, from the fine solutions of its ends."""
        runs = {}
        for steps in self.args.steps:
            path = choose_levels(sum(errors for _, errors in ends.values()), steps)
            few = slice(0, RANGE_PICTURES)
            runs[str(steps)] = [
                fit(self.network, x[:, few], path, self.prompts[few], scale)[1]
                for scale, (x, _) in ends.items()
            ]
        return {"guidance": list(ends), "runs": runs}


def _call(args: argparse.Namespace, method: str, argument: Any) -> Any:
    """In a process of its own."""
    return getattr(Fitting(args), method)(argument)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a folder; its scheduler_config.json is changed")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    parser.add_argument("--count", type=int, default=12, help="prompts of the built-in world")
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
        ranges = list(pool.map(_call, repeat(args), repeat("between"), pairs))
    write(args.model, [*(entry for entry, *_ in alone), *ranges])
    print(f"{args.model}: fitted, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
