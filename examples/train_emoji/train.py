"""Train the emoji model: the built-in model's networks, recipe and weights, on emoji.

    python train.py start --run runs
    python train.py vae   --run runs --minutes 13

See README.md for the whole order. Every stage is resumable: run the same command again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "train_builtin"))

import common  # noqa: E402
import read  # noqa: E402
import tokens  # noqa: E402
import train_unet  # noqa: E402
import train_vae  # noqa: E402
import world  # noqa: E402


def build_unet():
    """Return the built-in U-Net without attention at full size: half of the time, little lost.

    An emoji's parts are placed at 8 x 8 and finer only drawn, which convolutions do.
    """
    from diffusers import UNet2DConditionModel

    config = dict(train_unet.build().config)
    config["down_block_types"] = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    config["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return UNet2DConditionModel.from_config(config)


def start(args) -> None:
    """Write the built-in model's parts in diffusers' form, to start from."""
    from builtin import open_builtin

    pipe = open_builtin()
    pipe.save_pretrained(args.run / "builtin")
    unet = build_unet()
    known = pipe.unet.state_dict()
    unet.load_state_dict({key: known[key] for key in unet.state_dict()})
    unet.save_pretrained(args.run / "start")


def vae(args) -> None:
    """Train the VAE: first whole, from the built-in one, then (--decoder-only) its decoder."""
    run = args.run / ("decoder" if args.decoder_only else "vae")
    origin = args.run / ("vae/vae" if args.decoder_only else "builtin/vae")
    settings = argparse.Namespace(
        run=run, start=origin, decoder_only=args.decoder_only, draw=world.batch_of,
        lr=args.lr or 8e-4, minutes=args.minutes, ema=0.995, muon=args.decoder_only,
        batch=args.batch or 8,
        redrawn=None, float32=False, noise=0.15, kl=2e-4,
    )  # fmt: skip
    common.launch(train_vae.worker, settings, args.processes)


def text(args) -> None:
    """Train the text encoder to read captions."""
    run = args.run / "text"
    tokens.save(run / "tokenizer", world.words())
    settings = argparse.Namespace(
        run=run, start=args.run / "builtin", lr=args.lr or 1e-3, minutes=args.minutes,
        batch=args.batch or 64,
    )  # fmt: skip
    common.launch(read.worker, settings, args.processes)


CHUNK = 64  # pictures drawn with one generator
CAPTIONS = 2  # of each picture


def cached(seed: int, start: int) -> tuple[list[world.Spec], list[str]]:
    """Return pictures [start, start + CHUNK) of the cache, and their captions in turn."""
    rng = np.random.default_rng((seed, start))
    specs = [world.random_spec(rng) for _ in range(CHUNK)]
    return specs, [world.caption(spec, rng) for spec in specs for _ in range(CAPTIONS)]


def cache_worker(rank: int, processes: int, args) -> None:
    """Encode pictures [args.first, args.last) and their captions."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    torch.set_grad_enabled(False)
    folder = args.run / "text"
    tokenizer = tokens.load(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    vae = AutoencoderKL.from_pretrained(args.vae).eval().to(memory_format=torch.channels_last)
    if args.what != "latents":
        texts = np.load(args.unet / "text.npy", mmap_mode="r+")
    if args.what != "text":
        latents = np.load(args.unet / "latents.npy", mmap_mode="r+")
    for start in range(args.first + rank * CHUNK, args.last, processes * CHUNK):
        specs, captions = cached(args.seed, start)
        if args.what != "latents":
            ids = tokens.encode(tokenizer, captions)
            said = encoder(ids).last_hidden_state.numpy()
        if args.what != "text":
            x = np.stack([world.render(spec) for spec in specs]).astype(np.float32) / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                code = vae.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist
            latents[start : start + CHUNK, 0] = code.mean.float().numpy()
            latents[start : start + CHUNK, 1] = code.std.float().numpy()
        if args.what != "latents":
            texts[CAPTIONS * start : CAPTIONS * start + len(captions)] = said
        if start % 1280 == 0:
            print(args.what, start, flush=True)
    if rank == 0 and args.what != "latents":
        empty = encoder(tokens.encode(tokenizer, [""])).last_hidden_state.numpy()
        np.save(args.unet / "empty.npy", empty.astype(np.float16))


def cache(args) -> None:
    """Encode training pictures and their captions.

    Again, with another seed, it replaces them by fresh ones, also while the U-Net trains on them.
    """
    args.unet, args.vae = args.run / "unet", args.run / "vae/vae"
    args.unet.mkdir(exist_ok=True)
    args.first, args.last = 0, args.pictures
    side, count = world.SIDE // 4, args.pictures
    shapes = {"latents": (count, 2, 4, side, side), "text": (CAPTIONS * count, 77, 128)}
    for name, shape in shapes.items():
        if name in (args.what or name) and not (args.unet / f"{name}.npy").exists():
            train_unet._open(args.unet, name, shape)
    common.launch(cache_worker, args, args.processes)
    if args.what != "text" and not (args.unet / "scaling_factor").exists():
        latents = np.load(args.unet / "latents.npy", mmap_mode="r")[:5000].astype(np.float32)
        std = float(np.sqrt(latents[:, 0].var() + np.square(latents[:, 1]).mean()))
        print("latent mean", latents[:, 0].mean((0, 2, 3)), "std", latents[:, 0].std((0, 2, 3)))
        (args.unet / "scaling_factor").write_text(f"{1 / std:.6f}\n")


def unet(args) -> None:
    """Train the U-Net on the cache, from the built-in one."""
    settings = argparse.Namespace(
        run=args.run / "unet", start=args.run / "start", lr=args.lr or 1e-3,
        minutes=args.minutes, ema=0.998, muon=True, batch=args.batch or 24, balance=True,
        middle=True, means=False, emphasis=0, channels_last=True, pictures=args.pictures,
    )  # fmt: skip
    common.launch(train_unet.train_worker, settings, args.processes)


GUIDANCE = 2.5  # the default scale of the finished model; more roughens its grounds


def assemble(args) -> None:
    """Write the pipeline as a diffusers folder, at any time during the run."""
    run, decoder = args.run, args.run / "decoder/vae"
    vae = decoder if decoder.exists() else run / "vae/vae"
    train_unet.assemble(run / "unet", vae, run / "text", run / "model", build_unet(), world.words())
    config = run / "model/scheduler/scheduler_config.json"
    values = json.loads(config.read_text()) | {"_mlxdiff_guidance": GUIDANCE}
    config.write_text(json.dumps(values, indent=2) + "\n")


STAGES = {
    "start": start,
    "vae": vae,
    "text": text,
    "cache": cache,
    "unet": unet,
    "assemble": assemble,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--run", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch", type=int, help="samples a process and step")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--decoder-only", action="store_true", help="vae: on frozen latents")
    parser.add_argument("--pictures", type=int, default=4_096)
    parser.add_argument("--seed", type=int, default=2026, help="cache: which pictures to draw")
    parser.add_argument("--what", choices=("text", "latents"), help="cache: only these")
    args = parser.parse_args()
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
