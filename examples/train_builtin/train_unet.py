"""Train the U-Net on cached latents and text embeddings, and assemble the pipeline.

    python train_unet.py cache --run runs/unet --vae runs/vae/vae --text runs/text
    python train_unet.py train --run runs/unet --minutes 75
    python train_unet.py assemble --run runs/unet --vae runs/vae/vae --text runs/text --to model

`cache` draws the pictures, encodes each with the VAE, and encodes its caption with the frozen text
encoder. `train` then runs the U-Net alone. `assemble` writes a diffusers folder in half precision
from the averaged weights, at any time during the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

import common
import data
import numpy as np
import tokens

EMPTY = 0.12  # this share of the captions is replaced by the empty one (for guidance)
TWO = 0.72  # this share of the pictures has two objects
WIDTH = 128  # of the text embeddings


def build(norm_groups: int = 8):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=data.SIDE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 64, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, as in SD 1.x
        norm_num_groups=norm_groups,
    )


def scheduler():
    """Return SD's noise schedule. v-prediction learns low frequencies (background) faster."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


# --- cache -----------------------------------------------------------------------------------


def _open(run: Path, name: str, shape=None):
    path = run / f"{name}.npy"
    if shape is None:
        return np.load(path, mmap_mode="r")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)


def draw(rng: np.random.Generator, easy: float) -> data.Spec:
    """Draw a training picture. One without round or fine outlines is kept with chance `easy`."""
    while True:
        spec = data.random_spec(rng, 2 if rng.random() < TWO else 1)
        fine = any(t.shape in ("circle", "ring") or is_hard(t) for t in spec.things)
        if rng.random() < easy or fine:
            return spec


def is_hard(thing: data.Thing) -> bool:
    """Return True for outlines with turns of a few pixels. Most refused shapes were such stars."""
    return thing.shape in ("star", "ring") and thing.size == "small"


def hard(spec: data.Spec) -> bool:
    return any(is_hard(thing) for thing in spec.things)


CHUNK = 64  # pictures drawn with one generator


def pictures_of(seed: int, start: int, size: int, easy: float) -> tuple[list[data.Spec], list[str]]:
    """Return cached pictures [start, start + size), captions; start is a multiple of CHUNK."""
    rng = np.random.default_rng((seed, start))
    specs = [draw(rng, easy) for _ in range(size)]
    return specs, [data.caption(spec, rng) for spec in specs]


def specs_of(args, count: int) -> list[data.Spec]:
    """Return the first `count` pictures of a cache."""
    starts = range(0, count, CHUNK)
    chunks = [pictures_of(args.seed, s, min(CHUNK, count - s), args.easy)[0] for s in starts]
    return [spec for chunk in chunks for spec in chunk]


def cache_worker(rank: int, processes: int, args) -> None:
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    run, chunk = Path(args.run), CHUNK
    torch.set_grad_enabled(False)
    mine = range(rank * chunk, args.pictures, processes * chunk)
    what = args.what.split("+")
    if "text" in what:
        tokenizer = tokens.load(Path(args.text) / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(Path(args.text) / "text_encoder").eval()
        texts = np.load(run / "text.npy", mmap_mode="r+")
    if "latents" in what:
        vae = AutoencoderKL.from_pretrained(args.vae).eval()
        vae.to(memory_format=torch.channels_last)
        latents = np.load(run / "latents.npy", mmap_mode="r+")
    for start in mine:
        size = min(chunk, args.pictures - start)
        specs, captions = pictures_of(args.seed, start, size, args.easy)
        if "text" in what:
            ids = tokens.encode(tokenizer, captions)
            texts[start : start + size] = encoder(ids).last_hidden_state.numpy()
        if "latents" in what:
            x = np.stack([data.render(spec) for spec in specs]).astype(np.float32) / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                code = vae.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist
            latents[start : start + size, 0] = code.mean.float().numpy()
            latents[start : start + size, 1] = code.std.float().numpy()
        if rank == 0 and start % 6400 == 0:
            print(args.what, start, flush=True)
    if rank == 0 and "text" in what:
        ids = tokens.encode(tokenizer, [""])
        np.save(run / "empty.npy", encoder(ids).last_hidden_state.numpy().astype(np.float16))


def cache(args) -> None:
    run = Path(args.run)
    run.mkdir(parents=True, exist_ok=True)
    side = data.SIDE // 4
    if "text" in args.what:
        _open(run, "text", (args.pictures, 77, WIDTH))
    if "latents" in args.what:
        _open(run, "latents", (args.pictures, 2, 4, side, side))
    common.launch(cache_worker, args, args.processes)
    if "latents" in args.what:
        known = json.loads((args.vae / "config.json").read_text())["scaling_factor"]
        if known != 1.0:  # the VAE of a finished model: its U-Net knows the latents at this scale
            (run / "scaling_factor").write_text(f"{known}\n")
            return
        latents = _open(run, "latents")[:5000].astype(np.float32)
        std = float(np.sqrt(latents[:, 0].var() + np.square(latents[:, 1]).mean()))
        print("latent mean", latents[:, 0].mean((0, 2, 3)), "std", latents[:, 0].std((0, 2, 3)))
        (run / "scaling_factor").write_text(f"{1 / std:.6f}\n")
        print("scaling_factor", 1 / std)


# --- train -----------------------------------------------------------------------------------


class Level:
    """The running size of the loss at a time t, in `bins` equal parts of the range.

    The loss divided by it has the same weight at all times (Karras et al., arXiv:2312.02696,
    section 2.2). In the plain mean the noisiest fifth has more than half of the weight, for places
    that are still unknown. Outlines are decided later.
    """

    def __init__(self, bins: int = 20, decay: float = 0.98) -> None:
        self.means, self.bins, self.decay = [0.1] * bins, bins, decay

    def __call__(self, t, losses):
        """Return the levels for times (B,) after an update with their losses (B,)."""
        at = (t * self.bins // 1000).tolist()
        for i, loss in zip(at, losses.tolist(), strict=True):
            self.means[i] = self.decay * self.means[i] + (1 - self.decay) * loss
        return losses.new_tensor([self.means[i] for i in at])


def train_worker(rank: int, processes: int, args) -> None:
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    run = Path(args.run)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(args.start) if args.start else build()
    unet.set_attn_processor(
        AttnProcessor()
    )  # the backward pass of fused attention is slower on a CPU
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    alphas = scheduler().alphas_cumprod
    factor = float((run / "scaling_factor").read_text())
    latents, texts = _open(run, "latents"), _open(run, "text")
    empty = torch.from_numpy(np.load(run / "empty.npy"))[0].float()
    training = common.Training(
        rank, processes, run, unet, args.lr, args.minutes, ema=args.ema, muon=args.muon
    )
    level = Level()
    size, pictures = args.batch, min(args.pictures, len(latents))
    share = None
    if args.emphasis:
        share = np.array([1 + args.emphasis * hard(spec) for spec in specs_of(args, pictures)])
        share = share / share.sum()
    captions = len(texts) // len(latents)  # of each picture
    while not training.done:
        rng = np.random.default_rng((3, training.step, rank))
        torch.manual_seed(processes * training.step + rank)
        rows = np.sort(rng.choice(pictures, size, p=share))
        code = torch.from_numpy(latents[rows].astype(np.float32))
        said = rows if captions == 1 else rows * captions + rng.integers(captions, size=size)
        text = torch.from_numpy(texts[said].astype(np.float32))
        text[torch.from_numpy(rng.random(size) < EMPTY)] = empty
        x = code[:, 0]
        if not args.means:
            x = x + code[:, 1] * torch.randn_like(x)
        x = x * factor
        # one timestep from each of `size` equal parts: less noise in the loss
        u = (rng.permutation(size) + rng.random(size)) / size
        if args.middle:  # sine density: few times that decide only places, few at the end
            u = np.arccos(1 - 2 * u) / np.pi
        t = torch.from_numpy((u * 1000).astype(int))
        signal = alphas[t].sqrt()[:, None, None, None]
        sigma = (1 - alphas[t]).sqrt()[:, None, None, None]
        noise = torch.randn_like(x)
        noisy, goal = signal * x + sigma * noise, signal * noise - sigma * x
        if args.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(noisy, t, text).sample
        each = (v.float() - goal).square().mean((1, 2, 3))
        loss = (each / level(t, each.detach())).mean() if args.balance else each.mean()
        training.update(loss, size, mse=each.mean())
    training.save()


# --- redraw ----------------------------------------------------------------------------------

STEPS = 3


def redraw_worker(rank: int, processes: int, args) -> None:
    """Noise cached latents part of the way, and let the U-Net draw them again.

    The decoder can learn to correct the U-Net's wrong outlines (train_vae.py --redrawn). Place and
    size stay the same, so the true picture is known.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    run = Path(args.run)
    torch.set_grad_enabled(False)
    unet = UNet2DConditionModel.from_pretrained(args.start).eval()
    unet.set_attn_processor(AttnProcessor())
    alphas = scheduler().alphas_cumprod
    factor = float((run / "scaling_factor").read_text())
    latents, texts = _open(run, "latents"), _open(run, "text")
    empty = torch.from_numpy(np.load(run / "empty.npy")).float()
    specs = specs_of(args, min(args.pictures, len(latents)))
    order = np.random.default_rng(31).permutation(len(specs))
    chosen = [i for i in order if hard(specs[i]) or i % 3 == 0][rank::processes]
    chosen = np.sort(chosen[: args.redraw // processes])
    rng = np.random.default_rng((32, rank))
    torch.manual_seed(rank)
    drawn, batch = [], 32
    for start in range(0, len(chosen), batch):
        rows = chosen[start : start + batch]
        text = torch.from_numpy(texts[rows].astype(np.float32))
        text = torch.cat([empty.expand_as(text), text])
        x = torch.from_numpy(latents[rows, 0].astype(np.float32)) * factor
        times = np.linspace(rng.uniform(150, 500), 0, STEPS + 1).astype(int)
        guidance = float(rng.choice((2.0, 4.0, 4.0, 7.5)))
        x = alphas[times[0]].sqrt() * x + (1 - alphas[times[0]]).sqrt() * torch.randn_like(x)
        for t, after in itertools.pairwise(times):  # DDIM
            with torch.autocast("cpu", torch.bfloat16):
                negative, positive = unet(torch.cat([x, x]), int(t), text).sample.float().chunk(2)
            v = negative + guidance * (positive - negative)
            clean = alphas[t].sqrt() * x - (1 - alphas[t]).sqrt() * v
            noise = alphas[t].sqrt() * v + (1 - alphas[t]).sqrt() * x
            x = alphas[after].sqrt() * clean + (1 - alphas[after]).sqrt() * noise
        drawn.append((clean / factor).numpy().astype(np.float16))
        if rank == 0:
            print("redrawn", start, flush=True)
    pictures = np.stack([data.render(specs[i]) for i in chosen])
    np.savez(run / f"redrawn-{rank}.npz", latents=np.concatenate(drawn), pictures=pictures)


# --- assemble --------------------------------------------------------------------------------


def assemble(run: Path, vae: Path, text: Path, to: Path, unet=None, words=None) -> None:
    """Write the pipeline (float16, averaged U-Net weights) as a diffusers folder.

    `unet` (any weights) and `words` are those of the built-in model unless given.
    """
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextModel

    unet = unet or build()
    state = torch.load(run / "last.pt", weights_only=True)
    with torch.no_grad():
        for p, e in zip(unet.parameters(), state["ema"], strict=True):
            p.copy_(e)
    autoencoder = AutoencoderKL.from_pretrained(vae)
    factor = float((run / "scaling_factor").read_text())
    autoencoder.register_to_config(scaling_factor=factor)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder"),
        tokenizer=tokens.load(text / "tokenizer"),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(to, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(to)
    for name in ("vocab.json", "merges.txt"):  # newer transformers write only tokenizer.json
        shutil.copy(text / "tokenizer" / name, to / "tokenizer" / name)
    tokens.name_words(to / "tokenizer", words or data.words())
    config = to / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    values["clip_sample"] = False  # DDIM and DDPM built from this file would clip the latents
    values = {key: value for key, value in values.items() if value != float("-inf")}  # no JSON
    config.write_text(json.dumps(values, indent=2) + "\n")
    for config in to.glob("*/*config.json"):  # the origin of the parts does not matter here
        values = json.loads(config.read_text())
        for key in ("_name_or_path", "is_local", "local_files_only"):
            values.pop(key, None)
        config.write_text(json.dumps(values, indent=2) + "\n")
    for file in to.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    total = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    print(f"{to}: {total:,} bytes, {state['samples']} samples seen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("cache", "train", "redraw", "assemble"))
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--text", type=Path, help="run folder of train_text.py")
    parser.add_argument("--to", type=Path, help="assemble: folder to write")
    parser.add_argument("--start", type=Path, help="train: U-Net folder to start from")
    parser.add_argument("--seed", type=int, default=2024, help="cache: which pictures to draw")
    parser.add_argument("--easy", type=float, default=1.0, help="cache: share of easy ones to keep")
    parser.add_argument("--means", action="store_true", help="train: no noise of the VAE's")
    parser.add_argument("--emphasis", type=float, default=0, help="train: this often again: hard")
    parser.add_argument("--middle", action="store_true", help="train: fewer of both ends of time")
    parser.add_argument("--balance", action="store_true", help="train: all times count alike")
    parser.add_argument("--pictures", type=int, default=80_000)
    parser.add_argument("--what", default="text+latents", help="cache: text, latents or both")
    parser.add_argument("--redraw", type=int, default=5000, help="redraw: how many pictures")
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--batch", type=int, default=24, help="samples a process and step")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--muon", action="store_true", help="train: matrices by Muon, not AdamW")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    if args.stage == "cache":
        cache(args)
    elif args.stage == "train":
        common.launch(train_worker, args, args.processes)
    elif args.stage == "redraw":
        common.launch(redraw_worker, args, args.processes)
    else:
        assemble(args.run, args.vae, args.text, args.to)


if __name__ == "__main__":
    main()
