"""Train an image-variation model for the built-in model's world.

    python train.py --run runs/variations --to like

It needs torch, diffusers and transformers. One core, no GPU, 45 minutes; the same command continues
a stopped run. The result is a folder of diffusers' StableDiffusionImageVariationPipeline, which
needs only mlxdiff:

    mlxdiff generate -m like -i PICTURE --variations 4

A small CLIP image encoder sees a picture. The built-in U-Net reads its embedding, one token, in
place of the text, and draws another picture of the same things. Both start from words: a code of a
picture mixes what the text encoder makes of its things and of its background. From such a code the
built-in U-Net already draws one thing right. So first the encoder learns to give this code, and to
name the thing on each patch (--seeing minutes). Then the U-Net learns to read the embeddings.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pairs
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
import common
import data
from builtin import open_builtin, text_of

WIDTH = 128  # of the embedding: what the built-in U-Net reads
WITHOUT = 0.1  # share of the samples with zeros for the embedding, for guidance
GUIDANCE = 3.0  # the default scale of the finished model
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_encoder() -> CLIPVisionModelWithProjection:
    """Return a CLIP image encoder of half a million parameters for pictures of 64 pixels.

    Its positions begin as waves along x and y. So it knows from the start which patches are near.
    """
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=data.SIDE,
        patch_size=pairs.PATCH,
        projection_dim=WIDTH,
        attn_implementation="sdpa",
    )
    encoder = CLIPVisionModelWithProjection(config)
    at = torch.arange(data.SIDE // pairs.PATCH).float()
    angles = at[:, None] * torch.logspace(0.3, -1, config.hidden_size // 4)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    down, right = torch.broadcast_tensors(waves[:, None], waves[None])
    positions = encoder.vision_model.embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] = 0.1 * torch.cat([down, right], -1).flatten(0, 1)
    return encoder


class Seeing(torch.nn.Module):
    """The image encoder, and heads that name the thing on each patch while it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = make_encoder()
        width = self.encoder.config.hidden_size
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, len(w)) for w in pairs.THING)

    def forward(self, specs: list[data.Spec], level: float) -> tuple[torch.Tensor, ...]:
        """Draw pictures with some noise, and see them.

        Returns: their embeddings, (B, WIDTH); the cross-entropy of the facts of the thing on each
            patch; the share of right shapes.
        """
        pictures = np.stack([data.render(spec) for spec in specs])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        x = x + level * torch.randn_like(x)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        seen = self.encoder.vision_model(pixel_values=(x - mean) / std, output_hidden_states=True)
        embeds = self.encoder.visual_projection(seen.pooler_output).float()
        where = [pairs.patches(spec) for spec in specs]
        right = np.concatenate(
            [np.array(pairs.facts(s)[1])[w[w >= 0]] for s, w in zip(specs, where, strict=True)]
        )
        # The last layer collects what the patches know before it.
        tokens = seen.hidden_states[-2][:, 1:][torch.from_numpy(np.stack(where)) >= 0]
        answers = [head(tokens).float() for head in self.heads]
        facts = torch.from_numpy(right).T
        naming = sum(map(torch.nn.functional.cross_entropy, answers, facts))
        return embeds, naming, (answers[0].argmax(1) == facts[0]).float().mean()


class Codes:
    """Codes of pictures, from the states that the text encoder has at their words."""

    @torch.no_grad()
    def __init__(self, pipe) -> None:
        def last(captions: list[str], back: int) -> torch.Tensor:
            ids = pipe.tokenizer(captions).input_ids
            ends = torch.tensor([row.index(pipe.tokenizer.eos_token_id) for row in ids])
            return text_of(pipe, captions)[torch.arange(len(ids)), ends - back]

        things = list(itertools.product(*pairs.THING))
        said = last([f"a {size} {color} {shape}" for shape, color, size in things], 1)
        self.mean = said.mean(0)
        self.things = dict(zip(things, said - self.mean, strict=True))
        grounds = [f"a red circle on a {name} background" for name in data.BACKGROUNDS]
        self.grounds = dict(zip(data.BACKGROUNDS, last(grounds, 2), strict=True))

    def __call__(self, specs: list[data.Spec]) -> torch.Tensor:
        """Return the codes of pictures, (B, WIDTH): equal for pictures with the same things."""
        found = [
            self.grounds[spec.background]
            + self.mean
            + sum(self.things[thing.shape, thing.color, thing.size] for thing in spec.things)
            for spec in specs
        ]
        return torch.stack(found) / 2


def averaged(model: torch.nn.Module, run: Path) -> None:
    """Put the averaged weights of a run into its model."""
    kept = torch.load(run / "last.pt", weights_only=True)["ema"]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)


def see(rank: int, processes: int, args: argparse.Namespace) -> None:
    """Train the encoder to give the codes."""
    torch.manual_seed(args.seed)
    model, codes, size = Seeing(), Codes(open_builtin()), 2 * args.batch
    training = common.Training(
        rank, processes, args.run, model, 2 * args.lr, args.seeing, ema=args.ema, muon=True
    )
    while not training.done:
        rng = np.random.default_rng((args.seed, 1, training.step, rank))
        torch.manual_seed(processes * training.step + rank)
        specs = pairs.random_specs(rng, size)
        with torch.autocast("cpu", torch.bfloat16):
            seen, naming, shapes = model(specs, 0.02 * rng.random())
        off = (seen - codes(specs)).square().mean()
        training.update(off + naming, size, off=off.detach(), shapes=shapes)
    training.save()


def draw(rank: int, processes: int, args: argparse.Namespace) -> None:
    """Train the U-Net: the encoder sees one drawing, the U-Net draws another one."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe, seeing = open_builtin(), Seeing()
    averaged(seeing, args.seen)
    unet = pipe.unet.train().to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # the gradient of the fused one is slower on a CPU
    training = common.Training(
        rank, processes, args.run, unet, args.lr, args.minutes, ema=args.ema, muon=True
    )
    latents = torch.from_numpy(np.load(args.latents))
    specs = pairs.random_specs(np.random.default_rng(args.seed), len(latents))
    alphas, size = pipe.scheduler.alphas_cumprod, args.batch
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
            with torch.no_grad():
                others = [pairs.redrawn(specs[row], rng) for row in rows]
                token, _, _ = seeing(others, 0.02 * rng.random())
            token = token * torch.from_numpy(rng.random((size, 1)) >= WITHOUT)
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            v = unet(noisy, t, token[:, None]).sample
        training.update((v.float() - goal).square().mean(), size)
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


def write(seen: Path, drawn: Path, to: Path) -> None:
    """Write the averaged weights in half precision as diffusers' pipeline does."""
    from diffusers import StableDiffusionImageVariationPipeline

    pipe, seeing = open_builtin(), Seeing()
    averaged(seeing, seen)
    if (drawn / "last.pt").exists():  # else the encoder with the built-in U-Net
        averaged(pipe.unet, drawn)
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
    parser.add_argument("--seeing", type=float, default=15, help="minutes for the encoder")
    parser.add_argument("--minutes", type=float, default=30, help="for the U-Net")
    parser.add_argument("--batch", type=int, default=32, help="of the U-Net; twice for the encoder")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.seen, args.latents = args.run / "seeing", args.run / "latents.npy"
    args.run.mkdir(parents=True, exist_ok=True)
    if not args.latents.exists():
        encode(args.latents, args.pictures, args.seed)
    for stage, name in ((see, "seeing"), (draw, "drawing")):
        common.launch(stage, argparse.Namespace(**vars(args) | {"run": args.run / name}), 1)
    write(args.seen, args.run / "drawing", args.to)


if __name__ == "__main__":
    main()
