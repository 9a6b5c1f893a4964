"""``mlxdiff generate``: prompts in, picture files out. Its options are in ``run.options``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from mlxdiff.cli import common_options, show_notes
from mlxdiff.cli import loras as lora_options
from mlxdiff.cli.advice import quoted_for_shell
from mlxdiff.cli.options import given_to, table_options
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
    places = {
        "PROMPT": text,
        "--prompt": asked.pop("prompt", None),
        "--prompt-file": command.prompt_file,
    }
    if len(names := [name for name, value in places.items() if value is not None]) > 1:
        raise UsageError(f"{' and '.join(names)} are both given; give one")
    has_clip_skip = asked.get("clip_skip") is not None
    prompt = next((places[one] for one in ("PROMPT", "--prompt") if places[one] is not None), None)
    if names:
        asked["prompt"] = prompt or ""  # whatever the picture says
    asked = replayed(asked, command.from_image, command.trust_image)
    recorded = asked.pop("prompt", None)
    asked = {name: value for name, value in asked.items() if value not in (None, (), [])}

    _check_prompt(prompt or command.prompt_file, asked.get("model"))

    from mlxdiff.backends.processes import started_together
    from mlxdiff.cli import batch, turntable
    from mlxdiff.cli.output import Output
    from mlxdiff.run.seeds import pick_seeds

    processes = started_together()
    lines = batch.lines_of(recorded if prompt is None else prompt, command.prompt_file)
    seed = processes.agree(pick_seeds(None, 1)[0])
    turn = None
    if command.turntable is not None:
        command, turn = turntable.places(command, asked.get("seed", seed))
    jobs, axes = batch.jobs_of(command, asked, lines, seed)
    numbers_names = not command.resume and processes.count == 1
    output = Output(command, quiet, jobs, numbers_names)
    if command.grid is not None:
        _check_grid(command)
    with output:
        report = (lambda pipe: None) if quiet else _Additions().report

        def adapted(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
            if pipe.model.is_sdxl:
                return clip_skip_for_sdxl(options, command.from_image, has_clip_skip)
            return options

        batch.draw(jobs, output, processes, report, adapted, start)
        saved, skipped, failed = processes.add([output.saved, output.skipped, output.failed])
        if processes.count > 1:  # the others have written theirs
            output.files = {i: one for i, one in enumerate(output.names.paths) if one.exists()}
        if command.grid is not None and processes.rank == 0:
            output.draw_grid(axes)
        if turn is not None and processes.rank == 0:
            turntable.write(turn, output.files, command.force or command.resume)
        output.reporter.event("end", saved=saved, skipped=skipped, failed=failed)
    if skipped and not quiet:
        tell(f"{skipped} of {len(output.names.paths)} pictures were there already")
    if failed:
        raise UsageError(
            f"{failed} of {len(jobs)} jobs could not be drawn; {saved} pictures are saved"
        )


def _check_prompt(given: Any, model: Any) -> None:
    """Raise UsageError if there is none, and the model looks like one."""
    if not given and " " in str(model) and not Path(str(model)).exists():
        raise UsageError(
            f"no prompt is given, and there is no model {model!r}; if that is the prompt, give it "
            f"without -m: mlxdiff generate {quoted_for_shell(str(model))}"
        )


def _check_grid(command: CommandOptions) -> None:
    """Raise UsageError if the sheet cannot be written, before anything is drawn."""
    from mlxdiff.pictures.formats import ENDINGS, ending
    from mlxdiff.pictures.image import check_writable

    path = Path(str(command.grid)).expanduser()
    if ending(path) not in ENDINGS:
        raise UsageError(f"--grid {path}: end it in one of {', '.join(ENDINGS)}")
    check_writable(path, command.force or command.resume, tuple(ENDINGS))


class _Additions:
    """Says on stderr which words have vectors of their own, and what each LoRA changes, once."""

    def __init__(self) -> None:
        self._said: tuple[Any, ...] = ()

    def report(self, pipe: Any) -> None:
        """Say it of a pipeline, unless it was said last."""
        now = (*pipe.embeddings, *pipe.loras)
        if now == self._said:
            return
        self._said = now
        for word in pipe.embeddings:
            many = "1 vector" if word.count == 1 else f"{word.count} vectors"
            tell(f"Embedding {word.path.name}: {word.token!r} stands for {many}")
        lora_options.report(pipe.loras)
