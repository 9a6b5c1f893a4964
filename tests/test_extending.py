"""Follow the recipes of docs/extending.md to the letter, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(
    r"^(?P<kind>File|In) `(?P<path>[^`]+)`[^\n]*:\n|^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def changed(old: str, diff: str) -> str:
    """Apply one hunk: its lines without `+` must stand in the text exactly once, in this order."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert old.count(before) == 1, f"this stands {old.count(before)} times in the file:\n{before}"
    return old.replace(before, after)


def follow(section: str, copy: Path) -> tuple[list[str], int]:
    """Do what a section says; return the files it makes, and how many lines of code it adds."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    path, made, lines = copy, [], 0
    for found in BLOCK.finditer(text):
        if found["path"]:
            path = copy / found["path"]
        elif found["language"] == "python":
            assert not path.exists()
            path.write_text(found["text"], encoding="utf-8")
            made.append(path.relative_to(copy).as_posix())
        elif found["language"] == "diff":
            path.write_text(changed(path.read_text(encoding="utf-8"), found["text"]), "utf-8")
            if path.suffix == ".py":
                lines += found["text"].count("\n+") + found["text"].startswith("+")
    return made, lines


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, its package laid out as it is installed."""
    target = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("__pycache__", "golden", "*.png")
    for name in ("mlxdiff", "convert", "tests", "docs"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    shutil.copytree(ROOT / "convert", target / "mlxdiff" / "convert", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def run(copy: Path, *command: str) -> str:
    """Run Python in the copy, on the copy's own package."""
    env = os.environ | {"PYTHONPATH": str(copy), "MLXDIFF_CACHE": str(copy / "cache")}
    done = subprocess.run(
        [sys.executable, *command], cwd=copy, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def draw(copy: Path, sampler: str, steps: int, *more: str, name: str = "") -> np.ndarray:
    """A picture of the built-in model, from the command line; (H, W, 3), 0 to 255."""
    name = name or f"{sampler}-{steps}.png"
    options = ["--steps", str(steps), "--sampler", sampler, "--schedule", "karras", "-g", "1"]
    prompt = "a large red circle on a blue background"
    options += ["--seed", "0", "--backend", "numpy", "-o", name, *more]
    run(copy, "-m", "mlxdiff", "generate", prompt, *options)
    with Image.open(copy / name) as picture:
        return np.asarray(picture, np.float64)


def test_a_sampler_is_one_file_and_two_lines(copy: Path) -> None:
    assert follow("A sampler", copy) == (["mlxdiff/samplers/ab2.py"], 2)
    where = run(copy, "-c", "import mlxdiff.samplers.ab2 as new; print(new.__file__)")
    assert Path(where.strip()) == copy / "mlxdiff" / "samplers" / "ab2.py"
    # It draws the picture that a fine solution of the ODE gives, nearer than Euler's method does.
    fine, new, euler = draw(copy, "dpmpp-2m", 16), draw(copy, "ab2", 8), draw(copy, "euler", 8)
    off, usual = np.abs(new - fine).mean(), np.abs(euler - fine).mean()
    assert off < usual, (off, usual)
    with Image.open(copy / "ab2-8.png") as picture:
        assert "Sampler: AB2" in picture.info["parameters"]
    # The other lists follow: A1111's names, the page, and the checks of every plan.
    tests = ("samplers_registry", "samplers")
    run(copy, "-m", "pytest", "-q", *(f"tests/test_{name}.py" for name in tests))


def test_an_option_is_one_entry_and_its_use(copy: Path) -> None:
    assert follow("An option", copy) == ([], 7)
    assert "--noise-scale" in run(copy, "-m", "mlxdiff", "generate", "--help")
    plain, same = draw(copy, "euler", 2), draw(copy, "euler", 2, "--noise-scale", "1", name="1.png")
    less = draw(copy, "euler", 2, "--noise-scale", "0.8", name="less.png")
    assert (plain == same).all() and (plain != less).any()
    # The picture holds it, and draws itself again.
    run(copy, "-m", "mlxdiff", "generate", "--from-image", "less.png", "-o", "again.png")
    with Image.open(copy / "again.png") as again:
        assert (np.asarray(again) == less).all()
    # Python has it too: in the signature, checked, and with the name that others give it.
    code = """
import inspect, mlxdiff
from mlxdiff.pipeline import Pipeline
assert "noise_scale" in inspect.signature(Pipeline.generate).parameters
pipe = mlxdiff.load(backend="numpy")
for wrong in ({"noise_scale": "much"}, {"initial_noise_multiplier": 1.1}):
    try:
        pipe.settings("a red circle", **wrong)
    except mlxdiff.UsageError as error:
        print(error)
"""
    said = run(copy, "-c", code)
    assert "noise_scale is 'much'; expected a number" in said
    assert "did you mean noise_scale?" in said


def test_a_hunk_that_does_not_fit_is_an_error() -> None:
    assert changed("a\nb\nc\n", " a\n+x\n-b\n") == "a\nx\nc\n"
    for old in ("a\nc\n", "a\nb\na\nb\n"):
        with pytest.raises(AssertionError, match="times in the file"):
            changed(old, " a\n+x\n-b\n")
