"""``--fast``: the published few-step LoRA of a model, from a mirror of the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from fake_hub import serve
from golden_data import checkpoint
from test_cli import error_of, generate, pixels, run, texts

import mlxdiff
from mlxdiff import samplers
from mlxdiff.report import doctor
from mlxdiff.store import few_step
from mlxdiff.store.few_step import FEW_STEP, find

SMALL = ("-W", "32", "-H", "32", "-s", "1")
WAY = few_step.FewStep(
    "LCM-LoRA", "sd1", "org/name", "style.safetensors", 1, "openrail++", 3, 1.0, "lcm"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an empty cache, and a table whose repository the mirror has."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(few_step, "FEW_STEP", (WAY,))
    return tmp_path


@contextmanager
def mirror(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    data = lora_files.write("sd15-kohya", here / "elsewhere").read_bytes()
    with serve({"README.md": "x", WAY.file: data}, monkeypatch) as hub:
        yield hub


def test_the_lora_its_sampler_and_its_steps(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mirror(here, monkeypatch):
        events = ("--json", "--progress", "json")
        result = generate("a", "--fast", "-o", "fast.png", *SMALL, *events)
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines()]
    fetched = [one for one in told if one.get("stage") == "download"]
    assert fetched and fetched[-1]["done"] == fetched[-1]["total"] > 0
    assert "fast: LCM-LoRA (org/name/style.safetensors, 1 MB, licence openrail++)" in result.stderr
    said = json.loads(texts(here / "fast.png")["mlxdiff"])
    assert (said["sampler"], said["steps"], said["guidance"]) == ("lcm", 3, 1.0)
    assert said["fast"] is True and said["loras"][0]["fast"] == WAY.id

    # The same by hand.
    lora = here / "elsewhere" / "sd15-kohya.safetensors"
    how = ("--lora", lora, "--sampler", "lcm", "--steps", "3", "-g", "1")
    assert generate("a", "-o", "hand.png", *how, *SMALL).exit_code == 0
    np.testing.assert_array_equal(pixels(here / "fast.png"), pixels(here / "hand.png"))

    # Again from the picture, without a network.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = generate("--from-image", "fast.png", "-o", "again.png")
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(pixels(here / "fast.png"), pixels(here / "again.png"))


def test_what_is_said_comes_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mirror(here, monkeypatch):
        pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy", fast=True)
    assert pipe.is_fast
    settings = pipe.settings("a", steps=5, guidance=2.0, sampler="euler")
    assert (settings.steps, settings.guidance, settings.sampler) == (5, 2.0, "euler")
    pipe.set_loras([here / "elsewhere" / "sd15-kohya.safetensors"])  # one beside it
    assert len(pipe.loras) == 2 and pipe.is_fast
    pipe.set_fast(False)
    assert len(pipe.loras) == 1 and pipe.settings("a").steps == 20


def test_offline_it_says_what_to_fetch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = error_of(generate("a", "--fast", *SMALL))
    assert "fetch it with: hf download org/name style.safetensors" in said
    assert "licence openrail++" in said
    assert not list(here.glob("*.png"))


def test_a_picture_of_a_stranger_fetches_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mirror(here, monkeypatch) as hub:
        assert generate("a", "--fast", "-o", "fast.png", *SMALL).exit_code == 0
        monkeypatch.setenv("HF_HOME", str(here / "another"))
        hub.got.clear()
        assert "give --fast" in error_of(generate("--from-image", "fast.png", "-o", "x.png"))
        assert hub.got == []
        again = generate("--from-image", "fast.png", "--trust-image", "-o", "again.png")
        assert again.exit_code == 0, again.output


@pytest.mark.parametrize("name", ["lcm", "sdxl-turbo"])
def test_a_model_for_few_steps_needs_nothing(here: Path, name: str) -> None:
    result = run("generate", "-m", checkpoint(name), "--backend", "numpy", "a", "--fast", *SMALL)
    assert result.exit_code == 0, result.output
    assert "Note: fast has no effect" in result.stderr


def test_a_model_that_nothing_is_published_for(here: Path) -> None:
    result = run("generate", "-m", checkpoint("sd21v"), "--backend", "numpy", "a", "--fast", *SMALL)
    assert "no few-step LoRA is published" in error_of(result)


def test_the_table() -> None:
    assert {one.family for one in FEW_STEP} == {"sd1", "sd2", "sdxl"}
    for one in FEW_STEP:
        assert one.is_shipped or one.repo.count("/") == 1
        assert one.file.endswith(".safetensors")
        assert one.sampler in samplers.NAMES and one.schedule in samplers.SCHEDULES
        assert one.eta is None or one.sampler == "tcd"
    names = [find(family, "x") for family in ("sd1", "sd2", "sdxl", "ddpm")]
    assert [one and one.name for one in names] == ["LCM-LoRA", "TCD", "SDXL-Lightning", None]
    ssd = find("sdxl", "segmind/SSD-1B")
    assert ssd is not None and ssd.repo == "latent-consistency/lcm-lora-ssd-1b"
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text("utf-8")
    for one in FEW_STEP:  # the documentation says the same
        assert f"`{one.id}`" in text, one.id
    assert replace(WAY, megabytes=0).id in str(replace(WAY, megabytes=0))


def test_the_built_in_model_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four evaluations without guidance, by a file of the package: nothing is fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    drawn = run("generate", "a small red circle", "--fast", "--seed", "7", "-o", "fast.png")
    assert drawn.exit_code == 0, drawn.output
    assert "fast: distilled (builtin/few_step.safetensors" in drawn.stderr
    said = json.loads(texts(tmp_path / "fast.png")["mlxdiff"])
    assert (said["sampler"], said["schedule"]) == ("ddim", "trailing")
    assert (said["steps"], said["guidance"]) == (4, 1.0)
    assert said["loras"][0]["fast"] == "builtin/few_step.safetensors"
    again = run("generate", "--from-image", "fast.png", "-o", "again.png")
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(pixels(tmp_path / "fast.png"), pixels(tmp_path / "again.png"))

    plain = run("generate", "a small red circle", "--steps", "4", "--seed", "7", "-o", "plain.png")
    assert "in so few steps this model draws better with --fast" in plain.stderr
    assert json.loads(texts(tmp_path / "plain.png")["mlxdiff"])["guidance"] == 7.5
    quiet = run("generate", "a small red circle", "--steps", "5", "--seed", "7", "-o", "more.png")
    assert "--fast" not in quiet.stderr


def test_the_doctor_reads_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mlxdiff.loading.BUILTIN / "few_step.safetensors"
    (tmp_path / "short.safetensors").write_bytes(whole.read_bytes()[:100_000])
    assert next(doctor._shipped()).state == doctor.OK
    monkeypatch.setattr(
        few_step.FewStep, "place", property(lambda self: str(tmp_path / "short.safetensors"))
    )
    found = next(doctor._shipped())
    assert found.state == doctor.FAULT and "truncated" in found.text
