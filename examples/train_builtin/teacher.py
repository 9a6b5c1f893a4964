"""A model as the teacher of a sampler: output for many pictures, and the fine solution."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mlxdiff
from mlxdiff.noise import Generator
from mlxdiff.run.kind import Network as Part
from mlxdiff.run.model import draw_noise
from mlxdiff.samplers.dpm_solver import MULTISTEP
from mlxdiff.samplers.plan import Plan, Row
from mlxdiff.samplers.schedule import NoiseSchedule

LEVELS = (*np.linspace(999, 40, 57).round().astype(int).tolist(), 33, 27, 21, 16, 12, 8, 5, 2, 0)
PARTS = 2  # steps of the fine solution from one level to the next
BATCH = 16


class Network:
    """A model's U-Net for many pictures at once: (x, t, prompts, scales) -> output.

    Args:
        folder: the model.
        torch: compute with diffusers' U-Net of the same weights, a third faster on a CPU.
        load: arguments for `mlxdiff.load` (backend, loras).
    """

    def __init__(self, folder: str | None, torch: bool = False, **load: Any) -> None:
        self.pipe = mlxdiff.load(folder, dtype="float32", **load)
        if self.pipe.model.is_sdxl:
            raise SystemExit("SDXL is not supported here yet")
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
        unet = self._in_torch(UNet2DConditionModel, "unet").to(memory_format=torch.channels_last)
        self.torch_unet = unet

        def run(x: np.ndarray, t: float, text: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                sample = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
                out = unet(sample, t, torch.from_numpy(text)).sample
            return out.float().permute(0, 2, 3, 1).contiguous().numpy()

        return run

    def _in_torch(self, kind: Any, part: str) -> Any:
        """Return diffusers' network of a part, with this model's weights and its LoRAs' changes."""
        import torch

        config = json.loads((self.pipe.source.path / part / "config.json").read_text())
        found, weights = kind.from_config(config).eval(), {}
        for name, tensor in self.pipe.model.component_of(Part(part)).tensors().items():
            value = np.array(tensor.read(), np.float32)
            weights[name] = torch.from_numpy(
                value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
            )
        found.load_state_dict(weights)
        return found

    def torch_decoder(self) -> Callable[[Any], Any]:
        """Return a function from latents, (B, C, h, w), to pictures, (B, 3, H, W) in [-1, 1]."""
        from diffusers import AutoencoderKL

        vae = self._in_torch(AutoencoderKL, "vae").requires_grad_(False)
        scale = vae.config.scaling_factor
        return lambda x: vae.decode(x / scale).sample

    def fingerprint(self) -> str:
        """A text that differs between models with different outputs."""
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
        """Return the network's output after guidance, (B, h, w, C) float32."""
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
    """Return the result of `make`, from the file of an earlier call if there is one."""
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
    """Plan DPM-Solver++ 2M over given timesteps."""
    spacings = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
    fixed: dict[str, Any] = {f"use_{name}": False for name in spacings}
    fixed |= {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "heun"}
    arguments = MULTISTEP.read(config, fixed)
    known = NoiseSchedule.from_arguments(arguments, keep_finite=True)
    grid = MULTISTEP.grid(arguments, len(times), known.at(times))
    return Plan("dpmpp-2m", "custom", tuple(MULTISTEP.rows(arguments, grid, 0, 0.0)), 1.0)


def usual(row: Row, count: int) -> np.ndarray:
    """Return a solver step's weights of x and the latest x_0, padded with zeros: (count,)."""
    found = np.zeros(count)
    found[: 1 + len(row.weights)] = row.scale, *row.weights
    return found


def distances(x: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the root-mean-square error of each picture, in deviations of the latents: (B,)."""
    return np.sqrt(((x - ends) ** 2).mean((1, 2, 3))) / ends.std()


def fine_solution(
    network: Network, noise: np.ndarray, prompts: Sequence[str], scale: float
) -> dict[str, np.ndarray]:
    """Return x at LEVELS and the end, (L + 1, B, ...), and x_0 at LEVELS, (L, B, ...)."""
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
