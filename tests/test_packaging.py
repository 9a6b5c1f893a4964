"""The list of packages in pyproject.toml is written by hand; this compares it with the folders."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlxdiff

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_is_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)
    assert block is not None
    listed = set(re.findall(r'"([\w.]+)"', block[1]))
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "mlxdiff").rglob("__init__.py")
    }
    data = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for model in ("builtin", "emoji")
        for path in (ROOT / "mlxdiff" / model).rglob("*.json")
    }
    assert listed == folders | data | {"mlxdiff.convert"}
    assert not [p for p in (ROOT / "convert").iterdir() if p.is_dir() and p.name != "__pycache__"]


def test_convert_has_one_name_only() -> None:
    """Nothing called `convert` may be importable, not even from the repository's root."""
    run = subprocess.run(
        [sys.executable, "-c", "import convert"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "mlxdiff.convert" in run.stderr


def test_pipelines_of_diffusers_are_answered() -> None:
    with pytest.raises(AttributeError, match="has no StableDiffusionPipeline"):
        mlxdiff.StableDiffusionPipeline  # noqa: B018


def test_importing_mlxdiff_is_cheap() -> None:
    code = (
        "import sys, mlxdiff;"
        "heavy = {'numpy', 'mlx', 'PIL', 'click', 'huggingface_hub', 'tokenizers'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_one_command_sets_the_address_of_the_repository(tmp_path: Path) -> None:
    names = ["pyproject.toml", "README.md", "mkdocs.yml", "docs/releasing.md", ".ci/address"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, ".ci/address", "https://github.com/Some-One/other.git"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert set(done.stdout.split()) == {"pyproject.toml", "README.md", "docs/releasing.md"}
    texts = {name: (tmp_path / name).read_text("utf-8") for name in names}
    assert "/mlxdiff/mlxdiff" not in "".join(texts.values())
    assert "git clone https://github.com/Some-One/other && cd other" in texts["README.md"]
    urls = dict(re.findall(r'^(\w+) = "(https:.*)"', texts["pyproject.toml"], re.M))
    assert urls["Documentation"] == "https://some-one.github.io/other"
    assert urls["Changelog"] == "https://github.com/Some-One/other/blob/main/CHANGELOG.md"
