"""The emoji model: its names, its files, and pictures of what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import mlxdiff
from examples.train_emoji import judge, world
from mlxdiff.cli import main
from mlxdiff.errors import ConfigError
from mlxdiff.samplers.defaults import GUIDANCE, advised_guidance
from mlxdiff.store.catalogue import SHIPPED, expand, suggestion

EMOJI = SHIPPED["emoji"]
DRAWING = {"seed": 0, "steps": 12}


@pytest.fixture(scope="module")
def pipe() -> mlxdiff.Pipeline:
    return mlxdiff.load("emoji", backend="numpy")


def picture_of(pipe: mlxdiff.Pipeline, prompt: str) -> np.ndarray:
    return np.asarray(pipe.generate(prompt, **DRAWING).images[0]).astype(int)


def test_a_heart_on_a_ground_in_its_colors(backend: str) -> None:
    """What can be seen without the font."""
    picture = picture_of(mlxdiff.load("emoji", backend=backend), "a red heart on white")
    red, green, blue = picture[24:40, 24:40].mean((0, 1))
    assert red > 180 and green < 110 and blue < 110
    corners = picture[[2, 2, -3, -3], [2, -3, 2, -3]]
    assert np.abs(corners - world.RGB["white"]).max() < 25


@pytest.mark.skipif(not Path(world.FONT).is_file(), reason="needs Noto Color Emoji")
def test_what_was_asked_for(pipe: mlxdiff.Pipeline) -> None:
    for prompt, kind in (("a fox", "🦊"), ("rainbow", "🌈"), ("a pumpkin on the grass", "🎃")):
        seen = judge.look(picture_of(pipe, prompt).astype(np.uint8))
        assert seen.kind == kind, (prompt, seen)


@pytest.mark.skipif(not Path(world.FONT).is_file(), reason="needs Noto Color Emoji")
def test_the_judge() -> None:
    rng = np.random.default_rng(1)
    for small in (False, True, True):
        spec = world.random_spec(rng, small)
        seen = judge.look(world.render(spec))
        assert (seen.kind, seen.ground, seen.place) == (spec.kind, spec.ground, spec.place)
    assert judge.look(np.full((64, 64, 3), 128, np.uint8)).decibels < 20


def test_its_words(pipe: mlxdiff.Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert pipe.source.tokenizer().known_words == tuple(world.words())
    pipe.encode_prompt("a fox on a blue background", "")
    assert not caplog.messages
    pipe.encode_prompt("a sleepy fox", "")
    assert "'sleepy'" in caplog.messages[0]
    pipe.encode_prompt("🦊 on white", "")
    assert "'🦊'" in caplog.messages[2]


def test_captions_use_known_words_only() -> None:
    rng = np.random.default_rng(2)
    known = set(world.words())
    for _ in range(300):
        assert set(world.caption(world.random_spec(rng), rng).split()) <= known


def test_its_files(pipe: mlxdiff.Pipeline) -> None:
    assert sum(f.stat().st_size for f in EMOJI.rglob("*") if f.is_file()) <= 12_000_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (EMOJI / "LICENSE").read_text("utf-8")
    assert "Noto Color Emoji" in (EMOJI / "README.md").read_text("utf-8")
    pipe.source.verify()


def test_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand("emoji") == str(EMOJI) and "emoji" in suggestion("emojis")
    assert expand("emoji@main") == "emoji@main"
    (tmp_path / "emoji").mkdir()
    assert expand("emoji") == "emoji"
    assert "not the well-known model (in the package)" in caplog.text


def test_the_command_line_and_the_picture_that_tells_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        return done.output

    quick = ("--steps", "2", "--backend", "numpy")
    run("generate", "-m", "emoji", "a fox", "-s", "0", *quick, "-o", "a.png")
    assert json.loads(run("info", "a.png", "--json"))["model"] == "emoji"
    run("generate", "--from-image", "a.png", "--backend", "numpy", "-o", "b.png")
    first, again = (np.asarray(Image.open(name)) for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(first, again)
    assert "sd1" in run("info", "emoji")
    assert "--guidance" in run("capabilities", "-m", "emoji")
    assert "emoji" in run("models", "--known")


def test_the_guidance_that_a_model_advises(pipe: mlxdiff.Pipeline) -> None:
    assert pipe.model.default_guidance == advised_guidance({GUIDANCE: 2.5}) == 2.5
    assert advised_guidance({}) is None
    for wrong in (True, "4", -1, 101, float("nan"), [4]):
        with pytest.raises(ConfigError, match=r"_mlxdiff_guidance is .*; expected a number"):
            advised_guidance({GUIDANCE: wrong})
