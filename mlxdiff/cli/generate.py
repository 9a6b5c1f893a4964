"""``mlxdiff generate``: prompts in, PNG files out. Its options are in ``run.options``."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import click

from mlxdiff.cli import ProgressBar, common_options, show_notes
from mlxdiff.cli import loras as lora_options
from mlxdiff.cli.options import given_to, table_options
from mlxdiff.cli.output import Output
from mlxdiff.cli.replay import clip_skip_for_sdxl, replayed
from mlxdiff.cli.sections import SectionedCommand
from mlxdiff.cli.streams import tell
from mlxdiff.errors import UsageError
from mlxdiff.run.options import SECTIONS, CommandOptions, LoadOptions, RunOptions
from mlxdiff.run.table import make


@click.command(cls=SectionedCommand, sections=SECTIONS, context_settings={"show_default": False})
@click.argument("text", metavar="[PROMPT]", required=False)
@table_options
@common_options
def generate(text: str | None, quiet: bool, **given: Any) -> None:
    """Draw pictures from a PROMPT and say where they are.

    \b
    mlxdiff generate "a red circle on a blue background" --seed 7
    mlxdiff generate -m stabilityai/sd-turbo "a lighthouse in a storm" --steps 4 -g 0
    """
    start = time.perf_counter()
    show_notes(quiet)
    command = make(CommandOptions, given_to(CommandOptions, given))
    asked = given_to(LoadOptions, given) | given_to(RunOptions, given)
    places = {"PROMPT": text, "--prompt": asked.pop("prompt", None)}
    has_clip_skip = asked.get("clip_skip") is not None
    asked = replayed(asked, command.from_image, command.trust_image)
    prompts = _prompts(places, command.prompt_file, asked.pop("prompt", None))
    if prompts == [None] and "model" not in asked:  # a model of one's own may draw without
        raise UsageError(
            'no prompt is given; for example: mlxdiff generate "a red circle on a blue background"'
        )
    for_run = given_to(RunOptions, asked)

    from mlxdiff.loading import load
    from mlxdiff.run.settings import pick_seeds

    seeds = pick_seeds(for_run.pop("seed", None), for_run.get("count", 1), for_run.get("vary"))
    output = Output(command, quiet, prompts, seeds)
    with ProgressBar("fetching", quiet) as progress:
        pipe = load(**given_to(LoadOptions, asked), progress=progress)
    if pipe.model.is_sdxl:
        for_run = clip_skip_for_sdxl(for_run, command.from_image, has_clip_skip)
    if not quiet:
        _report_additions(pipe)
    with output:
        for index, one in enumerate(prompts):
            run = pipe.stream(one, seed=seeds[0], **for_run)
            if index == 0:  # what can be refused is refused before anything is drawn
                output.check(run)
            output.draw(pipe, run, index, start)
            start = time.perf_counter()


def _report_additions(pipe: Any) -> None:
    """Say on stderr which words have vectors of their own, and what each LoRA changes."""
    for word in pipe.embeddings:
        many = "1 vector" if word.count == 1 else f"{word.count} vectors"
        tell(f"Embedding {word.path.name}: {word.token!r} stands for {many}")
    lora_options.report(pipe.loras)


def _prompts(
    places: dict[str, str | None], prompt_file: str | None, recorded: str | None
) -> list[str | None]:
    """The prompts to draw, from the one place that gives them; [None] where none does.

    Args:
        places: where one prompt may stand, and what stands there.
        prompt_file: a file of prompts; - is standard input.
        recorded: the prompt of a picture.
    """
    given = {name: value for name, value in places.items() if value is not None}
    names = [*given, *([] if prompt_file is None else ["--prompt-file"])]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} are both given; give one")
    if prompt_file is None:
        return [next(iter(given.values()), recorded)]
    try:
        text = sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{prompt_file}: not a UTF-8 text file") from None
    # Lines as text editors have them: str.splitlines would also cut at U+2028 and the like.
    lines = re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff"))
    prompts: list[str | None] = [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{prompt_file}: holds no prompt; expected one on each line")
    return prompts
