"""``--lora`` as a user meets it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lora_files
import numpy as np
import pytest
from fake_hub import COMMIT, serve
from test_cli import QUICK, error_of, generate, pixels, run, texts

from mlxdiff.adapters.lora import Lora
from mlxdiff.pictures.image import save_png
from mlxdiff.pictures.metadata import read
from mlxdiff.run.values import Files, Scaled


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("a.safetensors", ("a.safetensors", None)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        ("C:/a.safetensors", ("C:/a.safetensors", None)),
        ("C:/a.safetensors:2", ("C:/a.safetensors", 2.0)),
        ("with:1", ("with:1", None)),  # a file of that name is there
        ("with:1:0.5", ("with:1", 0.5)),
    ],
)
def test_path_and_scale(text: str, asked: tuple[str, float | None], here: Path) -> None:
    (here / "with:1").write_bytes(b"")
    assert Files("PATH[:SCALE]", Lora).parse(text) == Scaled(*asked)


def test_a_picture_under_loras_and_again_from_it(here: Path) -> None:
    path = lora_files.write("sd15-kohya", here)
    other = lora_files.write("sd15-peft", here / "elsewhere")
    plain = generate("a", "-s", "1", "-o", "plain.png", *QUICK)
    assert plain.exit_code == 0, plain.output
    result = generate("a", "-s", "1", "-o", "one.png", "--lora", f"{path}:0.5", *QUICK)
    assert result.exit_code == 0, result.output
    assert "LoRA sd15-kohya.safetensors at 0.5: LoRA of rank 2 to 4; " in result.stderr
    assert not np.array_equal(pixels(here / "plain.png"), pixels(here / "one.png"))
    assert json.loads(texts(here / "one.png")["mlxdiff"])["loras"][0]["scale"] == 0.5
    again = generate("--from-image", "one.png", "-o", "again.png")  # it lies here, unchanged
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(pixels(here / "one.png"), pixels(here / "again.png"))
    # A copy that keeps the text alone knows the file by its short hash.
    said = {"parameters": texts(here / "one.png")["parameters"]}
    assert "a <lora:sd15-kohya:0.5>\n" in said["parameters"]
    save_png(pixels(here / "one.png"), here / "copy.png", said)
    again = generate("--from-image", "copy.png", "-o", "from-copy.png")
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(pixels(here / "one.png"), pixels(here / "from-copy.png"))

    two = ("--lora", f"{path}:0.5", "--lora", f"{other}:-0.3")
    result = generate("a", "-s", "1", "-o", "two.png", "--json", "--quiet", *two, *QUICK)
    assert result.exit_code == 0 and result.stderr == "", result.output
    assert [one["scale"] for one in json.loads(result.stdout)["loras"]] == [0.5, -0.3]
    message = error_of(generate("--from-image", "two.png", "-o", "x.png"))
    assert "drawn with the LoRA sd15-peft.safetensors:-0.3" in message
    # The scales are the picture's where none are given.
    given = ("--lora", path, "--lora", other)
    again = generate("--from-image", "two.png", "-o", "two-again.png", *given)
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(pixels(here / "two.png"), pixels(here / "two-again.png"))
    path.write_bytes(other.read_bytes())  # another file of the same name
    for picture in ("one.png", "copy.png"):
        message = error_of(generate("--from-image", picture, "-o", "x.png"))
        assert "sd15-kohya.safetensors:0.5" in message


def test_errors(here: Path) -> None:
    path = lora_files.write("sd15-kohya", here)
    assert "no such LoRA" in error_of(generate("a", "--lora", "none.safetensors", *QUICK))
    assert "no such LoRA" in error_of(generate("a", "--lora", "none.safetensors:0.5", *QUICK))
    for scale in ("much", "", "nan"):
        result = generate("a", "--lora", f"{path}:{scale}", *QUICK)
        assert result.exit_code == 2
        assert f"its scale {scale!r} is not a number" in result.stderr
    message = error_of(run("generate", "-m", lora_files.checkpoint("sdxl"), "a", "--lora", path))
    assert "was made for" in message and "this model is SDXL" in message
    (here / "damaged.safetensors").write_bytes(path.read_bytes()[:-9])
    assert "truncated" in error_of(generate("a", "--lora", "damaged.safetensors", *QUICK))
    assert not list(here.glob("*.png"))


def test_a_lora_from_the_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of its repo or of its file; the second time without a network."""
    local = lora_files.write("sd15-kohya", here)
    data = local.read_bytes()
    for name in list(os.environ):
        if name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(here / "home"))
    files = {"README.md": "x", "style.safetensors": data}
    expected = generate("a", "-s", "1", "-o", "x.png", "--lora", f"{local}:0.5", *QUICK)
    assert expected.exit_code == 0, expected.output
    with serve(files, monkeypatch):
        for i, asked in enumerate(("org/name", "org/name/style.safetensors@main")):
            given = ("--lora", f"{asked}:0.5", "-o", f"{i}.png")
            result = generate("a", "-s", "1", *given, *QUICK)
            assert result.exit_code == 0, result.output
            assert "LoRA style.safetensors at 0.5" in result.stderr
            np.testing.assert_array_equal(pixels(here / "x.png"), pixels(here / f"{i}.png"))
            (said,) = read(here / f"{i}.png").to_dict()["loras"]
            assert said["source"] == f"org/name/style.safetensors@{COMMIT}"
            again = error_of(generate("--from-image", f"{i}.png", "-o", "y.png"))
            assert f"the LoRA {said['source']}:0.5: give all of its LoRAs" in again
        assert "no such LoRA" in error_of(generate("a", "--lora", "other/name", *QUICK))
        missing = error_of(generate("a", "--lora", "org/name/none.safetensors", *QUICK))
        assert "none.safetensors" in missing
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = generate("a", "-s", "1", "--lora", "org/name:0.5", "-o", "off.png", *QUICK)
    assert result.exit_code == 0, result.output


def test_a_repo_with_several_loras_lists_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(here / "home"))
    with serve({"a.safetensors": "a", "b.safetensors": "b"}, monkeypatch):
        message = error_of(generate("a", "--lora", "org/name", *QUICK))
    assert "org/name/a.safetensors, org/name/b.safetensors" in message
