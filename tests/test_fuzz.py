"""100,000 hostile inputs over all parsers: each is read, or refused in one line, soon and small.

pytest -m slow tests/test_fuzz.py        (the short form runs without -m slow)

``python tests/test_fuzz.py NAME:NUMBER`` gives one input again, to see what it does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile import MEMORY, PARSERS, SECONDS, judge


@pytest.mark.parametrize("name", PARSERS)
def test_hostile_input(name: str, tmp_path: Path) -> None:
    verdict = judge(name, range(PARSERS[name].short), tmp_path)
    assert not verdict.faults
    assert verdict.outcomes["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_much_hostile_input(name: str, tmp_path: Path) -> None:
    verdict = judge(name, range(PARSERS[name].long), tmp_path)
    worst = f"at most {verdict.seconds:.2f} s and {verdict.memory >> 20} MB"
    print(f"{name}: {dict(verdict.outcomes)}; {worst}; {len(verdict.faults)} faults")
    assert not verdict.faults
    assert verdict.seconds <= SECONDS and verdict.memory <= MEMORY


def test_the_slow_test_has_100_000_inputs() -> None:
    assert sum(parser.long for parser in PARSERS.values()) == 100_000


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        parser, _, number = sys.argv[1].partition(":")
        print(judge(parser, range(int(number), int(number) + 1), Path(folder)))
