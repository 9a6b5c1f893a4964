"""Count what is read in pictures of other programs, by program and field.

    python benchmarks/foreign_pictures.py FOLDER...    # prints the table of docs/replay.md
    python benchmarks/foreign_pictures.py FOLDER --names    # and what is named in the notes

A field counts as honoured if the picture says it and an option takes it: a sampler, for example,
must be one that mlxdiff has. "named" counts pictures with something in the note. The pictures
themselves are not part of this repository; docs/replay.md says where they come from.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from mlxdiff.errors import MlxdiffError
from mlxdiff.pictures.metadata import read
from mlxdiff.samplers.names import find_sampler, find_schedule

FIELDS = (
    "prompt", "negative_prompt", "seed", "steps", "guidance", "size", "sampler", "schedule",
    "model", "vae", "loras", "clip_skip", "image", "hires", "rng",
)  # fmt: skip
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".avif"}


def fields_of(values: dict[str, Any]) -> set[str]:
    """Return the fields that a picture says and mlxdiff honours."""
    found = {name for name in FIELDS if values.get(name) not in (None, "", [])}
    if values.get("width") and values.get("height"):
        found.add("size")
    if find_sampler(str(values.get("sampler"))) is None:
        found.discard("sampler")
    if find_schedule(str(values.get("schedule"))) is None:
        found.discard("schedule")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--names", action="store_true", help="list what is named")
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    names: dict[str, Counter[str]] = defaultdict(Counter)
    other: Counter[str] = Counter()
    paths = [
        p for folder in args.folders for p in folder.rglob("*") if p.suffix.lower() in PICTURES
    ]
    for path in sorted(paths):
        try:
            values = read(path).to_dict()
        except MlxdiffError as error:
            other["say nothing" if "says nothing" in str(error) else "are refused"] += 1
            continue
        tool = str(values.get("tool", "mlxdiff")).split()[0]
        counts[tool]["pictures"] += 1
        counts[tool].update(fields_of(values))
        counts[tool]["named"] += bool(values.get("parameters"))
        counts[tool]["prompt asked for"] += "unread_prompt" in values
        names[tool].update(list(values.get("parameters") or ()))
    columns = ("pictures", *FIELDS, "named", "prompt asked for")
    print("| | " + " | ".join(columns).replace("_", " ") + " |")
    print("|---|" + "---:|" * len(columns))
    for tool, found in sorted(counts.items(), key=lambda one: -one[1]["pictures"]):
        print(f"| {tool} | " + " | ".join(str(found[column]) for column in columns) + " |")
    print(f"\n{len(paths)} pictures; " + ", ".join(f"{n} {what}" for what, n in other.items()))
    if args.names:
        for tool, found in names.items():
            print(f"{tool}: " + ", ".join(f"{name} ({n})" for name, n in found.most_common()))


if __name__ == "__main__":
    main()
