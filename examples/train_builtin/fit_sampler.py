"""Fit the sampler `fitted` to a model: the timesteps and coefficients that need the fewest steps.

    python fit_sampler.py MODEL                 # the built-in model's prompts
    python fit_sampler.py MODEL --prompts FILE  # another model: one prompt a line

MODEL is a diffusers folder; the numbers go into its scheduler/scheduler_config.json, where mlxdiff
reads them (before or after conversion) and diffusers skips them. The same call gives the same
numbers. What is done:

1. A fine solution of the probability-flow ODE is computed for some prompts, seeds and guidance
   scales, with the predicted x_0 at each of its levels.
2. Timesteps are chosen among its levels: a step from x_i to x_k by the x_0 at i and at the level p
   before has, over all pictures, a least-squares error that depends on (p, i, k) only; the sequence
   with the smallest sum is found by dynamic programming. This asks the network nothing.
3. The coefficients are fitted along the solver's own run, step after step: each step lands as near
   as it can on the fine solution, from where the steps before have really led. What the pictures
   leave open stays as DPM-Solver++ 2M has it (ridge regression towards that).

Each coefficient is a line in the guidance scale (mlxdiff/samplers/fitted.py).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
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

COUNTS = (4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20, 25)
GUIDANCE = (1.0, 4.0, 7.5)
LEVELS = (*np.linspace(999, 40, 57).round().astype(int).tolist(), 33, 27, 21, 16, 12, 8, 5, 2, 0)
FIRST_SEED = 10_000  # far from the seeds that a benchmark would take
EARLY = 0.5  # of an error's square at pure noise counts; of one at the picture, all
RIDGE = 1e-5
BATCH = 16


class Network:
    """A model's U-Net, asked for many pictures at once: (x, t, prompts, scales) -> output.

    Args:
        folder: the model.
        torch: compute with diffusers' U-Net of that (diffusers) folder; a little faster on a CPU.
        load: for `mlxdiff.load` (backend).
    """

    def __init__(self, folder: str | None, torch: bool = False, **load: Any) -> None:
        self.pipe = mlxdiff.load(folder, dtype="float32", **load)
        if self.pipe.model.is_sdxl:
            raise SystemExit("fit_sampler: SDXL is not supported yet")
        self.config = self.pipe.source.scheduler_config
        self.embeddings: dict[str, np.ndarray] = {}
        self.unet = self._through_torch(str(folder)) if torch else self._through_mlxdiff()

    def _through_mlxdiff(self) -> Any:
        backend, unet = self.pipe.backend, self.pipe.model.component("unet")

        def run(x: np.ndarray, t: float, text: np.ndarray) -> np.ndarray:
            out = unet(backend.asarray(x), t, encoder_hidden_states=backend.asarray(text))
            return backend.to_numpy(out)

        return run

    def _through_torch(self, folder: str) -> Any:
        import torch
        from diffusers import UNet2DConditionModel

        torch.set_num_threads(1)
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()

        def run(x: np.ndarray, t: float, text: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                sample = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
                out = unet(sample, t, torch.from_numpy(text)).sample
            return out.numpy().transpose(0, 2, 3, 1)

        return run

    def text(self, prompt: str) -> np.ndarray:
        if prompt not in self.embeddings:
            self.embeddings[prompt] = self.pipe.encode_prompt(prompt).prompt_embeds
        return self.embeddings[prompt]

    def noise(self, seeds: Sequence[int]) -> np.ndarray:
        shape = self.pipe.model.latent_shape(*self.pipe.model.default_size)
        return np.concatenate([draw_noise(Generator(seed), shape) for seed in seeds])

    def __call__(
        self, x: np.ndarray, t: float, prompts: Sequence[str], scales: np.ndarray
    ) -> np.ndarray:
        """What the sampler asks: (B, h, w, C) float32, after guidance by scales (B,)."""
        guided = np.flatnonzero(scales > 1.0)
        texts = [self.text(prompt) for prompt in prompts] + [self.text("")] * len(guided)
        x, text = np.concatenate([x, x[guided]]), np.concatenate(texts)
        parts = [slice(i, i + BATCH) for i in range(0, len(x), BATCH)]
        out = np.concatenate([self.unet(x[part], t, text[part]) for part in parts])
        output, negative = out[: len(scales)].copy(), out[len(scales) :]
        strength = scales[guided].reshape(-1, 1, 1, 1).astype(np.float32)
        output[guided] = negative + strength * (output[guided] - negative)
        return output


def solver(config: dict[str, Any], times: Sequence[int]) -> Plan:
    """DPM-Solver++ 2M over given timesteps."""
    spacings = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
    fixed: dict[str, Any] = {f"use_{name}": False for name in spacings}
    fixed |= {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "heun"}
    settings = Settings(config, MULTISTEP.name, MULTISTEP.defaults, fixed, MULTISTEP.choices)
    grid = MULTISTEP.grid(settings, len(times), times)
    return Plan("dpmpp-2m", "custom", tuple(MULTISTEP.rows(settings, grid, 0, 0.0)), 1.0)


def fine_solution(
    network: Network, noise: np.ndarray, prompts: Sequence[str], scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """x at LEVELS and at the end, (L + 1, B, ...), and the predicted x_0 at LEVELS, (L, B, ...)."""
    plan = solver(network.config, LEVELS)
    x, state, found, predicted = noise, plan.start(), [noise], []
    for t in plan.timesteps:
        x, state = plan.step(x, network(x, t, prompts, scales), state)
        found.append(x)
        predicted.append(state.data[0])
    return np.stack(found), np.stack(predicted)


def step_errors(x: np.ndarray, x0: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Mean square errors of the best step from level i to k with x_0 of i and p: [p, i, k].

    The first step, which has no p, stands at [0, 0, k].
    """
    levels = len(x0)
    vectors = np.concatenate([x, x0]).reshape(len(x) + levels, len(scales), -1).astype(np.float64)
    products = np.zeros((3, len(vectors), len(vectors)))  # times 1, (g - 1), (g - 1)**2
    for picture, scale in zip(vectors.swapaxes(0, 1), scales, strict=True):
        gram = picture @ picture.T / picture.shape[1] / len(scales)
        products += (scale - 1.0) ** np.arange(3)[:, None, None] * gram
    plain, once, twice = products

    def error(features: np.ndarray, target: np.ndarray) -> np.ndarray:
        pairs, wanted = (features[..., :, None], features[..., None, :]), target[..., None]
        upper = np.concatenate([plain[pairs], once[pairs]], -1)
        lower = np.concatenate([once[pairs], twice[pairs]], -1)
        right = np.concatenate([plain[features, wanted], once[features, wanted]], -1)
        solved = _solve(np.concatenate([upper, lower], -2), right)
        return np.maximum(plain[target, target] - (solved * right).sum(-1), 0.0)

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


def choose_levels(errors: np.ndarray, steps: int) -> list[int]:
    """The `steps` levels, beginning with the first, whose steps' errors sum up to the least."""
    count = len(errors)
    weight = np.append(1.0 - EARLY * np.array(LEVELS) / LEVELS[0], 1.0)
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
    network: Network,
    x: np.ndarray,
    path: Sequence[int],
    prompts: Sequence[str],
    scales: np.ndarray,
) -> list[Any]:
    """The rows of a run over the levels of `path`, as they stand in the file."""
    rows: list[Any] = []
    usual = solver(network.config, [LEVELS[level] for level in path]).rows
    current, history = x[0], []
    above = (scales - 1.0).reshape(-1, 1, 1, 1)
    prediction = network.config.get("prediction_type", "epsilon")
    for level, target, row in zip(path, [*path[1:], len(LEVELS)], usual, strict=True):
        of_x, of_output = to_x0(prediction, *row.level)
        output = network(current, LEVELS[level], prompts, scales)
        history = [of_x * current + of_output * output, *history][:2]
        features = np.stack([*(plain := [current, *history]), *(above * one for one in plain)])
        expected = np.zeros(len(features))  # DPM-Solver++, whatever the guidance
        expected[: 1 + len(row.weights)] = row.scale, *row.weights
        flat = features.reshape(len(features), -1).astype(np.float64)
        missed = x[target].reshape(-1) - expected @ flat
        solved = expected + _solve(flat @ flat.T, flat @ missed)
        pairs = [[float(f"{v:.6g}") for v in pair] for pair in solved.reshape(2, -1).T]
        rows.append([LEVELS[level], pairs])
        used = np.array(pairs).T.reshape(-1)
        current = np.tensordot(used, features, 1).astype(np.float32)
    error = np.sqrt(((current - x[-1]) ** 2).mean((1, 2, 3)))
    means = [float(np.sqrt((error[scales == g] ** 2).mean())) for g in np.unique(scales)]
    std = [float(x[-1][scales == g].std()) for g in np.unique(scales)]
    print(
        f"{len(path):3d} steps: error",
        " ".join(f"{m / s:.4f}" for m, s in zip(means, std, strict=True)),
        "of the latents' deviation; timesteps",
        [LEVELS[level] for level in path],
        flush=True,
    )
    return rows


def calibration_prompts(count: int) -> list[str]:
    """Captions of the training distribution, half of one object and half of two."""
    rng = np.random.default_rng(2024)
    return [data.caption(data.random_spec(rng, 1 + i % 2), rng, True) for i in range(count)]


def write(folder: Path, entry: dict[str, Any]) -> None:
    """Put the numbers into scheduler_config.json, one step a line."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop(KEY, None)
    runs = []
    for steps, rows in entry["runs"].items():
        lines = ",\n".join(f"        {json.dumps(row)}" for row in rows)
        runs.append(f'      "{steps}": [\n{lines}\n      ]')
    fit = f'    "guidance": {json.dumps(entry["guidance"])},\n    "runs": {{\n'
    fit += ",\n".join(runs) + "\n    }\n"
    head = json.dumps(config, indent=2).removesuffix("\n}")
    text = f'{head},\n  "{KEY}": {{\n{fit}  }}\n}}\n'
    assert json.loads(text) == {**config, KEY: entry}
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a diffusers folder; its scheduler is changed")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    parser.add_argument("--count", type=int, default=16, help="prompts of the built-in world")
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)
    parser.add_argument("--steps", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--torch", action="store_true", help="through diffusers' U-Net")
    args = parser.parse_args()
    if (args.model / "mlxdiff.json").exists():
        raise SystemExit(
            f"{args.model}: is converted already; fit the diffusers folder, then convert"
        )
    if args.prompts:
        listed = args.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line for line in listed if line.strip()]
    else:
        prompts = calibration_prompts(args.count)
    started = time.time()
    network = Network(str(args.model), torch=args.torch, backend=args.backend)
    scales = np.repeat(sorted(args.guidance), len(prompts))
    noise = network.noise(range(FIRST_SEED, FIRST_SEED + len(prompts)))
    noise = np.tile(noise, (len(args.guidance), 1, 1, 1))
    prompts = prompts * len(args.guidance)
    x, x0 = fine_solution(network, noise, prompts, scales)
    print(f"fine solution: {time.time() - started:.0f} s", flush=True)
    errors = step_errors(x, x0, scales)
    runs = {
        str(steps): fit(network, x, choose_levels(errors, steps), prompts, scales)
        for steps in args.steps
    }
    write(args.model, {"guidance": [min(args.guidance), max(args.guidance)], "runs": runs})
    print(f"{args.model}: fitted for {', '.join(runs)} steps, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
