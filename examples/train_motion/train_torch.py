"""Train the same motion module as train.py, with PyTorch and diffusers in bfloat16.

    python train_torch.py --run runs/motion --to moves --minutes 50

On a CPU this is several times as fast as float32. The videos, the first weights and the result are
those of train.py; the same command continues a stopped run.
"""

from __future__ import annotations

import argparse

import numpy as np
import train

import mlxdiff
from mlxdiff.networks.config import MotionAdapterConfig
from mlxdiff.run.additions.motion import SCHEDULE
from mlxdiff.training.process import Process

import common  # isort: skip - videos puts its folder on the path
from teacher import Network  # isort: skip


def worker(rank: int, processes: int, args: argparse.Namespace) -> None:
    import torch
    from diffusers import MotionAdapter, UNetMotionModel
    from diffusers.models.attention_processor import AttnProcessor

    network = Network(None, torch=True)
    adapter = MotionAdapter.from_config(train.CONFIG)
    first = train.first_weights(MotionAdapterConfig.from_dict(train.CONFIG), args.seed)
    known = adapter.state_dict()
    missing, extra = adapter.load_state_dict(
        {name: torch.from_numpy(value) for name, value in first.items()}, strict=False
    )
    if extra or any(not name.endswith("pos_embed.pe") for name in missing):
        raise SystemExit(f"these weights do not fit: {missing}, {extra}; has {len(known)}")
    unet = UNetMotionModel.from_unet2d(network.torch_unet, adapter).train()
    unet.set_attn_processor(AttnProcessor())  # the gradient of the fused one is slower on a CPU
    unet.requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("motion_modules" in name)
    training = common.Training(rank, processes, args.run, unet, args.lr, args.minutes, ema=args.ema)
    with np.load(args.run / "videos.npz") as file:
        kept = {name: file[name] for name in file.files}
    process = Process.from_config(dict(network.config) | SCHEDULE)
    while not training.done:
        rng = np.random.default_rng((args.seed, training.step, rank))
        noisy, target, t, states = train.example(kept, process, rng, args.batch)
        x, v = (
            torch.from_numpy(part).unflatten(0, (len(t), -1)).permute(0, 4, 1, 2, 3).contiguous()
            for part in (noisy, target)
        )
        text = torch.from_numpy(states).repeat_interleave(x.shape[2], 0)  # one for each frame
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(x, torch.from_numpy(t), text).sample
        training.update((found.float() - v).square().mean(), len(t))
    training.save()
    training.use_ema()
    if rank == 0:
        weights = {
            name: value.detach().numpy()
            for name, value in unet.state_dict().items()
            if name in first
        }
        train.write(weights, args.to)


def main() -> None:
    parser = train.arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if not (args.run / "videos.npz").exists():
        pipe = mlxdiff.load(backend="mlx", dtype="float32")
        train.make_data(pipe, args.run / "videos.npz", args.videos, args.seed)
    common.launch(worker, args, args.processes)


if __name__ == "__main__":
    main()
