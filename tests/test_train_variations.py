"""examples/train_variations: what a variation keeps, how it is judged, and that the script runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlxdiff
from examples.train_builtin import data
from examples.train_variations import judge, pairs

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "train_variations"


def test_a_variation_keeps_the_things_and_places_them_anew() -> None:
    rng = np.random.default_rng(1)
    for spec in pairs.random_specs(rng, 20):
        other = pairs.redrawn(spec, rng)
        assert other.background == spec.background
        told = [sorted((t.pair, t.size) for t in s.things) for s in (spec, other)]
        assert told[0] == told[1]
        assert not np.array_equal(data.render(spec), data.render(other))


def test_facts_and_the_patches_that_show_them() -> None:
    star = data.Thing("star", "red", "small", 0.2, 0.5, 0.14)
    ring = data.Thing("ring", "blue", "large", 0.7, 0.5, 0.2)
    spec = data.Spec("black", (star, ring), relation="left of")
    background, things = pairs.facts(spec)
    assert data.BACKGROUNDS[background] == "black"
    words = [[kind[i] for kind, i in zip(pairs.THING, thing, strict=True)] for thing in things]
    assert words == [["star", "red", "small"], ["ring", "blue", "large"]]
    shown = pairs.patches(spec).reshape(8, 8)
    assert (shown[[0, 1, 6, 7]] == -1).all() and (shown[:, 3] == -1).all()
    assert (shown[3:5, 1:3] == 0).all() and (shown[3:5, 4:7] == 1).all()


def test_the_judge_knows_a_variation() -> None:
    """A picture is its own variation that did not move; a changed color is none."""
    thing = data.Thing("square", "red", "large", 0.4, 0.5, 0.2)
    spec = data.Spec("white", (thing,), place="left")
    same = judge.compare(spec, data.render(spec))
    assert same["right"] == 1 and same["pixels"] == 0 and same["moved"] < 0.5
    aside = judge.compare(spec, np.roll(data.render(spec), 9, axis=1))
    assert aside["right"] == 1 and aside["pixels"] > 0.05 and 8.5 < aside["moved"] < 9.5
    other = data.Spec("white", (data.Thing("square", "blue", "large", 0.4, 0.5, 0.2),))
    found = judge.compare(spec, data.render(other))
    assert found["right"] == found["color"] == 0 and found["shape"] == 1


def test_the_given_pictures_are_not_those_of_the_training() -> None:
    given = {str(spec) for things in (1, 2) for spec in judge.given_pictures(32, things)}
    trained = {str(spec) for spec in pairs.random_specs(np.random.default_rng(0), 512)}
    assert len(given) == 64 and not given & trained


@pytest.mark.slow
def test_the_script_runs_and_goes_on(tmp_path: Path) -> None:
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    command = [sys.executable, str(FOLDER / "train.py"), "--run", "run", "--pictures", "8"]
    for minutes in ("0.001", "0.002"):
        subprocess.run(
            [*command, "--batch", "2", "--seeing", minutes, "--minutes", minutes],
            cwd=tmp_path,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            timeout=300,
        )
    pipe = mlxdiff.load(tmp_path / "like", backend="numpy")
    given = data.render(judge.given_pictures(1, 1)[0])
    first, second = pipe.generate(image=given, variations=2, seed=1, steps=2).images
    assert np.asarray(first).shape == given.shape
    assert not np.array_equal(np.asarray(first), np.asarray(second))
