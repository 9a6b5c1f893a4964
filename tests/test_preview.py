"""Previews: what they show, where they go, and what is left of them."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import arrays, assert_picture_close, checkpoint
from golden_runs import Opened
from PIL import Image

import mlxdiff
from mlxdiff import samplers
from mlxdiff.cli import main
from mlxdiff.cli.preview import iterm2, kitty, terminal_protocol
from mlxdiff.pictures import preview

QUICK = ("-s", "0", "--steps", "3", "-W", "32", "-H", "32", "--backend", "numpy")
GENERATE = (sys.executable, "-m", "mlxdiff", "generate", "a red circle", *QUICK)
PLAIN = {k: v for k, v in os.environ.items() if not k.startswith(("KITTY", "TERM", "TMUX"))}


class Tty(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


# --------------------------------------------------------------------------------- what they show


def test_a_linear_map_is_found_again() -> None:
    random = np.random.default_rng(0)
    pixels = preview.chart(8)
    assert pixels.shape == (128, 128, 3)
    means = pixels.reshape(16, 8, 16, 8, 3).mean(axis=(1, 3), dtype=np.float64) / 127.5 - 1
    mixed = np.concatenate([means, random.standard_normal((16, 16, 1))], axis=-1)
    latents = mixed @ random.standard_normal((4, 4)) + random.standard_normal(4)
    linear = preview.fit(latents, pixels)
    assert linear.shape == (5, 3)
    assert np.abs(preview.colours(linear, latents) - means).max() < 1e-4


def test_a_sketch_is_near_the_picture(backend: str) -> None:
    """The built-in model: its last sketch against the picture, and the first step's already."""
    pipe = mlxdiff.load(backend=backend)
    prompt = "a large yellow star on a blue background"
    steps = list(pipe.stream(prompt, seed=0, steps=8, guidance=4))
    small = np.asarray(steps[-1].preview().resize((16, 16), Image.Resampling.BOX), float)
    assert steps[0].sketch().size == (16, 16)
    for step, most in ((steps[-1], 50), (steps[2], 70)):
        sketch = np.asarray(step.sketch(), float)
        assert np.sqrt(((sketch - small) ** 2).mean()) < most
    plain = np.asarray(steps[2].preview().resize((16, 16), Image.Resampling.BOX), float)
    assert np.sqrt(((plain - small) ** 2).mean()) > 70  # latents with their noise show nothing yet


def test_a_taesd_decodes_previews(backend: str, opened: Opened) -> None:
    """As diffusers' AutoencoderTiny does; its last preview is the picture."""
    pipe = opened("sd15", backend, vae="taesd")
    golden = arrays("taesd")
    found = np.stack([np.asarray(pipe.model.sketch(x)) for x in golden["vae/latents"]])
    expected = np.clip(golden["vae/decoded"] * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
    assert_picture_close(found, expected)
    run = {"seed": 0, "steps": 3, "width": 32, "height": 40, "sampler": "euler"}
    steps = list(pipe.stream("a", **run))
    assert [step.sketch().size for step in steps] == [(32, 40)] * 3
    assert np.array_equal(steps[-1].sketch(), pipe.decode(steps[-1].denoised[None])[0])


def test_previews_by_a_taesd_on_the_command_line(tmp_path: Path) -> None:
    vae, model = str(checkpoint("taesd")), str(checkpoint("sd15"))
    command = "generate", "a", "-m", model, "--vae", vae, *QUICK, "--sampler", "euler"
    files = "--preview-file", str(tmp_path / "{step}.png"), "-o", str(tmp_path / "x.png")
    done = CliRunner().invoke(main, [*command, *files])
    assert done.exit_code == 0, done.output
    first, last, picture = (Image.open(tmp_path / f"{name}.png") for name in ("1", "3", "x"))
    assert first.size == last.size == picture.size == (32, 32)
    difference = np.abs(np.asarray(last, np.int16) - np.asarray(picture, np.int16))
    assert difference.max() <= 1  # x_0 at the last step is what is left
    assert not np.array_equal(first, last)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["dpmpp-2m", "unipc", "euler", "heun", "ddim", "lms", "lcm"])
def test_denoised_takes_the_noise_away(sampler: str, prediction: str) -> None:
    """At every row: x of a known x_0 and noise, and the output that is right for it."""
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    plan = samplers.plan(config | {"prediction_type": prediction}, sampler, "normal", 6)
    x0, noise = np.random.default_rng(0).standard_normal((2, 4, 4))
    for index, row in enumerate(plan.rows):
        signal, amount = row.level
        alpha, sigma = np.array(row.level) / np.hypot(signal, amount)
        output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
        found = plan.denoised(signal * x0 + amount * noise, output[prediction], index)
        assert np.abs(found - x0).max() < 1e-6


def test_pixel_models_show_their_pixels() -> None:
    pipe = mlxdiff.load(checkpoint("ddpm"), backend="numpy")
    step = next(pipe.stream(seed=0, steps=2, sampler="ddim"))
    height, width, _ = step.latents.shape
    assert step.sketch().size == (width, height)


# ------------------------------------------------------------------------------------ where they go


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "TMUX": "x"}, None),
        ({"TERM": "dumb", "TERM_PROGRAM": "iTerm.app"}, None),
        ({}, None),
    ],
)
def test_terminals_are_told_by_their_environment(
    environment: dict[str, str], protocol: str | None
) -> None:
    assert terminal_protocol(environment, Tty()) == protocol
    assert terminal_protocol(environment, io.StringIO()) is None  # a pipe


def test_escape_codes_carry_the_picture() -> None:
    data = np.random.default_rng(0).bytes(9000)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(data))
    assert len(pieces) == 3 and all(len(piece) <= 4096 for _, piece in pieces)
    assert [keys[-3:] for keys, _ in pieces] == ["m=1", "m=1", "m=0"]
    assert base64.b64decode("".join(piece for _, piece in pieces)) == data
    found = re.fullmatch(r"\x1b\]1337;File=([^:]*):(.*)\x07", iterm2(data))
    assert found is not None and "inline=1" in found[1]
    assert base64.b64decode(found[2]) == data


def test_in_a_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = PLAIN | {"TERM": "xterm-kitty"}
    command = (*GENERATE, "--preview", "-o", "x.png")
    done = subprocess.Popen(command, cwd=tmp_path, stderr=theirs, env=environment)
    # This end stays open until all is read: macOS drops what is unread when the last one closes,
    # and then gives b"" where Linux raises OSError.
    output = b""
    while done.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            output += os.read(ours, 65536)
    assert done.returncode == 0
    os.close(theirs)
    os.close(ours)
    assert output.count(b"\x1b_Ga=T") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_beside_the_picture_until_it_is_there(tmp_path: Path) -> None:
    command = (*GENERATE, "--preview", "-o", "x.png")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=PLAIN, check=True)
    assert b"x-preview.png" in done.stderr and b"\x1b_G" not in done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    template = ("--preview-file", "p/{seed}-{step}.png", "--preview-every", "2")
    command = (*GENERATE, *template, "-o", "x.png", "--quiet")
    subprocess.run(command, cwd=tmp_path, check=True)
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["0-1.png", "0-3.png"]
    with Image.open(tmp_path / "p/0-3.png") as picture:
        assert picture.size == (32, 32)
    again = subprocess.run(
        (*command[:-3], "-o", "y.png", "--quiet"), cwd=tmp_path, capture_output=True
    )
    assert again.returncode == 2 and b"--force" in again.stderr
    for wrong, words in (
        (("--preview-every", "2"), "needs --preview"),
        (("--preview", "--preview-every", "0"), "at least 1"),
        (("--preview-file", "p/x.jpg"), ".png"),
        (("--preview-file", "p/{size}.png"), "only {seed}"),
        (("--preview-file", "z.png", "-o", "z.png"), "is the output file"),
    ):
        refused = CliRunner().invoke(main, [*GENERATE[3:], *wrong])
        assert refused.exit_code == 2 and words in refused.stderr, refused.stderr


def test_what_is_interrupted_leaves_its_last_preview(tmp_path: Path) -> None:
    command = (*GENERATE[:-8], "--steps", "900", "--backend", "numpy", "--preview", "-o", "x.png")
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env=PLAIN)
    kept, end = tmp_path / "x-preview.png", time.monotonic() + 60
    while not kept.exists() and time.monotonic() < end:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert b"The last preview is in x-preview.png" in errors
    with Image.open(kept) as picture:
        assert picture.size == (64, 64)
    assert [p.name for p in tmp_path.iterdir()] == ["x-preview.png"]
