"""Train a compact network that enlarges the built-in model's pictures four times.

    python train.py --run runs/upscaler --to shapes-x4.safetensors

One core, no GPU, ten minutes. It needs torch and diffusers. The result is a file as Real-ESRGAN's
compact networks are (SRVGGNetCompact), which needs only mlxdiff:

    mlxdiff generate "a small red star on a blue background" --upscaler shapes-x4.safetensors

The large pictures are drawn by the script that drew the built-in model's training data
(examples/train_builtin); the small ones are the same pictures at 64 pixels, half of them through
the built-in VAE, so that the network learns to undo its blur. The same command continues a stopped
run. The file RUN/minutes shortens or extends a run while it goes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
import common
import data

SCALE, WIDTH, DEPTH = 4, 24, 8
FLAT = 20  # levels: pieces of less contrast teach nothing
WEIGHT = 100.0  # of the squared error: the gradients are about 1
SMALL = 24  # side of a piece that the network sees in training, in small pixels


class Compact(torch.nn.Module):
    """Real-ESRGAN's compact network: convolutions at the small size, one shuffle at the end."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3] + [WIDTH] * (DEPTH + 1)
        layers: list[torch.nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.PReLU(outputs)]
        self.body = torch.nn.ModuleList(
            [*layers, torch.nn.Conv2d(WIDTH, 3 * SCALE**2, 3, padding=1)]
        )
        self.begin_bilinear()

    @torch.no_grad()
    def begin_bilinear(self) -> None:
        """Begin with bilinear interpolation: the first three channels carry the picture through."""
        *convs, last = [layer for layer in self.body if isinstance(layer, torch.nn.Conv2d)]
        for conv, slopes in zip(convs, self.body[1::2], strict=True):
            conv.weight[:3], conv.bias[:3], slopes.weight[:3] = 0, 0, 1
            for channel in range(3):
                conv.weight[channel, channel, 1, 1] = 1
        last.weight *= 0.1
        last.weight[:, :3], last.bias[:] = 0, 0
        offsets = (np.arange(SCALE) + 0.5) / SCALE - 0.5  # of the centers, in small pixels
        shares = np.stack([np.maximum(-offsets, 0), 1 - abs(offsets), np.maximum(offsets, 0)], 1)
        for i in range(SCALE):
            for j in range(SCALE):
                kernel = torch.from_numpy(np.outer(shares[i], shares[j])).float()
                kernel[1, 1] -= 1  # the repeated pixel is added
                for channel in range(3):
                    last.weight[channel * SCALE**2 + i * SCALE + j, channel] = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.body:
            y = layer(y)
        large = torch.nn.functional.interpolate(x, scale_factor=SCALE, mode="nearest")
        return large + torch.nn.functional.pixel_shuffle(y, SCALE)


@torch.no_grad()
def make_pairs(path: Path, count: int, seed: int) -> None:
    """Draw pictures at both sizes once, for all epochs."""
    from builtin import open_builtin

    vae, rng = open_builtin().vae, np.random.default_rng(seed)
    small, large = [], []
    for start in range(0, count, 32):
        specs = [
            data.dense_spec(rng) if rng.random() < 0.5 else data.random_spec(rng, 2)
            for _ in range(32)
        ]
        pictures = np.stack([data.render(spec) for spec in specs])
        large += [data.render(spec, SCALE * data.SIDE) for spec in specs]
        if start // 32 % 2:
            x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
            x = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
            pictures = ((x + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()
        small.append(pictures)
    np.savez(path, small=np.concatenate(small), large=np.stack(large))


def train_worker(rank: int, processes: int, args: argparse.Namespace) -> None:
    """Train for the squared error, on pieces that hold an edge."""
    torch.manual_seed(args.seed)
    path = args.run / "pairs.npz"
    if not path.exists():
        make_pairs(path, args.pictures, args.seed)
    kept = np.load(path)
    small, large = kept["small"], kept["large"]
    net = Compact()
    training = common.Training(rank, processes, args.run, net, args.lr, args.minutes, ema=args.ema)
    rng = np.random.default_rng((args.seed, training.step))
    while not training.done:
        pieces = []
        while len(pieces) < args.batch:
            row, (y, x) = rng.integers(len(small)), rng.integers(0, data.SIDE - SMALL + 1, 2)
            one = small[row][y : y + SMALL, x : x + SMALL]
            if one.std() < FLAT:
                continue
            far = SCALE * SMALL
            other = large[row][SCALE * y :, SCALE * x :][:far, :far]
            if rng.random() < 0.5:
                one, other = one[:, ::-1], other[:, ::-1]
            pieces.append((one, other))
        x, y = (
            torch.from_numpy(np.stack(half)).permute(0, 3, 1, 2).float() / 255
            for half in zip(*pieces, strict=True)
        )
        error = net(x) - y
        training.update(WEIGHT * error.square().mean(), args.batch)
    training.save()


def write(run: Path, to: Path) -> None:
    """Write the averaged weights in half precision."""
    net = Compact()
    averaged = torch.load(run / "last.pt", weights_only=True)["ema"]
    names = [name for name, _ in net.named_parameters()]
    weights = {name: value.half() for name, value in zip(names, averaged, strict=True)}
    save_file(weights, to, {"format": "pt"})
    print(f"{to}: {to.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--to", type=Path, default=Path("shapes-x4.safetensors"))
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common.launch(train_worker, args, 1)
    write(args.run, args.to)


if __name__ == "__main__":
    main()
