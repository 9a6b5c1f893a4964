"""Stages, steps and seconds left of a run and of a download; a token that cancels both."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import lora_files
import pytest
from fake_hub import serve
from golden_data import checkpoint

import mlxdiff
from mlxdiff.run.progress import STAGES, Progress

SMALL = {"width": 32, "height": 32, "steps": 3, "seed": 1}


@pytest.fixture
def pipe() -> mlxdiff.Pipeline:
    return mlxdiff.load(checkpoint("sd15"), backend="numpy")


def test_stages_come_in_order(pipe: mlxdiff.Pipeline) -> None:
    said: list[Progress] = []
    result = pipe.generate("a", **SMALL, count=2, on_progress=said.append)
    assert {one.stage for one in said} == set(STAGES) - {"download"}
    loaded = [one.item for one in said if one.stage == "load"]
    assert loaded == ["text_encoder", "unet", "vae"]
    steps = [(one.picture, one.step) for one in said if one.stage == "step"]
    assert steps == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert {(one.steps, one.pictures) for one in said} == {(3, 2)}
    left = [one.seconds_left for one in said if one.stage == "step"]
    assert said[0].seconds_left is None and left[-1] == 0.0
    assert all(one is not None for one in left) and left[0] > 0  # type: ignore[operator]
    assert pipe.generate("a", **SMALL, count=2) == result  # watching changes nothing
    warm: list[Progress] = []
    pipe.generate("a", **SMALL, on_progress=warm.append)
    assert "load" not in {one.stage for one in warm}
    assert warm[0].to_dict()["stage"] == "encode"


def test_cancel_stops_after_the_step(pipe: mlxdiff.Pipeline) -> None:
    cancel, steps = mlxdiff.Cancel(), []

    def watch(now: Progress) -> None:
        steps.append(now.step)
        if now.stage == "step" and now.step == 2:
            cancel.cancel()

    with pytest.raises(mlxdiff.Cancelled):
        pipe.generate("a", **SMALL, on_progress=watch, cancel=cancel)
    assert max(steps) == 2 and cancel.is_cancelled
    with pytest.raises(mlxdiff.Cancelled):  # before the first step, too
        pipe.generate("a", **SMALL, cancel=cancel)
    assert pipe.generate("a", **SMALL).seeds == [1]


def test_finished_pictures_stay(pipe: mlxdiff.Pipeline) -> None:
    cancel = mlxdiff.Cancel()
    run = pipe.stream("a", **SMALL, count=2, cancel=cancel)
    with pytest.raises(mlxdiff.Cancelled):
        for step in run:
            if step.picture == 1:
                cancel.cancel()
    assert len(run.finished) == 1
    assert run.finished[0].image.tobytes() == pipe.generate("a", **SMALL).images[0].tobytes()


def test_cancel_from_another_thread(pipe: mlxdiff.Pipeline) -> None:
    cancel = mlxdiff.Cancel()
    threading.Timer(0.3, cancel.cancel).start()
    with pytest.raises(mlxdiff.Cancelled):
        pipe.generate("a", width=32, height=32, steps=1000, cancel=cancel)


@pytest.mark.parametrize("stage", ["encode", "load", "decode"])
def test_an_error_of_the_callback_ends_the_run(pipe: mlxdiff.Pipeline, stage: str) -> None:
    class Mine(Exception):
        pass

    def watch(now: Progress) -> None:
        if now.stage == stage:
            raise Mine

    with pytest.raises(Mine):
        pipe.generate("a", **SMALL, on_progress=watch)
    assert pipe.generate("a", **SMALL).seeds == [1]


def test_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    data = lora_files.write("sd15-kohya", tmp_path).read_bytes()
    model = checkpoint("sd15")
    with serve({"README.md": "x", "style.safetensors": data}, monkeypatch):
        cancel = mlxdiff.Cancel()
        cancel.cancel()
        with pytest.raises(mlxdiff.Cancelled):
            mlxdiff.load(model, backend="numpy", loras=["org/name"], cancel=cancel)
        said: list[Progress] = []
        mlxdiff.load(model, backend="numpy", loras=["org/name"], on_progress=said.append)
        assert {one.stage for one in said} == {"download"}
        assert said[-1].done == said[-1].total == len(data)
        assert said[-1].item == "style.safetensors"
