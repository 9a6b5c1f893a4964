"""Messages name options in the words of who reads them: Python's names in Python, flags on the
command line (``errors.argument``)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import checkpoint
from golden_runs import Opened

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.cli.options import TABLES, on_command_line
from mlxdiff.errors import MlxdiffError, UsageError, argument, in_python, naming
from mlxdiff.run.options import CommandOptions, GenerateOptions, LoadOptions
from mlxdiff.run.table import entries

ROOT = Path(__file__).parent.parent
FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z-]*(?=[\s=,;.):]|$)")
NAMES = {flag for table in TABLES for entry in entries(table).values() for flag in entry.flags}
NAMES |= {part for flag in NAMES for part in flag.split("/")}


def flags_in(text: str) -> list[str]:
    """Flags of ``mlxdiff generate`` that a text names."""
    return [found for found in FLAG.findall(text) if found in NAMES]


# ----------------------------------------------------------------------------------- the one place


def test_an_option_is_named_as_its_reader_knows_it() -> None:
    asked = ("loras", None, "PATH"), ("steps", 20), ("low_memory", True), ("zero_snr", False)
    assert [argument(*one) for one in asked] == [
        "loras", "steps=20", "low_memory=True", "zero_snr=False",
    ]  # fmt: skip
    with naming(on_command_line):
        assert [argument(*one) for one in asked] == [
            "--lora PATH", "--steps 20", "--low-memory", "--no-zero-snr",
        ]  # fmt: skip
        assert argument("overwrite", True) == argument("force", True) == "--force"
        assert argument("noise") == "noise"  # Python only
        with naming(in_python):  # a server, started from the command line
            assert argument("steps") == "steps"
    assert argument("steps") == "steps"


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The string constants of a module that are no docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
        if isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def test_no_message_of_the_library_has_a_flag_of_its_own() -> None:
    own = {"cli", "report", "serve"}  # the command line, and what it alone prints
    for path in sorted([*ROOT.glob("mlxdiff/**/*.py"), *ROOT.glob("convert/*.py")]):
        if path.parent.name in own or path.name == "options.py":
            continue
        for line, text in texts(path):
            found = [] if text in NAMES else flags_in(text)  # a word alone is for another program
            assert not found, f"{path.relative_to(ROOT)}:{line}: {text!r}"


def test_docstrings_name_arguments() -> None:
    for function in (mlxdiff.load, mlxdiff.Pipeline.generate, mlxdiff.Pipeline.stream):
        assert not flags_in(function.__doc__ or "")


# ------------------------------------------------------------------------------------------ Python

JUNK: list[Any] = [
    object(), "no such", "", -1, 1e9, 0, 2, "https://example.org/x", [[]], b"x", [("a",)], [None],
    [("", 1)], [("none", "x")], 10**6, 10**9, 10**400, (10**400, 2), (0, 0), (8, 8, 8, 10**9), "\0",
    (10**9, 10**9), float("nan"), 1e-300, [0.5] * 3, {}, np.zeros(3), np.float16("nan"), True,
]  # fmt: skip


@pytest.mark.parametrize("name", [*entries(GenerateOptions)])
def test_python_says_what_python_knows_of_a_run(name: str, opened: Opened) -> None:
    said = 0
    for model in ("sd15", "sd15-inpainting", "sdxl", "pix2pix", "x4-upscaler"):
        pipe = opened(model)
        for junk in [*JUNK, np.zeros((8, 8, 3), np.uint8)]:
            try:
                pipe.stream(**{"prompt": "a", "width": 32, "height": 32} | {name: junk})
            except MlxdiffError as error:
                said += 1
                assert not flags_in(str(error)), str(error)
    assert said or name == "on_step"


@pytest.mark.parametrize("name", [*entries(LoadOptions)])
def test_python_says_what_python_knows_of_loading(name: str) -> None:
    for junk in JUNK:
        try:
            mlxdiff.load(**{"backend": "numpy"} | {name: junk})
        except MlxdiffError as error:
            assert not flags_in(str(error)), str(error)
        except (TypeError, AttributeError):
            assert name == "progress"


def test_options_of_the_command_line_are_no_arguments(opened: Opened) -> None:
    for name in entries(CommandOptions):
        with pytest.raises(UsageError) as caught:
            opened("sd15").generate("a", **{name: "x"})
        assert not flags_in(str(caught.value))


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--strength", "0.5"], "--strength needs an image to start from (--image)"),
        (["--paste-original"], "--paste-original needs --mask or --outpaint"),
        (["--hires-strength", "0.5"], "has no effect without --hires; add --hires 2"),
        (["--control-scale", "1"], "--control-scale: there is no ControlNet and no T2I"),
        (["--ip-scale", "1"], "--ip-scale: there is no IP-Adapter; give one (--ip-adapter)"),
        (["--guidance-interval", "0.5,0.5"], "--guidance-interval is 0.5 to 0.5"),
        (["--clip-skip", "99"], "--clip-skip is 99"),
        (["--prompt-2", "x"], "--prompt-2: this model has no second text encoder"),
        (["--lora", "none.safetensors"], "no such LoRA file or folder (--lora PATH[:SCALE])"),
    ],
)  # fmt: skip
def test_the_command_line_says_flags(words: list[str], says: str) -> None:
    command = ["generate", "a", "-m", str(checkpoint("sd15")), "--backend", "numpy", *words]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 2 and says in found.stderr, found.stderr
