"""Train an image-variation model for the built-in model's world.

    python train.py --run runs/variations --to like

It needs torch, diffusers and transformers. One core, no GPU, 45 minutes; the same command continues
a stopped run. The result is a folder of diffusers' StableDiffusionImageVariationPipeline, which
needs only mlxdiff:

    mlxdiff generate -m like -i PICTURE --variations 4

A small CLIP image encoder sees a picture. The built-in U-Net reads its embedding, one token, in
place of the text, and learns to draw another picture of the same things. First the encoder alone
learns to name the things (--seeing minutes). Then both train at once, with the error of the U-Net.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pairs
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
import common
import data
from builtin import open_builtin

WIDTH = 128  # of the embedding: what the built-in U-Net reads
WITHOUT = 0.1  # share of the samples with zeros for the embedding, for guidance
GUIDANCE = 3.0  # the default scale of the finished model
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Seeing(torch.nn.Module):
    """The image encoder, and heads that name the facts in its embedding while it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=data.SIDE,
                patch_size=8,
                projection_dim=WIDTH,
                attn_implementation="sdpa",
            )
        )
        self.heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, n) for n in pairs.CHOICES)

    def forward(self, specs: list[data.Spec], level: float) -> tuple[torch.Tensor, ...]:
        """Draw and see pictures with some noise.

        Returns: their embeddings, (B, WIDTH); the cross-entropy of the facts; the share named.
        """
        pictures = np.stack([data.render(spec) for spec in specs])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        x = x + level * torch.randn_like(x)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        seen = self.encoder((x - mean) / std).image_embeds.float()
        right = torch.tensor([pairs.facts(spec) for spec in specs]).T
        answers = [head(seen) for head in self.heads]
        losses = map(torch.nn.functional.cross_entropy, answers, right)
        named = [a.argmax(1) == fact for a, fact in zip(answers, right, strict=True)]
        return seen, sum(losses), torch.stack(named).float().mean()


class Both(torch.nn.Module):
    """The image encoder and the U-Net that reads it."""

    def __init__(self, seeing: Seeing, unet: torch.nn.Module) -> None:
        super().__init__()
        self.seeing, self.unet = seeing, unet


def averaged(model: torch.nn.Module, run: Path) -> None:
    """Put the averaged weights of a run into its model."""
    kept = torch.load(run / "last.pt", weights_only=True)["ema"]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)


def see(rank: int, processes: int, args: argparse.Namespace) -> None:
    """Train the encoder to name the facts."""
    torch.manual_seed(args.seed)
    model = Seeing()
    training = common.Training(
        rank, processes, args.run, model, 2 * args.lr, args.seeing, ema=args.ema, muon=True
    )
    while not training.done:
        rng = np.random.default_rng((args.seed, 1, training.step, rank))
        torch.manual_seed(processes * training.step + rank)
        with torch.autocast("cpu", torch.bfloat16):
            _, loss, named = model(pairs.random_specs(rng, 2 * args.batch), 0.02 * rng.random())
        training.update(loss, 2 * args.batch, named=named)
    training.save()


def draw(rank: int, processes: int, args: argparse.Namespace) -> None:
    """Train the encoder and the U-Net: see one drawing, draw another one."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe, seeing = open_builtin(), Seeing()
    averaged(seeing, args.seen)
    unet = pipe.unet.train().to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # the gradient of the fused one is slower on a CPU
    both = Both(seeing, unet)
    training = common.Training(
        rank, processes, args.run, both, args.lr, args.minutes, ema=args.ema, muon=True
    )
    latents = torch.from_numpy(np.load(args.latents))
    specs = pairs.random_specs(np.random.default_rng(args.seed), len(latents))
    alphas = pipe.scheduler.alphas_cumprod
    size = args.batch
    while not training.done:
        rng = np.random.default_rng((args.seed, 2, training.step, rank))
        torch.manual_seed(processes * training.step + rank)
        rows = rng.choice(len(specs), size, replace=False)
        x, noise = latents[rows], torch.randn(size, *latents.shape[1:])
        # One time from each part of the range; few at both ends, which tell least of the things.
        parts = (rng.permutation(size) + rng.random(size)) / size
        t = torch.from_numpy((np.arccos(1 - 2 * parts) / np.pi * 1000).astype(int))
        signal, sigma = (a.sqrt()[:, None, None, None] for a in (alphas[t], 1 - alphas[t]))
        noisy, goal = signal * x + sigma * noise, signal * noise - sigma * x
        with torch.autocast("cpu", torch.bfloat16):
            others = [pairs.redrawn(specs[row], rng) for row in rows]
            seen, naming, named = seeing(others, 0.02 * rng.random())
            token = seen * torch.from_numpy(rng.random((size, 1)) >= WITHOUT)
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            v = unet(noisy, t, token[:, None]).sample
        loss = (v.float() - goal).square().mean()
        training.update(loss + args.naming * naming, size, mse=loss.detach(), named=named)
    training.save()


@torch.no_grad()
def encode(path: Path, count: int, seed: int) -> None:
    """Draw the pictures that the U-Net learns to draw, and keep their latents."""
    pipe, found = open_builtin(), []
    torch.set_num_threads(1)
    specs = pairs.random_specs(np.random.default_rng(seed), count)
    for start in range(0, count, 64):
        pictures = np.stack([data.render(spec) for spec in specs[start : start + 64]])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            found.append(pipe.vae.encode(x).latent_dist.mean.float())
    latents = torch.cat(found) * pipe.vae.config.scaling_factor
    partial = path.with_suffix(".part.npy")
    np.save(partial, latents.numpy())
    partial.replace(path)


def write(run: Path, to: Path) -> None:
    """Write the averaged weights in half precision as diffusers' pipeline does."""
    from diffusers import StableDiffusionImageVariationPipeline

    pipe, seeing = open_builtin(), Seeing()
    averaged(Both(seeing, pipe.unet), run)
    # The built-in scheduler's fitted steps belong to the built-in U-Net.
    config = {key: value for key, value in pipe.scheduler.config.items() if "_fitted" not in key}
    side = {"height": data.SIDE, "width": data.SIDE}
    StableDiffusionImageVariationPipeline(
        vae=pipe.vae.half(),
        image_encoder=seeing.encoder.half(),
        unet=pipe.unet.half(),
        scheduler=type(pipe.scheduler).from_config(config | {"_mlxdiff_guidance": GUIDANCE}),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": data.SIDE}, crop_size=side, image_mean=MEAN, image_std=STD
        ),
        requires_safety_checker=False,
    ).save_pretrained(to)
    # Without torchvision, transformers writes the name of its stand-in.
    index = to / "model_index.json"
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
    print(f"{to}: {sum(f.stat().st_size for f in to.rglob('*') if f.is_file()):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--to", type=Path, default=Path("like"), help="folder to write")
    parser.add_argument("--pictures", type=int, default=8192, help="that the U-Net learns to draw")
    parser.add_argument("--seeing", type=float, default=7, help="minutes for the encoder alone")
    parser.add_argument("--minutes", type=float, default=38, help="for both")
    parser.add_argument("--naming", type=float, default=0.01, help="weight of the facts in both")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--batch", type=int, default=32, help="of the U-Net; the encoder alone: twice"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.seen, args.latents = args.run / "seeing", args.run / "latents.npy"
    args.run.mkdir(parents=True, exist_ok=True)
    if not args.latents.exists():
        encode(args.latents, args.pictures, args.seed)
    for stage, name in ((see, "seeing"), (draw, "drawing")):
        stage_args = argparse.Namespace(**vars(args) | {"run": args.run / name})
        common.launch(stage, stage_args, args.processes)
    write(args.run / "drawing", args.to)


if __name__ == "__main__":
    main()
