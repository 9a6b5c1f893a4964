"""Time a training step, and measure its peak memory, against diffusers and PEFT on torch's CPU.

    python benchmarks/training.py [--model sd15] [--size 512] [--rank 8] [--steps 3]
        [--sides mlxdiff diffusers] [--checkpointing no yes] [--python PYTHON] [--profile]

A LoRA of the attention layers of a full-size U-Net with random weights, float32, AdamW, batch 1.
Each side runs in a process of its own, one at a time. The first step is not timed (with --steps 0
it is the only one). Peak is the process's largest resident memory, with all that it imports; beside
it stands MLX's own count.
mlxdiff keeps the frozen weights in the file's half precision, and computes in float32.

--python is an interpreter that has torch, diffusers and peft. Nothing is downloaded; the model is
made once in the temporary folder (random_model.py). On Linux, preload a BLAS for both sides
(LD_PRELOAD=libopenblas.so.0). Prints a table and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
WIDTHS = {"sd15": 768, "sdxl": 2048}


def inputs(model: str, size: int) -> dict[str, np.ndarray]:
    """Return latents (1, h, w, 4), noise, text states (1, 77, D), and what SDXL takes beside."""
    random = np.random.default_rng(1)
    side = size // 8
    found = {
        "latents": random.standard_normal((1, side, side, 4), np.float32),
        "text": random.standard_normal((1, 77, WIDTHS[model]), np.float32),
    }
    if model == "sdxl":
        found["pooled"] = random.standard_normal((1, 1280), np.float32)
        found["time_ids"] = np.array([[size, size, 0, 0, size, size]], np.float32)
    return found


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Train with mlxdiff."""
    from random_model import make

    import mlxdiff
    from mlxdiff.training.data import Batch, Data, Text
    from mlxdiff.training.loop import Trainer
    from mlxdiff.training.lora import LoRA
    from mlxdiff.training.options import LoraOptions, TrainOptions
    from mlxdiff.training.process import Process

    name = f"mlxdiff-random-{args.model}-{args.quantize or 'float16'}"
    folder = make(args.model, Path(tempfile.gettempdir()) / name, quantize=args.quantize)
    given = inputs(args.model, args.size)

    class One(Data):
        def __init__(self) -> None:
            self.digest, self.size = "", 1

        def batch(self, index: int, size: int, seed: int) -> Batch:
            text = Text(given["text"], given.get("pooled"))
            ones = np.ones(1, np.float32)
            return Batch(given["latents"], None, ones, text, time_ids=given.get("time_ids"))

    pipe = mlxdiff.load(folder, backend="mlx", low_memory=True)
    checkpointing = args.side_checkpointing
    task = LoRA(pipe.model, LoraOptions(rank=args.rank), checkpointing=checkpointing)
    process = Process.from_config(pipe.model.source.scheduler_config)
    trainer = Trainer(task, One(), process, TrainOptions(learning_rate=1e-4))
    import mlx.core as mx

    found = timed(trainer.step, args.steps, args.profile)
    return found | {"counted": mx.get_peak_memory() / 1e9}


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    """Train with diffusers and PEFT, as diffusers' script train_text_to_image_lora.py does."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**json.loads(args.unet))
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=TARGETS
        )
    )
    if args.side_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    learnt = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-4, weight_decay=1e-2)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    given = {name: torch.from_numpy(x) for name, x in inputs(args.model, args.size).items()}
    latents = given["latents"].permute(0, 3, 1, 2).contiguous()
    added = None
    if "pooled" in given:
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}

    def step() -> None:
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (1,))
        noisy = scheduler.add_noise(latents, noise, t)
        found = unet(noisy, t, given["text"], added_cond_kwargs=added).sample
        loss = torch.nn.functional.mse_loss(found, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, args.steps, False)


def timed(step: Any, count: int, profile: bool) -> dict[str, float]:
    """Run a step once, then ``count`` times; return the least seconds of one, and the peak."""
    if count:
        step()
    walls, cpus = [], []
    for _ in range(max(1, count)):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    if profile:
        import cProfile
        import pstats

        measured = cProfile.Profile()
        measured.runcall(step)
        pstats.Stats(measured, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    scale = 1024 if sys.platform == "linux" else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {"wall": min(walls), "cpu": min(cpus), "peak": peak / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(WIDTHS), default="sd15")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("-q", "--quantize", help="of mlxdiff's frozen weights")
    parser.add_argument("--sides", nargs="+", default=["mlxdiff", "diffusers"])
    parser.add_argument("--checkpointing", nargs="+", default=["no", "yes"])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--unet", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        args.side_checkpointing = args.checkpointing == ["yes"]
        print(json.dumps(ours(args) if args.side == "mlxdiff" else theirs(args)))
        return
    from random_model import MODELS

    found: dict[str, dict[str, Any]] = {}
    for checkpointing in args.checkpointing:
        for side in args.sides:
            python = sys.executable if side == "mlxdiff" else args.python
            own = [*sys.argv[1:], "--side", side, "--checkpointing", checkpointing]
            own += ["--unet", json.dumps(MODELS[args.model]["unet"])]
            done = subprocess.run([python, __file__, *own], stdout=subprocess.PIPE, check=True)
            numbers = json.loads(done.stdout.splitlines()[-1])
            found[f"{side}, checkpointing {checkpointing}"] = numbers
            shown = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
            print(f"{side:10} checkpointing {checkpointing:3}  {shown}", flush=True)
    print(json.dumps({"model": args.model, "size": args.size, "rank": args.rank} | found))


if __name__ == "__main__":
    main()
