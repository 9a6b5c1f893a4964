"""Train the VAE on freshly drawn pictures: 64 x 64 pixels to 16 x 16 x 4 latents.

    python train_vae.py --run runs/vae --minutes 30
    python train_vae.py --run runs/vae-decoder --start runs/vae/vae --decoder-only --minutes 10

Half of the pictures hold three to six overlapping objects, so that every sample shows many edges.
The second command goes on with the decoder alone, on frozen latents. RUN/vae is the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import data
import numpy as np


def batch_of(rng: np.random.Generator, size: int, dense: float = 0.5) -> np.ndarray:
    """Pictures as float32 (B, 3, H, W) in [-1, 1]."""
    specs = [
        data.dense_spec(rng)
        if rng.random() < dense
        else data.random_spec(rng, 1 if rng.random() < 0.3 else 2)
        for _ in range(size)
    ]
    pictures = np.stack([data.render(spec) for spec in specs]).astype(np.float32)
    return (pictures / 127.5 - 1).transpose(0, 3, 1, 2)


def build(widths: tuple[int, ...]):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,  # few: a flat color must survive the normalization
        sample_size=data.SIDE,
        scaling_factor=1.0,  # measured by train_unet.py
    )


def worker(rank: int, processes: int, args) -> None:
    import torch
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.start) if args.start else build(tuple(args.widths))
    vae.set_attn_processor(AttnProcessor())
    vae.to(memory_format=torch.channels_last)
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    training = common.Training(
        rank, processes, args.run, vae, args.lr, args.minutes, ema=args.ema, betas=(0.9, 0.95)
    )
    while not training.done:
        rng = np.random.default_rng((training.step, rank, int(args.decoder_only)))
        torch.manual_seed(1000 * training.step + rank)
        x = torch.from_numpy(batch_of(rng, args.batch)).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            with torch.set_grad_enabled(not args.decoder_only):
                code = vae.encode(x).latent_dist
                mean, logvar = code.mean.float(), code.logvar.float()
                z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            y = vae.decode(z).sample
        error = y.float() - x
        l1, mse = error.abs().mean(), error.square().mean()
        edge = (error[..., 1:] - error[..., :-1]).abs().mean()
        edge = edge + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = l1 + 2 * mse + 0.5 * edge + (0 if args.decoder_only else args.kl * kl)
        psnr = 10 * np.log10(4 / mse.item())
        shown = {"l1": l1.item(), "edge": edge.item(), "kl": kl.item(), "psnr": psnr}
        training.update(loss, args.batch, **shown)
    training.save()
    if rank == 0:
        training.use_ema()
        vae.save_pretrained(Path(args.run) / "vae")
        print("saved", Path(args.run) / "vae", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, help="folder of this run (resumed if it exists)")
    parser.add_argument("--start", help="VAE folder to start from")
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 32, 64])
    parser.add_argument("--batch", type=int, default=8, help="pictures a process and step")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--kl", type=float, default=2e-4)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--float32", action="store_true")
    args = parser.parse_args()
    common.launch(worker, args, args.processes)


if __name__ == "__main__":
    main()
