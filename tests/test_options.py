"""The tables of options: what follows from them, and that nothing says an option a second time."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from golden_data import checkpoint, photo
from PIL import Image

import mlxdiff
from mlxdiff import pipeline, samplers
from mlxdiff.cli.generate import generate
from mlxdiff.cli.options import Value
from mlxdiff.errors import UsageError
from mlxdiff.pictures import image as image_files
from mlxdiff.pictures.image import save_png
from mlxdiff.pictures.metadata import SAMPLER_NAMES, SCHEMA
from mlxdiff.run import values
from mlxdiff.run.kind import PARTS
from mlxdiff.run.options import (
    SECTIONS,
    CommandOptions,
    GenerateOptions,
    LoadOptions,
    RunOptions,
    StreamOptions,
    ValueOptions,
)
from mlxdiff.run.settings import Settings
from mlxdiff.run.table import Option, entries, make

ROOT = Path(__file__).resolve().parent.parent
TABLES = (GenerateOptions, LoadOptions, CommandOptions)
ALL = [entry for table in TABLES for entry in entries(table).values()]
SMALL = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def pipe() -> mlxdiff.Pipeline:
    return mlxdiff.load(checkpoint("sd15"), backend="numpy")


# ------------------------------------------------------------------------------------- the entries


def test_entries_are_sound() -> None:
    twice = [name for name, n in Counter(e.name for e in ALL).items() if n > 1]
    assert twice == ["on_progress", "cancel"]  # of generate and of load; neither has a flag
    assert [flag for flag, n in Counter(f for e in ALL for f in e.flags).items() if n > 1] == []
    for entry in ALL:
        assert entry.doc.endswith((".", ")")), entry.name
        assert not entry.part or entry.part in PARTS, entry.name
        if entry.flags:
            assert entry.section in SECTIONS and entry.help.endswith("."), entry.name
        if entry.default not in (None, ()):
            assert entry.kind.accept(entry.default) == entry.default, entry.name


@pytest.mark.parametrize("table", TABLES)
def test_names_of_other_programs_mean_one_option(table: type) -> None:
    own = entries(table)
    names = Counter(name for entry in own.values() for name in entry.elsewhere)
    assert not set(names) & set(own)
    assert [name for name, n in names.items() if n > 1] == []


def test_settings_have_every_value() -> None:
    assert set(entries(ValueOptions)) <= set(inspect.signature(Settings).parameters)


# -------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize(
    ("function", "table", "first"),
    [
        (mlxdiff.Pipeline.generate, GenerateOptions, "self"),
        (mlxdiff.Pipeline.stream, StreamOptions, "self"),
        (mlxdiff.Pipeline.settings, RunOptions, "self"),
        (mlxdiff.load, LoadOptions, None),
    ],
)
def test_a_function_shows_every_option(
    function: Callable[..., Any], table: type, first: str | None
) -> None:
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name != first]
    assert names == list(entries(table))
    for name, entry in entries(table).items():
        assert signature.parameters[name].default == entry.default
        assert f"\n    {name}: " in (inspect.getdoc(function) or "")
    assert "{options}" not in (inspect.getdoc(function) or "")


def test_a_bound_method_hides_self(pipe: mlxdiff.Pipeline) -> None:
    assert next(iter(inspect.signature(pipe.generate).parameters)) == "prompt"


def test_mypy_refuses_a_wrong_name_and_a_wrong_type(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "snippet.py").write_text(
        "import mlxdiff\n"
        'pipe = mlxdiff.load(backend="numpy", low_memory=True)\n'
        'pipe.generate("x", steps=3, seed=1)\n'
        'pipe.settings(prompt="x", seed=3)\n'
        'pipe.generate("x", step=3)\n'
        'pipe.stream("x", steps="3")\n'
        'mlxdiff.load(lora="x")\n',
        encoding="utf-8",
    )
    options = ("--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", str(tmp_path / "c"), "snippet.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line.split(":")[1] for line in errors] == ["5", "6", "7"], done.stdout + done.stderr
    assert 'did you mean "steps"?' in errors[0] and 'did you mean "loras"?' in errors[2]


# ---------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"step": 3}, "there is no argument 'step'; did you mean steps?"),
        ({"num_inference_steps": 3}, "did you mean steps?"),
        ({"guidance_scale": 3}, "did you mean guidance?"),
        ({"cfg_scale": 3}, "did you mean guidance?"),
        ({"negative": "x"}, "did you mean negative_prompt?"),
        ({"num_images_per_prompt": 2}, "did you mean count?"),
        ({"sampler_name": "x"}, "did you mean sampler?"),
        ({"denoising_strength": 0.5}, "did you mean strength?"),
        ({"controlnet_conditioning_scale": 0.5}, "did you mean control_scale?"),
        ({"loras": ()}, "loras is an argument of mlxdiff.load"),
        ({"torch_dtype": "x"}, "dtype is an argument of mlxdiff.load"),
        ({"qqqq": 1}, "there are prompt, negative_prompt, "),
        ({"steps": "3"}, "steps is '3'; expected a whole number, at least 1"),
        ({"width": 2.5}, "width is 2.5; expected a whole number"),
        ({"crop": 3}, "crop is 3; expected two whole numbers"),
        ({"count": 0}, "count is 0; expected a whole number, 1 to 100000"),
        ({"sampler": "best"}, "sampler is 'best'; expected one of auto, checkpoint, "),
        ({"prompt": "b"}, "prompt is given twice"),
    ],
)
def test_wrong_arguments_of_a_run(
    arguments: dict[str, Any], says: str, pipe: mlxdiff.Pipeline
) -> None:
    for function in (pipe.generate, pipe.stream, pipe.settings):
        with pytest.raises(UsageError) as caught:
            function("a", **arguments)
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_arguments_of_loading_and_of_watching(pipe: mlxdiff.Pipeline) -> None:
    for given, says in (
        ({"lora": "x"}, "did you mean loras?"),
        ({"seed": 3}, "seed is an argument of Pipeline.stream"),
        ({"vae": 3}, "vae is 3; expected a path or a hub id"),
        ({"low_memory": "yes"}, "low_memory is 'yes'; expected true or false"),
    ):
        with pytest.raises(UsageError) as caught:
            mlxdiff.load(**given)  # type: ignore[arg-type]
        assert says in str(caught.value)
    with pytest.raises(UsageError, match=r"on_step is an argument of Pipeline\.generate"):
        pipe.stream("a", on_step=print)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="takes prompt without a name"):
        pipe.generate("a", 7)  # type: ignore[misc]


def test_settings_take_every_option_of_a_run(pipe: mlxdiff.Pipeline) -> None:
    assert pipe.settings("a", seed=3, count=2) == pipe.settings("a")
    with pytest.raises(UsageError, match="noise has shape"):
        pipe.settings("a", noise=photo(8, 8))


def test_none_stands_for_the_default(pipe: mlxdiff.Pipeline) -> None:
    none = dict.fromkeys(name for name in entries(RunOptions) if name != "prompt")
    assert make(RunOptions, {"prompt": "a", **none}) == RunOptions("a")
    assert pipe.settings("a", **none) == pipe.settings("a")


# ----------------------------------------------------------------------------------------- values


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy as np

    asked = make(RunOptions, {"width": np.int64(64), "strength": np.float32(0.5)})
    assert (type(asked.width), type(asked.strength)) == (int, float)


@pytest.mark.parametrize(
    ("kind", "word", "value"),
    [
        (values.Whole(1), "3", 3),
        (values.Number(0, 1), "1", 1.0),
        (values.Numbers("HxW", values.Whole(0)), "512x768", (512, 768)),
        (values.Numbers("START,END", values.Number(0, 1)), "0.5,1", (0.5, 1.0)),
        (values.Each(values.Choice(("a", "b"))), "b", "b"),
    ],
)
def test_words_that_are_read(kind: values.Anything, word: str, value: Any) -> None:
    assert kind.parse(word) == value and kind.accept(value) == value


@pytest.mark.parametrize(
    ("kind", "word", "says"),
    [
        (values.Whole(1), "0", "0; expected a whole number, at least 1"),
        (values.Whole(), "1.5", "1.5; expected a whole number"),
        (values.Number(0, 1), "nan", "nan; expected a number, 0 to 1"),
        (values.Number(above=1), "1", "1.0; expected a number above 1"),
        (values.Number(), "much", "'much'; expected a number"),
        (values.Numbers("HxW", values.Whole(0)), "512", "expected two whole numbers, at least 0"),
        (values.Choice(("a", "b")), "c", "'c'; expected one of a, b"),
    ],
)
def test_words_that_are_refused(kind: values.Anything, word: str, says: str) -> None:
    with pytest.raises(values.Unfit) as caught:
        kind.parse(word)
    assert says in str(caught.value)


# ------------------------------------------------------------------------------------ command line


def test_choices_complete_in_a_shell() -> None:
    context = click.Context(generate)
    sampler = next(p for p in generate.params if p.name == "sampler")
    assert isinstance(sampler.type, Value)
    found = [item.value for item in sampler.type.shell_complete(context, sampler, "dpmpp-2")]
    assert found == ["dpmpp-2m", "dpmpp-2m-sde", "dpmpp-2s", "dpmpp-2s-a", "dpmpp-2m-cfg++"]


@pytest.mark.parametrize(
    ("option", "typed", "found"),
    [
        ("--sampler", "eul", "plain,euler-a"),
        ("-m", "sdxl-t", "plain,sdxl-turbo"),
        ("-m", "x", "file,x"),
        ("-o", "x", "file,x"),
        ("--lora", "x", "file,x"),
        ("--image", "x", "file,x"),
        ("--vary-option", "step", "plain,steps="),
        ("--preset", "in", "plain,ink"),
    ],
)
def test_a_shell_completes_values_and_files(
    option: str, typed: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXDIFF_CONFIG", str(tmp_path))
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "ink.toml").touch()
    words = {"COMP_WORDS": f"mlxdiff generate {option} {typed}", "COMP_CWORD": "3"}
    said = CliRunner().invoke(
        mlxdiff_main(), [], env={**words, "_MLXDIFF_COMPLETE": "bash_complete"}, prog_name="mlxdiff"
    )
    assert found in said.output.splitlines()


def test_help_lists_every_sampler_and_schedule() -> None:
    said = " ".join(CliRunner().invoke(generate, ["--help"]).output.split())
    said = said.replace("- ", "-")  # where a line ends within a name
    assert ", ".join(samplers.NAMES) in said and ", ".join(samplers.SCHEDULES) in said


def test_every_sampler_has_a_name_in_other_programs() -> None:
    assert set(SAMPLER_NAMES) == set(samplers.NAMES) - {"auto", "checkpoint"}


STORED = [e for e in ALL if e.key is not None]


@pytest.mark.parametrize("entry", STORED, ids=lambda e: e.name)
def test_metadata_that_an_option_does_not_take_are_refused(entry: Option, tmp_path: Path) -> None:
    """The file may come from anyone: each option is checked by its own entry."""
    said = {"schema": SCHEMA, "prompt": "a", entry.key: {"x": [1]}}
    save_png(photo(8, 8), tmp_path / "x.png", {"mlxdiff": json.dumps(said)})
    result = CliRunner().invoke(
        mlxdiff_main(), ["generate", "--from-image", str(tmp_path / "x.png")]
    )
    assert result.exit_code == 2, result.output
    assert re.search(f"{entry.key} in its (mlxdiff )?metadata is", result.stderr)


def test_an_option_overrides_what_a_picture_says(tmp_path: Path) -> None:
    """A sampler of another program is refused unless one of ours takes its place."""
    text = "a\nSteps: 2, Sampler: DPM adaptive, Schedule type: Turbo, Seed: 3, Size: 32x32"
    save_png(photo(8, 8), tmp_path / "x.png", {"parameters": text})
    given = ["generate", "-m", str(checkpoint("sd15")), "--backend", "numpy"]
    given += ["--from-image", str(tmp_path / "x.png"), "-o", str(tmp_path / "y.png")]
    result = CliRunner().invoke(mlxdiff_main(), given)
    assert result.exit_code == 2 and "'DPM adaptive'; expected one of auto" in result.stderr
    given += ["--sampler", "euler", "--schedule", "normal"]
    result = CliRunner().invoke(mlxdiff_main(), given)
    assert result.exit_code == 0, result.output


def mlxdiff_main() -> click.Command:
    from mlxdiff.cli import main

    return main


# ----------------------------------------------------------------------------------- one run, once


def test_a_command_resolves_plans_and_opens_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "mask.png"):
        Image.new("RGB", (32, 32), "white").save(name)
    calls: Counter[str] = Counter()

    def counted(module: Any, name: str, key: Callable[..., str]) -> None:
        own = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[key(*args)] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(pipeline, "resolve", lambda *_: "resolve")
    counted(samplers, "plan", lambda *_: "plan")
    counted(image_files, "open_picture", lambda path: Path(path).name)
    model = ("-m", str(checkpoint("sd15")), "--backend", "numpy", "--steps", "2", "-s", "1")
    pictures = ("-i", "photo.png", "--mask", "mask.png", "-o", "x.png", "-W", "32", "-H", "32")
    result = CliRunner().invoke(mlxdiff_main(), ["generate", "a", *model, *pictures])
    assert result.exit_code == 0, result.output
    assert calls == {"resolve": 1, "plan": 1, "photo.png": 1, "mask.png": 1}


def test_a_control_image_is_opened_once_for_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxdiff.run.additions import control
    from mlxdiff.run.additions.controlnet import ControlNet

    opened = []
    own = control.load_image
    monkeypatch.setattr(control, "load_image", lambda one: opened.append(one) or own(one))
    component: Any = SimpleNamespace(config=SimpleNamespace(types=None))
    found = control.resolve_controls(
        [ControlNet(component)], [(32, 32), (48, 64)], control_image=photo(32, 32)
    )
    assert len(opened) == 1
    assert [controls[0].image.shape[:2] for controls in found] == [(32, 32), (64, 48)]
