"""Train the VAE on freshly drawn pictures: 64 x 64 pixels to 16 x 16 x 4 latents.

    python train_vae.py --run runs/vae --minutes 30
    python train_vae.py --run runs/vae-decoder --start runs/vae/vae --decoder-only --minutes 28
    python train_vae.py ... --redrawn runs/unet/redrawn-*.npz

Half of the pictures hold three to six overlapping objects, so that every sample has many edges. The
second command continues with the decoder alone, on frozen latents. The third also uses latents
drawn by the U-Net, with the pictures that they should become. RUN/vae is the result.

    python train_vae.py --gate runs/vae/vae

scores reconstructions with the checker. Start the U-Net only when at least 97 % (one object) and 95
% (two) are fully right: a U-Net cannot draw pictures that the decoder cannot.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import data
import numpy as np


def batch_of(rng: np.random.Generator, size: int, dense: float = 0.5) -> np.ndarray:
    """Return pictures as float32 (B, 3, H, W) in [-1, 1]."""
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
        rank,
        processes,
        args.run,
        vae,
        args.lr,
        args.minutes,
        ema=args.ema,
        betas=(0.9, 0.95),
        muon=args.muon,
    )
    fresh = args.batch
    if args.redrawn:
        files = [np.load(file) for file in args.redrawn]
        redrawn, pictures = (np.concatenate([f[k] for f in files]) for k in ("latents", "pictures"))
        fresh = args.batch // 2
    while not training.done:
        rng = np.random.default_rng((training.step, rank, int(args.decoder_only)))
        torch.manual_seed(1000 * training.step + rank)
        x = torch.from_numpy(args.draw(rng, fresh)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            with torch.set_grad_enabled(not args.decoder_only):
                code = vae.encode(x).latent_dist
                mean, logvar = code.mean.float(), code.logvar.float()
                spread = torch.exp(0.5 * logvar)
            if args.decoder_only:  # tolerate slightly wrong latents of the U-Net
                spread = spread + args.noise * torch.rand(fresh, 1, 1, 1)
            z = mean + spread * torch.randn_like(mean)
            if args.redrawn:
                rows = rng.integers(0, len(redrawn), args.batch - fresh)
                drawn = torch.from_numpy(redrawn[rows].astype(np.float32))
                drawn = drawn + args.noise / 3 * torch.rand(len(drawn), 1, 1, 1) * torch.randn_like(
                    drawn
                )
                z = torch.cat([z, drawn])
                truth = torch.from_numpy(pictures[rows].astype(np.float32) / 127.5 - 1)
                x = torch.cat([x, truth.permute(0, 3, 1, 2)])
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


def gate(folder: str, pictures: int = 256, sheet: str | None = None) -> None:
    """Score encode + decode of true pictures (fresh ones, with held-out combinations)."""
    import checker
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    rng = np.random.default_rng(4321)
    for count, kind in ((1, "train"), (1, "pair"), (2, "train"), (2, "pair"), (2, "combination")):
        specs = [data.random_spec(rng, count, kind) for _ in range(pictures)]
        truth = np.stack([data.render(spec) for spec in specs])
        drawn = []
        with torch.no_grad():
            for x in np.split(truth, range(32, pictures, 32)):
                x = torch.from_numpy(x.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
                drawn.append(vae.decode(vae.encode(x).latent_dist.mean).sample)
        drawn = torch.cat(drawn).clamp(-1, 1).permute(0, 2, 3, 1).numpy()
        drawn = np.round((drawn + 1) * 127.5).astype(np.uint8)
        psnr = -10 * np.log10(np.square((drawn.astype(float) - truth) / 255).mean())
        result = checker.score(drawn, specs)
        print(count, kind, f"{psnr:.1f} dB", " ".join(f"{k} {v:.3f}" for k, v in result.items()))
    if sheet:
        pairs = np.stack([truth[:48], drawn[:48]], 1).reshape(8, 12, 64, 64, 3)
        image = Image.fromarray(pairs.transpose(0, 2, 1, 3, 4).reshape(512, 768, 3))
        image.resize((1536, 1024), Image.Resampling.NEAREST).save(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", help="folder of this run (resumed if it exists)")
    parser.add_argument("--gate", metavar="VAE", help="only score this VAE folder")
    parser.add_argument("--sheet", help="with --gate: PNG of pictures and their reconstructions")
    parser.add_argument("--start", help="VAE folder to start from")
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument(
        "--redrawn", nargs="+", help="files of train_unet.py redraw: half of a batch"
    )
    parser.add_argument("--muon", action="store_true", help="matrices by Muon, not AdamW")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 32, 64])
    parser.add_argument("--batch", type=int, default=8, help="pictures a process and step")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--kl", type=float, default=2e-4)
    parser.add_argument("--noise", type=float, default=0.15, help="on latents: --decoder-only")
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--float32", action="store_true")
    args = parser.parse_args()
    args.draw = batch_of
    if args.gate:
        gate(args.gate, sheet=args.sheet)
        return
    if not args.run:
        parser.error("--run is needed")
    common.launch(worker, args, args.processes)


if __name__ == "__main__":
    main()
