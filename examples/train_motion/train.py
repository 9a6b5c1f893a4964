"""Train a motion module (AnimateDiff) for the built-in model.

    python train.py --run runs/motion --to moves

One core, no GPU, a quarter of an hour; it needs only mlxdiff with MLX. The U-Net, the text encoder
and the VAE stay as they are. The same command continues a stopped run. The result is a folder as
diffusers writes a MotionAdapter:

    mlxdiff generate "a small red star on the left on a blue background" \\
        --motion-adapter moves --frames 8 -o star.gif
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import videos
from safetensors.numpy import save_file

import mlxdiff
from mlxdiff.backends.mlx_training import TrainingBackend
from mlxdiff.networks.condition import Condition, Frames
from mlxdiff.networks.config import MotionAdapterConfig
from mlxdiff.networks.params import expected_parameters
from mlxdiff.run.additions.motion import SCHEDULE
from mlxdiff.training import optimizers
from mlxdiff.training.networks import trained
from mlxdiff.training.process import Process
from mlxdiff.weights.tensors import LazyTensor

CONFIG: dict[str, Any] = {
    "_class_name": "MotionAdapter",
    "block_out_channels": [64, 64, 128],
    "motion_layers_per_block": 1,
    "motion_max_seq_length": 16,
    "motion_norm_num_groups": 8,
    "motion_num_attention_heads": 4,
    "use_motion_mid_block": False,
}
SAVE_EVERY = 120.0  # seconds
WARMUP = 30


def make_data(pipe: Any, path: Path, count: int, seed: int) -> None:
    """Draw and encode videos once, for all epochs."""
    rng = np.random.default_rng(seed)
    latents, states = [], []
    for _ in range(count):
        spec, specs = videos.random_video(rng)
        pixels = videos.render(specs)
        latents.append(np.concatenate([pipe.encode_image(one) for one in pixels]))
        text = videos.data.caption(spec, rng, complete=True)
        states.append(pipe.encode_prompt(text).prompt_embeds[0].astype(np.float16))
    empty = pipe.encode_prompt("").prompt_embeds[0]
    np.savez(path, latents=np.stack(latents), states=np.stack(states), empty=empty)


def first_weights(config: MotionAdapterConfig, seed: int) -> dict[str, np.ndarray]:
    """What training begins with: modules that change nothing."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in expected_parameters(config).items():
        if "norm" in name or len(shape) == 1 or ".proj_out." in name:
            value = np.full(shape, float("norm" in name and name.endswith("weight")))
        else:
            value = rng.uniform(-1, 1, shape) / np.sqrt(shape[1])
        found[name] = value.astype(np.float32)
    return found


def example(kept: Any, process: Process, rng: np.random.Generator, batch: int) -> tuple:
    """Return noisy frames and targets, (B F, h, w, C), timesteps (B,) and text (B, L, D)."""
    rows = rng.integers(len(kept["latents"]), size=batch)
    clean = kept["latents"][rows]
    count, shape = clean.shape[1], clean.shape[2:]
    noise = rng.standard_normal(clean.shape).astype(np.float32)
    # Noisy frames teach more: there it is decided where things are.
    t = (len(process) * np.sqrt(rng.random(batch))).astype(int)
    each = t.repeat(count)
    clean, noise = clean.reshape(-1, *shape), noise.reshape(-1, *shape)
    states = kept["states"][rows].astype(np.float32)
    states[rng.random(batch) < 0.1] = kept["empty"]
    noisy, target = process.noisy(clean, noise, each), process.target(clean, noise, each)
    return noisy, target, t.astype(np.float32), states


class Training:
    """The network, its motion modules, and where the run is."""

    def __init__(self, pipe: Any, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.run / "state.npz"
        config = MotionAdapterConfig.from_dict(CONFIG)
        weights = first_weights(config, args.seed)
        source = pipe.source
        tensors = source.tensors("unet") | {
            name: LazyTensor(value.shape, "F32", lambda value=value: value)
            for name, value in weights.items()
        }
        unet = replace(source.config("unet"), motion=config)
        self.net = TrainingBackend().load(unet, tensors, keep_stored=True)
        for block in (*self.net.down_blocks, *self.net.up_blocks):
            for module in block.motion_modules:
                trained(module)
        self.process = Process.from_config(dict(source.scheduler_config) | SCHEDULE)
        self.parameters = {name: mx.array(value) for name, value in weights.items()}
        self.optimizer = optimizers.make("adamw", self.parameters, 0.0)
        self.average = dict(self.parameters)
        self.step, self.seconds = 0, 0.0
        self.gradient = mx.value_and_grad(self.loss)
        if self.path.exists():
            self.resume()

    def loss(self, parameters: Any, noisy: Any, t: Any, states: Any, target: Any) -> Any:
        for name, value in parameters.items():
            self.net.put(name, value)
        frames = Frames(noisy.shape[0] // len(t))
        temb = Condition(self.net.embed(t)).of_video(frames)
        text = self.net.read(states).of_video(frames)
        return mx.square(self.net.predict(noisy, temb, text) - target).mean()

    def update(self, kept: Any) -> float:
        """One step."""
        args, rng = self.args, np.random.default_rng((self.args.seed, self.step))
        noisy, target, t, states = example(kept, self.process, rng, args.batch)
        loss, gradients = self.gradient(self.parameters, *map(mx.array, (noisy, t, states, target)))
        gradients = optimizers.clipped(gradients, optimizers.norm(gradients), 1.0)
        self.step += 1
        share = min(self.seconds / (60 * args.minutes), 1.0)
        rate = args.lr * min(1.0, self.step / WARMUP) * (0.05 + 0.95 * np.cos(share * np.pi / 2))
        self.parameters = self.optimizer.update(self.parameters, gradients, float(rate))
        keep = min(args.ema, self.step / (self.step + 10))
        self.average = {
            name: keep * value + (1 - keep) * self.parameters[name]
            for name, value in self.average.items()
        }
        mx.eval(self.parameters, self.average, self.optimizer.state)
        return float(loss)

    def save(self) -> None:
        parts = {"p": self.parameters, "a": self.average, "o": self.optimizer.state}
        arrays = {
            f"{part}/{name}": np.asarray(value)
            for part, found in parts.items()
            for name, value in found.items()
        }
        new = self.path.with_suffix(".new.npz")
        np.savez(new, step=self.step, seconds=self.seconds, **arrays)
        new.replace(self.path)

    def resume(self) -> None:
        with np.load(self.path) as file:
            found: dict[str, dict[str, Any]] = {"p": {}, "a": {}, "o": {}}
            for key in file.files:
                if "/" in key:
                    part, _, name = key.partition("/")
                    found[part][name] = mx.array(file[key])
            self.step, self.seconds = int(file["step"]), float(file["seconds"])
        self.parameters, self.average = found["p"], found["a"]
        self.optimizer.state = found["o"]


def write(average: Any, to: Path) -> None:
    """Write the averaged weights as a MotionAdapter's folder, in half precision."""
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    weights = {name: np.asarray(value).astype(np.float16) for name, value in average.items()}
    path = to / "diffusion_pytorch_model.safetensors"
    save_file(weights, path, {"format": "pt"})
    print(f"{to}: {path.stat().st_size:,} bytes", flush=True)


def arguments(text: str) -> argparse.ArgumentParser:
    """Return what both training scripts are told."""
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--to", type=Path, default=Path("moves"))
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=14, help="in all")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    args = arguments(__doc__).parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    pipe = mlxdiff.load(backend="mlx", dtype="float32")
    path = args.run / "videos.npz"
    if not path.exists():
        make_data(pipe, path, args.videos, args.seed)
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    training = Training(pipe, args)
    last, saved, losses = time.process_time(), time.monotonic(), []
    while training.seconds < 60 * args.minutes:
        losses.append(training.update(kept))
        now = time.process_time()
        training.seconds, last = training.seconds + now - last, now
        if training.step % 20 == 0:
            loss = np.mean(losses[-100:])
            print(f"step {training.step}, {training.seconds:.0f} s, loss {loss:.4f}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY:
            training.save()
            saved = time.monotonic()
    training.save()
    write(training.average, args.to)


if __name__ == "__main__":
    main()
