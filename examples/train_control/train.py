"""Train an edge ControlNet for the built-in model: outlines from a picture, colors from the prompt.

    python train.py --run runs/edges --to edges

One core, no GPU. It needs torch and diffusers. The result is a folder in diffusers' form, which
needs only mlxdiff:

    mlxdiff generate "a purple star on a pink background" -g 4 --controlnet edges \
        --control-image PICTURE --control-preprocess edges

The pictures and captions are those of the built-in model's training (examples/train_builtin), the
edges are mlxdiff's own, and no weight of the model changes. The same command continues a stopped
run. The file RUN/minutes shortens or extends a run while it goes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from mlxdiff.pictures.preprocess import edges

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
import common
import data
import judge
from builtin import open_builtin, text_of

CHANNELS = (16, 32, 64)  # widths of the layers that read the edges; two halvings, as in the VAE
EMPTY = 0.4  # this share of the captions is empty: only the edges give the places
OTHER = 0.25  # this share of the captions names other shapes: the edges are right


@torch.no_grad()
def cache(path: Path, count: int, seed: int) -> None:
    """Make latents, edges and text of this many pictures once, for all epochs."""
    pipe, rng = open_builtin(), np.random.default_rng(seed)
    factor = pipe.vae.config.scaling_factor
    kept: dict[str, list[np.ndarray]] = {"means": [], "deviations": [], "edges": [], "texts": []}
    for start in range(0, count, 64):
        size = min(64, count - start)
        specs = [data.random_spec(rng, 2 if rng.random() < 0.6 else 1) for _ in range(size)]
        pictures = [data.render(spec) for spec in specs]
        told = [judge.otherwise(spec, rng) if rng.random() < OTHER else spec for spec in specs]
        x = torch.from_numpy(np.stack(pictures).astype(np.float32) / 127.5 - 1)
        with torch.autocast("cpu", torch.bfloat16):
            code = pipe.vae.encode(x.permute(0, 3, 1, 2)).latent_dist
            text = text_of(pipe, [data.caption(spec, rng) for spec in told])
        kept["means"].append((code.mean.float() * factor).half().numpy())
        kept["deviations"].append((code.std.float() * factor).half().numpy())
        kept["edges"].append(np.stack([edges(picture)[..., 0] for picture in pictures]))
        kept["texts"].append(text.half().numpy())
        if start % 1024 == 0:
            print(f"{start} of {count} pictures", flush=True)
    empty = text_of(pipe, [""])[0].numpy()
    partial = path.with_name("partial.npz")
    np.savez(partial, empty=empty, **{name: np.concatenate(rows) for name, rows in kept.items()})
    partial.replace(path)


def shown_to(edge_maps: torch.Tensor) -> torch.Tensor:
    """Convert edges (N, H, W), uint8, to the ControlNet's input: (N, 3, H, W) in [0, 1]."""
    picture = (edge_maps.float() / 255)[:, None].expand(-1, 3, -1, -1)
    return picture.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def awaken(net: ControlNetModel, picture: torch.Tensor) -> None:
    """Initialize the layers that read the edges so that their signal survives.

    Edges are few thin lines. With torch's initialization they fade at every layer, and the last
    layer starts at zero and has nothing to learn from. Here the output of each layer has unit
    variance (Mishkin and Matas 2016). The output of the last layer has half the deviation of the
    values that it is added to. The convolutions on the way to the U-Net stay zero: training starts
    with the model's own pictures.
    """
    look = net.controlnet_cond_embedding
    x = picture
    for layer in (look.conv_in, *look.blocks, look.conv_out):
        torch.nn.init.orthogonal_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        layer.weight /= layer(x).std()
        x = torch.nn.functional.silu(layer(x))
    look.conv_out.weight *= 0.5 * net.conv_in(torch.randn(64, 4, 16, 16)).std()


def train_worker(rank: int, processes: int, args: argparse.Namespace) -> None:
    """Train the ControlNet to help the U-Net predict v (Salimans and Ho 2022)."""
    torch.manual_seed(args.seed)
    path = args.run / "cache.npz"
    if not path.exists():
        cache(path, args.pictures, args.seed)
    kept = {name: torch.from_numpy(rows) for name, rows in np.load(path).items()}
    pipe = open_builtin()
    unet, alphas = pipe.unet.requires_grad_(False), pipe.scheduler.alphas_cumprod
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CHANNELS)
    awaken(net, shown_to(kept["edges"][:64]))
    for part in (unet, net):
        part.set_attn_processor(AttnProcessor())  # the backward pass of fused attention is slower
        part.to(memory_format=torch.channels_last)
    training = common.Training(
        rank, processes, args.run, net, args.lr, args.minutes, ema=args.ema, muon=True
    )
    rng, size = np.random.default_rng((args.seed, training.step)), args.batch
    while not training.done:
        rows = torch.from_numpy(rng.integers(0, len(kept["means"]), size))
        means, deviations = kept["means"][rows].float(), kept["deviations"][rows].float()
        x = means + deviations * torch.randn_like(means)
        text = kept["texts"][rows].float()
        text[torch.from_numpy(rng.random(size) < EMPTY)] = kept["empty"]
        # One timestep from each of `size` equal parts, and more of the noisy ones (the root):
        # they decide the places.
        t = ((rng.permutation(size) + rng.random(size)) / size) ** 0.5 * 1000
        t = torch.from_numpy(t.astype(int).clip(0, 999))
        signal, sigma = (p.sqrt()[:, None, None, None] for p in (alphas[t], 1 - alphas[t]))
        noise = torch.randn_like(x)
        noisy = (signal * x + sigma * noise).contiguous(memory_format=torch.channels_last)
        picture = shown_to(kept["edges"][rows])
        with torch.autocast("cpu", torch.bfloat16):
            down, mid = net(noisy, t, text, controlnet_cond=picture, return_dict=False)
            # The U-Net's way down needs no gradient: it does not depend on the ControlNet.
            told = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            v = unet(noisy, t, text, **told).sample
        loss = (v.float() - (signal * noise - sigma * x)).square().mean()
        training.update(loss, size)
        if training.step % args.look == 0:
            print(draw(pipe, net, training), flush=True)
    training.save()


@torch.no_grad()
def draw(pipe: StableDiffusionPipeline, net: ControlNetModel, training: common.Training) -> str:
    """Draw with the averaged weights, 16 pictures in 10 steps. Return how well they follow."""
    told = judge.tasks(16)
    learnt = [p.clone() for p in training.parameters]
    training.use_ema()
    drawer = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net, requires_safety_checker=False
    )
    drawer.set_progress_bar_config(disable=True)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = drawer(
            [task.prompt for task in told],
            image=[Image.fromarray(edges(task.picture)) for task in told],
            num_inference_steps=10,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(1),
        ).images
    for p, value in zip(training.parameters, learnt, strict=True):
        p.copy_(value)
    return judge.shown(judge.score([np.asarray(picture) for picture in drawn], told))


def write(run: Path, to: Path) -> None:
    """Write the averaged weights as a diffusers folder in half precision."""
    net = ControlNetModel.from_unet(
        open_builtin().unet, conditioning_embedding_out_channels=CHANNELS
    )
    averaged = torch.load(run / "last.pt", weights_only=True)["ema"]
    with torch.no_grad():
        for p, value in zip(net.parameters(), averaged, strict=True):
            p.copy_(value)
    net.half().save_pretrained(to)
    print(f"{to}: {sum(file.stat().st_size for file in to.iterdir()):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--to", type=Path, default=Path("edges"), help="folder to write")
    parser.add_argument("--pictures", type=int, default=14336)
    parser.add_argument("--minutes", type=float, default=26)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--look", type=int, default=250, help="draw after every so many steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common.launch(train_worker, args, 1)
    write(args.run, args.to)


if __name__ == "__main__":
    main()
