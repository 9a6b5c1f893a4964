"""Judge a motion module: does each video do what its prompt says?

    python judge.py --adapter moves [--each 4] [--sheet sheet.png] [--gif moves.gif]

The checker of the built-in model's pictures (../train_builtin/checker.py) names the shape in every
frame. A video is right if it finds the color, the shape and the background that the prompt names in
at least three quarters of the frames, and if place or size change steadily as they should.
Needs only mlxdiff.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import videos
from videos import data

import mlxdiff
from mlxdiff.pictures.videos import encode_video

import checker  # isort: skip - videos puts its folder on the path

LEAST = 0.15  # of the picture's side: how far a shape must move
GROWTH = 1.2
STEADY = 0.8  # least correlation of place or size with the number of the frame


@dataclass(frozen=True)
class Verdict:
    """What is right about a video.

    Attributes:
        seen: share of the frames in which shape, color and background are as named.
        moves: it does what its prompt says.
    """

    seen: float
    moves: bool

    @property
    def right(self) -> bool:
        """All of it."""
        return self.moves and self.seen >= 0.75


def judge(frames: list, spec: data.Spec) -> Verdict:
    """Judge a video that should end with this picture."""
    (thing,) = spec.things
    looks = [checker.look(np.asarray(frame)) for frame in frames]
    found = [look.objects for look in looks]
    places = [index for index, one in enumerate(found) if len(one) == 1]
    alone = [found[index][0] for index in places]
    named = thing.color, thing.shape, spec.background
    seen = sum(
        (found[index][0].color, found[index][0].shape, looks[index].background) == named
        for index in places
    ) / len(frames)
    if len(alone) < len(frames) / 2:
        return Verdict(seen, False)
    third = max(1, len(alone) // 3)

    def change(name: str) -> float:
        """From the first to the last third of the frames; 0 where it goes to and fro."""
        values = np.array([getattr(one, name) for one in alone])
        if abs(np.corrcoef(places, values)[0, 1]) < STEADY:
            return 0.0
        before, after = values[:third].mean(), values[-third:].mean()
        return float(np.log(after / before)) if name == "r" else float(after - before)

    moves = {
        "moves left": lambda: change("x") < -LEAST,
        "moves right": lambda: change("x") > LEAST,
        "moves up": lambda: change("y") < -LEAST,
        "moves down": lambda: change("y") > LEAST,
        "grows": lambda: change("r") > np.log(GROWTH),
        "shrinks": lambda: change("r") < -np.log(GROWTH),
    }
    return Verdict(seen, bool(moves[videos.kind_of(spec)]()))


def prompts(each: int, seed: int) -> list[data.Spec]:
    """Pictures to end with: so many of each kind, of pairs that training saw."""
    rng, found = np.random.default_rng(seed), {kind: [] for kind in videos.KINDS}
    while any(len(some) < each for some in found.values()):
        spec = data.random_spec(rng)
        some = found[videos.kind_of(spec)]
        if len(some) < each:
            some.append(spec)
    return [spec for some in found.values() for spec in some]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, default=Path("moves"))
    parser.add_argument("--each", type=int, default=4, help="videos of each kind")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--gif", type=Path)
    parser.add_argument("--backend", default="numpy")
    args = parser.parse_args()
    pipe = mlxdiff.load(motion_adapter=args.adapter, backend=args.backend, dtype="float32")
    rng, shown, verdicts = np.random.default_rng(args.seed), {}, {}
    for index, spec in enumerate(prompts(args.each, args.seed)):
        prompt = data.caption(spec, rng, complete=True)
        result = pipe.generate(
            prompt, frames=videos.FRAMES, steps=args.steps, seed=args.seed + index
        )
        kind = videos.kind_of(spec)
        verdict = judge(result.videos[0], spec)
        verdicts.setdefault(kind, []).append(verdict)
        if kind not in shown or verdict.right:
            shown[kind] = result.videos[0]
        print(f"{kind}: {prompt}: seen {verdict.seen:.0%}, {verdict.moves}", flush=True)
    for kind, some in verdicts.items():
        moves, right = (sum(getattr(v, name) for v in some) for name in ("moves", "right"))
        print(f"{kind}: {moves} of {len(some)} do it, {right} right in all")
    if args.sheet is not None:
        rows = [np.concatenate([np.asarray(f) for f in frames], 1) for frames in shown.values()]
        mlxdiff.pictures.image.save_png(np.concatenate(rows), args.sheet, overwrite=True)
    if args.gif is not None:
        from PIL import Image

        frames = [
            Image.fromarray(np.concatenate([np.asarray(one) for one in some], 1))
            for some in zip(*shown.values(), strict=True)
        ]
        args.gif.write_bytes(encode_video([*frames, *[frames[-1]] * 4], ".gif", 8))


if __name__ == "__main__":
    main()
