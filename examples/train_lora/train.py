"""Train a style LoRA for the built-in model: shapes drawn as outlines.

    python train.py --to outline.safetensors

It takes a few minutes on one core and needs torch, diffusers and peft. The result needs only
mlxdiff:

    mlxdiff generate "a large blue star on a white background" -g 4 --lora outline.safetensors

The pictures and captions are those of the built-in model's training (examples/train_builtin), with
one difference: every shape is hollow. The text encoder, the VAE and all weights of the U-Net stay
fixed. Training learns a low-rank change for each layer of the U-Net.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
import data
from builtin import open_builtin, text_of

HOLE = 0.62  # as a fraction of a shape's size
EMPTY = 0.12  # this share of the captions is empty, for guidance
LAYERS = r".*\.(to_[qkv]|to_out\.0|ff\.net\.(0\.proj|2)|proj_(in|out)|conv[12]?|time_emb_proj)"


def outlines(spec: data.Spec) -> np.ndarray:
    """Draw `data.render` with a hole in the form of each shape: (side, side, 3) uint8."""
    filled = data.inside

    def hollow(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return filled(shape, u, v) & ~filled(shape, u / HOLE, v / HOLE)

    try:
        data.inside = hollow
        return data.render(spec)
    finally:
        data.inside = filled


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, count: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Return latents (mean and deviation) and text of this many pictures, and the empty text."""
    rng = np.random.default_rng(seed)
    means, deviations, texts = [], [], []
    factor = pipe.vae.config.scaling_factor
    for start in range(0, count, 64):
        size = min(64, count - start)
        specs = [data.random_spec(rng, 2 if rng.random() < 0.6 else 1) for _ in range(size)]
        x = np.stack([outlines(spec) for spec in specs]).astype(np.float32) / 127.5 - 1
        code = pipe.vae.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist
        means.append(code.mean * factor)
        deviations.append(code.std * factor)
        texts.append(text_of(pipe, [data.caption(spec, rng) for spec in specs]))
    return torch.cat(means), torch.cat(deviations), torch.cat(texts), text_of(pipe, [""])[0]


def train(pipe: StableDiffusionPipeline, args: argparse.Namespace) -> None:
    """Add the LoRA to the U-Net and train it to predict v (Salimans and Ho 2022)."""
    means, deviations, texts, empty = encode(pipe, args.pictures, args.seed)
    unet, alphas = pipe.unet, pipe.scheduler.alphas_cumprod
    unet.requires_grad_(False)
    unet.set_attn_processor(
        AttnProcessor()
    )  # the backward pass of fused attention is slower on a CPU
    torch.manual_seed(args.seed)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))
    learnt = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1
    )
    rng, size, start, running = np.random.default_rng(args.seed), args.batch, time.time(), 0.0
    for step in range(1, args.steps + 1):
        rows = torch.from_numpy(rng.integers(0, len(means), size))
        x = means[rows] + deviations[rows] * torch.randn_like(means[rows])
        text = texts[rows].clone()
        text[torch.from_numpy(rng.random(size) < EMPTY)] = empty
        # one timestep from each of `size` equal parts: less noise in the loss
        t = torch.from_numpy(((rng.permutation(size) + rng.random(size)) / size * 1000).astype(int))
        signal, sigma = (p.sqrt()[:, None, None, None] for p in (alphas[t], 1 - alphas[t]))
        noise = torch.randn_like(x)
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(signal * x + sigma * noise, t, text).sample
        loss = (v.float() - (signal * noise - sigma * x)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running += (loss.item() - running) / min(step, 50)
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}, loss {running:.4f}, {time.time() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, default=Path("outline.safetensors"))
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    pipe = open_builtin()
    train(pipe, args)
    # The names that diffusers' save_lora_weights writes.
    weights = {
        f"unet.{name}": value.detach().half().contiguous().numpy()
        for name, value in get_peft_model_state_dict(pipe.unet).items()
    }
    args.to.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.to, {"format": "pt"})
    print(f"{args.to}: {args.to.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
