"""Measure what the best of N is worth on the built-in model: by the checker, and by a small CLIP.

    python evaluate.py --prompts 48 --steps 4                  # by the checker alone
    python evaluate.py --prompts 48 --steps 4 --judge shapes

Each prompt is drawn with 8 seeds. A picture is right if the checker of the built-in model
(examples/train_builtin/checker.py), which knows no model, finds all that the prompt names. Printed
is the share of right pictures: of one seed, of the best of N by the checker (the most that a judge
can reach), and of the best of N by CLIP. Needs only mlxdiff.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import mlxdiff

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_builtin"))
import checker
import data

SEEDS = 8


def prompts_of(count: int, seed: int = 5) -> list[str]:
    """Prompts that the built-in model finds hard: two objects, one of a pair it never saw."""
    rng = np.random.default_rng(seed)
    specs = [data.random_spec(rng, 2, "pair") for _ in range(count)]
    return [data.caption(spec, rng, complete=True) for spec in specs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--judge", help="folder of a CLIP")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--backend", default="numpy")
    args = parser.parse_args()
    pipe = mlxdiff.load(backend=args.backend)
    judge = None if args.judge is None else mlxdiff.load_judge(args.judge, backend=args.backend)
    right, scores = [], []
    for prompt in prompts_of(args.prompts):
        drawn = pipe.generate(
            prompt, seed=100, count=SEEDS, steps=args.steps, guidance=args.guidance
        ).images
        right.append([checker.check(np.asarray(image), prompt).right for image in drawn])
        scores.append(np.zeros(SEEDS) if judge is None else judge.scores(drawn, [prompt])[:, 0])
    found, points = np.array(right), np.array(scores)
    rows = np.arange(len(found))
    print(f"{args.prompts} prompts, {args.steps} steps, guidance {args.guidance:g}")
    print(f"{'one picture':32} {100 * found.mean():5.1f} %")
    for n in (2, 4, 8):
        # All groups of n seeds in a row, so that every picture counts alike.
        groups = [slice(i, i + n) for i in range(0, SEEDS, n)]
        best = [found[rows, s.start + points[:, s].argmax(1)].mean() for s in groups]
        most = [found[:, s].any(1).mean() for s in groups]
        print(f"{f'best of {n} by the checker':32} {100 * np.mean(most):5.1f} %")
        if judge is not None:
            print(f"{f'best of {n} by CLIP':32} {100 * np.mean(best):5.1f} %")


if __name__ == "__main__":
    main()
