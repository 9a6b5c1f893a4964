"""``mlxdiff score``: compare pictures with words, and with each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mlxdiff.cli import ProgressBar, common_options, show_notes
from mlxdiff.cli.completion import files
from mlxdiff.cli.options import options_named
from mlxdiff.errors import UsageError
from mlxdiff.run.options import LoadOptions

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")


@click.command()
@click.argument("pictures", nargs=-1, required=True, metavar="PICTURE...", shell_complete=files)
@click.option(
    "--judge",
    shell_complete=files,
    required=True,
    metavar="PATH",
    help="The CLIP: its folder, or a hub id (openai/clip-vit-large-patch14).",
)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Score each picture for this text. Repeatable. Default: the prompt in the picture.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="WORDS",
    help="Say how probable this label is among all that are given. Repeatable.",
)
@click.option(
    "--label-file",
    metavar="FILE",
    shell_complete=files,
    help="Read labels from a file, one a line.",
)
@click.option(
    "--template",
    metavar="TEXT",
    help='Text that {} is replaced in by a label. Default: "a picture of {}".',
)
@click.option("--similar", is_flag=True, help="Compare all pictures with the first one.")
@click.option("--duplicates", is_flag=True, help="Group near duplicates.")
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    metavar="NUMBER",
    help="Cosine from which two pictures are near duplicates. Default: 0.97.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each result.")
@options_named(LoadOptions, "backend", "dtype", "low_memory")
@common_options
def score(
    pictures: tuple[str, ...],
    judge: str,
    prompts: tuple[str, ...],
    labels: tuple[str, ...],
    label_file: str | None,
    template: str | None,
    similar: bool,
    duplicates: bool,
    threshold: float | None,
    as_json: bool,
    quiet: bool,
    **load: Any,
) -> None:
    """Compare each PICTURE (or all pictures of a folder) with words, or with each other.

    \b
    mlxdiff score a.png b.png --judge CLIP --prompt "a lighthouse in a storm"
    mlxdiff score photos --judge CLIP --label cat --label dog --label horse
    mlxdiff score photos --judge CLIP --duplicates
    mlxdiff score a.png photos --judge CLIP --similar

    A score is CLIP's: the cosine of picture and text, times the model's scale (100 as a rule).
    """
    from mlxdiff.loading import load_judge
    from mlxdiff.run.judge import SAME, TEMPLATE, groups

    show_notes(quiet)
    words = _words(labels, label_file)
    asked = {
        "--prompt": bool(prompts),
        "--label or --label-file": bool(words),
        "--similar": similar,
        "--duplicates": duplicates,
    }
    if len(given := [name for name, one in asked.items() if one]) > 1:
        raise UsageError(f"{' and '.join(given)} are both given; give one")
    for name, value, needs in (
        ("--template", template, "--label or --label-file"),
        ("--threshold", threshold, "--duplicates"),
    ):
        if value is not None and not asked[needs]:
            raise UsageError(f"{name} has no effect without {needs}")
    paths = _expanded(pictures)
    if (similar or duplicates) and len(paths) < 2:
        raise UsageError("there is one picture only; give at least two to compare")
    own = [] if any(asked.values()) else [_own_prompt(path) for path in paths]
    with ProgressBar("fetching", quiet) as progress:
        options = {name: value for name, value in load.items() if value is not None}
        clip = load_judge(judge, progress=progress, **options)

    def say(record: dict[str, Any], line: str) -> None:
        click.echo(json.dumps(record) if as_json else line)

    if duplicates:
        same = SAME if threshold is None else threshold
        found = groups(clip.similarities(paths), same)
        for group in found:
            names = [paths[i] for i in group]
            say({"duplicates": names}, "  ".join(names))
        if not found and not as_json:
            click.echo(f"no near duplicates among {len(paths)} pictures (threshold {same:g})")
    elif similar:
        cosines = clip.similarities(paths)[0]
        order = sorted(range(1, len(paths)), key=lambda i: -cosines[i])
        for i in order:
            value = round(float(cosines[i]), 4)
            say({"path": paths[i], "to": paths[0], "cosine": value}, f"{value:.4f}  {paths[i]}")
    elif words:
        shares = clip.labels(paths, words, TEMPLATE if template is None else template)
        for path, row in zip(paths, shares, strict=True):
            best = sorted(range(len(words)), key=lambda i: -row[i])
            named = {words[i]: round(float(row[i]), 4) for i in best}
            line = ", ".join(f"{word} {100 * named[word]:.1f} %" for word in list(named)[:5])
            say({"path": path, "labels": named}, f"{path}  {line}")
    else:
        texts = list(prompts) or list(dict.fromkeys(own))
        scores = clip.scores(paths, texts)
        for i, path in enumerate(paths):
            for text in prompts or [own[i]]:
                value = round(float(scores[i, texts.index(text)]), 4)
                shown = f"  {text}" if len(texts) > 1 else ""
                say({"path": path, "prompt": text, "score": value}, f"{value:.2f}  {path}{shown}")


def _expanded(pictures: Sequence[str]) -> list[str]:
    """All pictures, those of folders in order of their names. Raises: UsageError."""
    found: list[str] = []
    for one in pictures:
        if not Path(one).is_dir():
            found.append(one)
            continue
        inside = sorted(str(p) for p in Path(one).iterdir() if p.suffix.lower() in SUFFIXES)
        if not inside:
            raise UsageError(f"{one}: holds no picture")
        found += inside
    return found


def _own_prompt(path: str) -> str:
    """The prompt that a picture was drawn from. Raises: UsageError."""
    from mlxdiff.pictures.metadata import read

    try:
        prompt = read(path).prompt
    except UsageError as error:
        raise UsageError(f"{error}; give a text to compare it with (--prompt)") from None
    if not prompt:
        raise UsageError(f"{path}: was drawn without a prompt; give one (--prompt)")
    return prompt


def _words(labels: Sequence[str], path: str | None) -> list[str]:
    """The labels from the command line and from a file. Raises: UsageError."""
    words = list(labels)
    if path is not None:
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            raise UsageError(f"{path}: not a UTF-8 text file") from None
        words += [line.strip() for line in lines if line.strip()]
        if not words:
            raise UsageError(f"{path}: holds no label; expected one on each line")
    return list(dict.fromkeys(words))
