"""Styles of prompts, and pictures that are zoomed out of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import checkpoint, photo
from golden_runs import Opened
from PIL import Image

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.errors import UsageError
from mlxdiff.text.styles import PLACE, STYLES, Style, apply, read_styles

RUN: dict[str, Any] = {"width": 32, "height": 32, "steps": 2, "guidance": 3.0, "seed": 5}


def test_a_style_is_a_text_around_the_prompt() -> None:
    own = {"end": Style("in ink", "color"), "around": Style("ink of {prompt}, bold")}
    assert apply("end", own, "a cat", None) == ("a cat, in ink", "color")
    assert apply("around, end", own, "a cat", "dog") == ("ink of a cat, bold, in ink", "dog, color")
    assert apply("around", own, "a {prompt}", None) == ("ink of a {prompt}, bold", None)
    assert all(PLACE in style.prompt and style.negative for style in STYLES.values())
    with pytest.raises(UsageError, match="style 'in' does not exist; there are photo, "):
        apply("in", own, "a", None)


def test_a_picture_in_a_style_is_that_of_its_text(opened: Opened) -> None:
    pipe = opened("sd15")
    styled = pipe.generate("a cat", style="ink", **RUN)
    prompt, negative = STYLES["ink"].applied("a cat", None)
    plain = pipe.generate(prompt, negative_prompt=negative, **RUN)
    np.testing.assert_array_equal(np.asarray(styled.images[0]), np.asarray(plain.images[0]))
    assert styled.metadata == plain.metadata
    with pytest.raises(UsageError, match="no prompt is given"):
        pipe.generate(style="ink", **RUN)
    with pytest.raises(UsageError, match="no part for that"):
        mlxdiff.load(checkpoint("ddpm"), backend="numpy").generate(style="ink", steps=2)


def test_a_file_of_styles(tmp_path: Path) -> None:
    path = tmp_path / "styles.toml"
    path.write_text('[ink]\nprompt = "{prompt}, in my ink"\n[less]\nnegative = "text"\n')
    assert read_styles(path) == {"ink": Style("{prompt}, in my ink"), "less": Style(PLACE, "text")}
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy", style_file=path)
    settings = pipe.settings("a", style="ink,less")
    assert (settings.prompt, settings.negative_prompt) == ("a, in my ink", "text")
    for text, says in (
        ("[a]\nprompt = 1", "no table of texts"),
        ("a = 1", "no table of texts"),
        ("[a]", "is empty"),
        ('[a]\nstyle = "b"', "'style'; expected prompt and negative"),
        ("[a", "is not TOML"),
        ("\xff", "not a UTF-8"),
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UsageError, match=says):
            read_styles(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_styles(tmp_path / "none.toml")


def test_zoom_out_is_outpainting_at_the_size_of_the_image(opened: Opened) -> None:
    pipe, image = opened("sd15"), photo(64, 96)
    given = {**RUN, "width": None, "height": None}
    zoomed = pipe.generate("a", image=image, zoom_out=1.5, **given)
    borders = (24, 16, 24, 16)
    by_hand = pipe.generate(
        "a", image=image, outpaint=borders, **{**given, "width": 96, "height": 64}
    )
    assert zoomed.images[0].size == (96, 64)
    np.testing.assert_array_equal(np.asarray(zoomed.images[0]), np.asarray(by_hand.images[0]))
    assert zoomed.metadata == by_hand.metadata
    odd = pipe.settings("a", image=image, zoom_out=1.01).outpaint
    assert odd == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("sd15", {"zoom_out": 2}, r"needs an image \(image\)"),
        ("sd15", {"zoom_out": 1.0, "image": photo(32, 32)}, "above 1"),
        ("sd15", {"zoom_out": 2, "image": photo(32, 32), "outpaint": (8, 0, 0, 0)}, "give one"),
        ("x4-upscaler", {"zoom_out": 2, "image": photo(32, 32)}, "no part for mask"),
    ],
)
def test_what_zoom_out_cannot_do_is_refused(
    name: str, arguments: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(UsageError, match=says):
        opened(name).generate("a", steps=1, **arguments)


def test_the_command_line_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo(32, 48)).save("in.png")
    command = ["generate", "--backend", "numpy", "-m", str(checkpoint("sd15")), "-i", "in.png"]
    given = ["a", "--zoom-out", "2", "--style", "oil", "--steps", "2", "-s", "1", "-o", "1.png"]
    first = CliRunner().invoke(main, [*command, *given])
    assert first.exit_code == 0, first.output
    again = CliRunner().invoke(main, [*command, "--from-image", "1.png", "-o", "2.png"])
    assert again.exit_code == 0, again.output
    with Image.open("1.png") as a, Image.open("2.png") as b:
        assert a.size == (48, 32) and a.text["mlxdiff"] == b.text["mlxdiff"]
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
