"""Names of picture files from templates: what is filled in, what is refused."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from mlxdiff.errors import UsageError
from mlxdiff.pictures.names import FIELDS, NUMBERS, TEXTS, Template, numbered, safe

VALUES: dict[str, int | str] = {
    "seed": 7, "index": 2, "step": 20, "frame": 0,
    "prompt": "a red fox", "model": "sd15", "image": "photo", "date": "2026-11-30",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{seed}.png", "7.png"),
        ("{seed:05d}-{index:01d}.PNG", "00007-2.PNG"),
        ("{date}/{model}-{prompt}_{step}_{frame:03d}.png", "2026-11-30/sd15-a-red-fox_20_000.png"),
        ("{{{seed}}}.png", "{7}.png"),
        ("{seed:09d}.png", "000000007.png"),
        ("plain.png", "plain.png"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert Template(text, "--output").fill(**VALUES) == Path(name)


@pytest.mark.parametrize(
    "text",
    [
        "{name}.png", "{}.png", "{0}.png", "{seed.real}.png", "{seed[0]}.png", "{seed!r}.png",
        "{seed:>9999999999}.png", "{seed:{index}}.png", "{seed:05}.png", "{seed:5d}.png",
        "{seed:00d}.png", "{seed:010d}.png", "{seed:0d}.png", "{prompt:05d}.png", "{.png", "}.png",
        "{seed.png", "{ seed}.png", "{SEED}.png", "{seed:,}.png", "{seed:05x}.png", "{se\ned}.png",
    ],
)  # fmt: skip
def test_anything_else_in_braces_is_an_error_that_lists_the_fields(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Template(text, "--output")
    assert all(f"{{{name}}}" in str(caught.value) for name in FIELDS)


@pytest.mark.parametrize("text", ["x.gif", "x.bmp", "x", "", "x.png\0.png"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Template(text, "--output")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("~root", "root"),
        ("..", "untitled"),
        ("", "untitled"),
        ("/a\\b:c*?\0\n", "a-b-c"),
        ("ein Fuchs im Schnee, öl", "ein-Fuchs-im-Schnee-öl"),
        ("狐" * 200, "狐" * 40),
        ("x" * 500, "x" * 60),
        ("\ud800a", "a"),
    ],
)
def test_a_text_stays_in_its_folder(text: str, name: str) -> None:
    assert safe(text) == name


def test_numbering() -> None:
    names = numbered(Path("a/x.png"))
    assert [str(next(names)) for _ in range(3)] == ["a/x.png", "a/x_2.png", "a/x_3.png"]


def test_hostile_templates_are_names_or_errors() -> None:
    """No other outcome, no folder left, no time and no memory taken."""
    draw = random.Random(0)
    words = ": 0 9 d !r [0] .x seed / .. é 999999999 %s ~ \n \ud800".split(" ")
    pieces = [*(f"{{{name}}}" for name in FIELDS), "{", "}", "{{", "}}", "{seed:", *words]
    start = time.process_time()
    for _ in range(5000):
        text = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 12))) + ".png"
        try:
            found = Template(text, "--output")
        except UsageError:
            continue
        assert found.fields <= {*NUMBERS, *TEXTS}
        try:
            hostile = {**VALUES, "prompt": "../" * 50, "model": "/etc", "seed": 2**63}
            filled = found.fill(**hostile)
        except UsageError:
            continue
        # Only the template itself can name other folders.
        own = text.count("/")
        assert str(filled).count("/") <= own + str(Path.home()).count("/") + 1
    assert time.process_time() - start < 10
