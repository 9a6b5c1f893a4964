"""examples/train_motion: with its adapter, shapes do what the prompt says."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import mlxdiff

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "train_motion"
sys.path.insert(0, str(FOLDER))
import judge  # noqa: E402
import videos  # noqa: E402


@pytest.fixture(scope="module")
def pipe() -> mlxdiff.Pipeline:
    return mlxdiff.load(motion_adapter=FOLDER / "moves", backend="numpy")


@pytest.mark.parametrize(
    ("prompt", "place", "size", "seed"),
    [
        ("a large yellow circle in the center on a white background", "center", "large", 3),
        ("a small red heart on the right on a blue background", "right", "small", 3),
    ],
)
def test_a_shape_does_what_the_prompt_says(
    pipe: mlxdiff.Pipeline, prompt: str, place: str, size: str, seed: int
) -> None:
    color, shape, background = prompt.split()[2], prompt.split()[3], prompt.split()[-2]
    rng, spec = np.random.default_rng(0), None
    while spec is None or (spec.place, spec.things[0].size) != (place, size):
        spec = videos.data.random_spec(rng)
    (thing,) = spec.things
    asked = videos.replace(
        spec, background=background, things=(videos.replace(thing, color=color, shape=shape),)
    )
    (frames,) = pipe.generate(prompt, frames=8, steps=5, seed=seed).videos
    assert judge.judge(list(frames), asked).right


def test_each_kind_of_video_is_as_often() -> None:
    rng = np.random.default_rng(0)
    kinds = Counter(videos.kind_of(videos.random_video(rng)[0]) for _ in range(600))
    assert set(kinds) == set(videos.KINDS)
    assert min(kinds.values()) > 60
