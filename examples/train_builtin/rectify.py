"""Let the model draw pictures, and find the nearest true picture for each.

    python rectify.py --model MODEL --to rectified.npz --pictures 600

MODEL is a diffusers folder. The latents and the true pictures train the decoder to correct the
U-Net's wrong outlines (train_vae.py --redrawn).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

try:
    from . import checker, data
except ImportError:  # for a script, Python puts this folder on the path
    import checker
    import data

STEPS = (1.0, 0.5, 0.25)  # step in pixels of the search for place and radius
WORST = 0.55  # overlap below which an object counts as wrong


def nearest(picture: np.ndarray, spec: data.Spec) -> data.Spec | None:
    """Return the spec with the things of `spec` at their places in the picture, or None if others.

    Background, colors, relation and place must be right, shapes and sizes nearly. x, y and r are
    fitted.
    """
    verdict, objects = checker.match(checker.look(picture), data.asked_of(spec))
    if not all(right for name, right in verdict.items() if name not in ("shape", "size")):
        return None
    things = [
        dataclasses.replace(t, x=o.x, y=o.y, r=min(max(o.r, 0.1), 0.24))
        for t, o in zip(spec.things, objects, strict=True)
    ]
    goal = picture.astype(np.float32)

    def error(candidate) -> float:
        drawn = data.render(dataclasses.replace(spec, things=tuple(candidate)))
        return float(np.square(drawn - goal).mean())

    best = error(things)
    for step in STEPS:
        better = True
        while better:
            better = False
            for i in range(len(things)):
                for name in ("x", "y", "r"):
                    for sign in (-step, step):
                        value = getattr(things[i], name) + sign / data.SIDE
                        tried = list(things)
                        tried[i] = dataclasses.replace(things[i], **{name: value})
                        if (now := error(tried)) < best:
                            things, best, better = tried, now, True
    found = dataclasses.replace(spec, things=tuple(things))
    return found if best < WORST * _contrast(found) else None


def redraw(picture: np.ndarray, prompt: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Draw what a picture shows with ideal shapes and colors: `nearest` without its search.

    Place and radius are those with the same middle and area. Shapes are those of the prompt, also
    where the picture's own is not clear. None: something else is not what the prompt says.

    Returns: (H, W, 3) uint8, and the weight of each pixel, (H, W) float16, with which a small
        object counts as much as a large one.
    """
    seen, asked = checker.look(picture), data.parse(prompt)
    verdict, objects = checker.match(seen, asked)
    if not all(right for name, right in verdict.items() if name != "shape") or not seen.background:
        return None
    side, things = len(picture), []
    weights, at = np.full((side, side), 0.5), (np.arange(side) + 0.5) / side
    for (shape, color, _), thing in zip(asked.things, objects, strict=True):
        x, y, area = thing.mass
        r = (area / checker.area_of(shape)) ** 0.5
        y_of_shape = y - r * checker.middle_of(shape)
        things.append(data.Thing(shape, color, thing.size, x, y_of_shape, r))
        near = (abs(at - y)[:, None] < 1.3 * r) & (abs(at - x) < 1.3 * r)
        weights[near] = np.maximum(weights[near], 200 / (area * side**2))
    return data.render(data.Spec(seen.background, tuple(things))), weights.astype(np.float16)


def _contrast(spec: data.Spec) -> float:
    """Return the error of a picture without its objects."""
    empty = data.render(dataclasses.replace(spec, things=())).astype(np.float32)
    return float(np.square(data.render(spec) - empty).mean())


def main() -> None:
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    pipe = StableDiffusionPipeline.from_pretrained(
        args.model,
        safety_checker=None,
        requires_safety_checker=False,
        torch_dtype=torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    factor = pipe.vae.config.scaling_factor
    rng = np.random.default_rng((41, args.seed))
    kept, pictures, batch = [], [], 32
    for start in range(0, args.pictures, batch):
        specs = [data.random_spec(rng, 2 if rng.random() < 0.6 else 1) for _ in range(batch)]
        with torch.autocast("cpu", torch.bfloat16):
            latents = pipe(
                [data.caption(spec, rng, True) for spec in specs],
                num_inference_steps=12,
                guidance_scale=float(rng.choice((2.0, 4.0, 4.0, 7.5))),
                generator=torch.Generator().manual_seed(10_000 * (1 + args.seed) + start),
                output_type="latent",
            ).images.float()
        drawn = pipe.vae.decode(latents / factor).sample.clamp(-1, 1).permute(0, 2, 3, 1).numpy()
        for z, picture, spec in zip(latents, drawn, specs, strict=True):
            found = nearest(np.round((picture + 1) * 127.5).astype(np.uint8), spec)
            if found is not None:
                kept.append((z / factor).numpy().astype(np.float16))
                pictures.append(data.render(found))
        print(f"{len(kept)} of {start + batch}", flush=True)
        np.savez(args.to, latents=np.stack(kept), pictures=np.stack(pictures))


if __name__ == "__main__":
    main()
