"""A wrong command or option is answered with what to type; `mlxdiff samplers` lists the names."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from mlxdiff.cli import main
from mlxdiff.samplers import SAMPLERS, SCHEDULES


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["a red circle"], 'to draw it: mlxdiff generate "a red circle"'),
        (["a", "red", "circle"], 'to draw it: mlxdiff generate "a red circle"'),
        (["a red circle", "--seed", "3"], 'mlxdiff generate "a red circle" --seed 3'),
        (["it costs $5 today"], "mlxdiff generate 'it costs $5 today'"),
        (["generat", "x"], "did you mean mlxdiff generate?"),
        (["help"], "type mlxdiff --help"),
        (["version"], "type mlxdiff --version"),
        (["txt2img", "a cat"], "type mlxdiff generate"),
        (["quantize"], "type mlxdiff convert -q 4"),
        (["pull", "sdxl"], "type mlxdiff generate -m MODEL"),
        (["models", "rm", "sdxl"], "type mlxdiff models remove"),
        (["models", "remov"], "did you mean mlxdiff models remove?"),
        (["models", "xyz"], "there are remove"),
        (["models", "list"], "mlxdiff models alone lists the models"),
        (["-V"], "there is no option -V; it is --version here"),
        (["-m", "sd15", "a cat"], "-m stands behind the command: mlxdiff generate -m sd15 'a cat'"),
        (["--nothing"], "No such option '--nothing'"),
        (["models", "-m", "sd15"], "No such option '-m'"),
        (["generate", "a", "red", "circle"], 'quote it: mlxdiff generate "a red circle"'),
        (["generate", "a cat", "--size", "512"], "it is --width and --height here"),
        (["generate", "a cat", "--num-inference-steps", "5"], "it is --steps here"),
        (["generate", "a cat", "--controlnet_conditioning_scale", "1"], "it is --control-scale"),
        (["generate", "a cat", "--init-image", "x.png"], "it is --image here"),
        (["generate", "a cat", "--samper", "euler"], "--sampler"),
        (["generate", "a cat", "--sampler", "eulerr"], "'eulerr' (did you mean euler?); expected"),
        (["generate", "a cat", "--schedule", "kar"], "(did you mean karras?)"),
        (["generate", "a cat", "-w", "512"], "it is -W here"),
        (["generate", "a cat", "--lora", "x.safetensors", "0.7"], "--lora x.safetensors:0.7"),
        (["generate", "a cat", "-o", "."], "is a folder; add a name, such as {seed}.png"),
        (["generate", "-m", "a red circle"], "give it without -m"),
        (["generate", "a cat", "-m", "flux"], "is no Stable Diffusion"),
    ],
    ids=" ".join,
)
def test_wrong_words_are_answered(typed: list[str], answer: str) -> None:
    done = CliRunner().invoke(main, typed, prog_name="mlxdiff")
    assert done.exit_code == 2
    assert answer in done.output


def test_samplers_and_schedules_are_listed() -> None:
    done = CliRunner().invoke(main, ["samplers"])
    assert done.exit_code == 0
    words = done.output.split()
    assert {*SAMPLERS, *SCHEDULES} <= set(words)
    found = json.loads(CliRunner().invoke(main, ["samplers", "--json"]).output)
    by_id = {one["id"]: one for one in found["samplers"]}
    assert list(by_id) == list(SAMPLERS)
    assert [one["id"] for one in found["schedules"]] == list(SCHEDULES)
    assert by_id["heun"]["evaluations"] == 19 and not by_id["heun"]["stochastic"]
    assert by_id["euler-a"]["evaluations"] == 10 and by_id["euler-a"]["stochastic"]


def parameters() -> Iterator[tuple[str, click.Context, click.Parameter]]:
    """All options and arguments of all commands."""
    groups: list[tuple[str, click.Group]] = [("mlxdiff", main)]
    for path, group in groups:
        for name in group.list_commands(click.Context(group)):
            command = group.get_command(click.Context(group), name)
            if isinstance(command, click.Group):
                groups.append((f"{path} {name}", command))
            elif command is not None:
                context = click.Context(command, info_name=name)
                for one in command.get_params(context):
                    yield f"{path} {name} {one.opts[-1]}", context, one


def test_tab_completes_files_and_words_everywhere() -> None:
    found, lacking = {}, []
    for name, context, one in parameters():
        found[name] = items = one.shell_complete(context, "")
        shown = str(one.metavar or "").startswith(("PATH", "FILE", "FOLDER", "PICTURE", "OUT"))
        if (shown or isinstance(one.type, click.Path)) and "file" not in {i.type for i in items}:
            lacking.append(name)
    assert lacking == []
    for name, word in {
        "mlxdiff bench --sampler": "euler",
        "mlxdiff bench --model": "sdxl",
        "mlxdiff info path": "sd15",
        "mlxdiff convert --to": "diffusers",
        "mlxdiff generate --style": "watercolor",
        "mlxdiff serve --model": "sdxl",
    }.items():
        assert word in {item.value for item in found[name]}, name
