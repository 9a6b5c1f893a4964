"""The table of threads: what is done x in which thread x type x backend. Each cell draws the same
picture as one thread alone (docs/embedding.md).

pytest -m "slow or not slow" tests/test_thread_matrix.py      all 96 cells
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from golden_data import checkpoint

import mlxdiff
from mlxdiff.errors import UsageError

PROMPTS = "a [cat|dog] <lora:sd15-kohya:1>", "a [dog:cat:0.5]"
CALL: dict[str, Any] = {"prompt_syntax": "a1111", "steps": 2, "width": 16, "height": 16}
Found = list[bytes]
Work = Iterator[None]
"""One piece after the other; a piece may run in any thread."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA."""
    folder = tmp_path_factory.mktemp("loras")
    lora_files.write("sd15-kohya", folder)
    return folder


@functools.cache
def load(folder: Path, backend: str, dtype: str, which: str = "shared") -> mlxdiff.Pipeline:
    """A pipeline that all cells use, or another one."""
    return mlxdiff.load(checkpoint("sd15"), backend=backend, dtype=dtype, lora_folder=folder)


@functools.cache
def expected(folder: Path, backend: str, dtype: str) -> tuple[dict[str, Found], ...]:
    """What each kind of work gives in one thread, with a pipeline of its own, for each prompt."""
    pipe = load(folder, backend, dtype, "alone")
    every = []
    for seed, prompt in enumerate(PROMPTS):
        picture = [pipe.generate(prompt, seed=seed, **CALL).images[0].tobytes()]
        steps = list(pipe.stream(prompt, seed=seed, **CALL))
        seen = {
            "stream": [np.asarray(step.latents).tobytes() for step in steps],
            "sketch": [step.sketch().tobytes() for step in steps],
            "preview": [step.preview().tobytes() for step in steps],
        }
        whole = {"load": picture, "draw": picture, "cancel": [seen["stream"][0], *picture]}
        every.append(whole | {name: one + picture for name, one in seen.items()})
    return tuple(every)


# --------------------------------------------------------------------------------------- the work


def loading(place: tuple[Path, str, str], seed: int, found: Found) -> Work:
    pipe = load.__wrapped__(*place)
    yield
    found.append(pipe.generate(PROMPTS[seed], seed=seed, **CALL).images[0].tobytes())
    yield


def drawing(place: tuple[Path, str, str], seed: int, found: Found) -> Work:
    found.append(load(*place).generate(PROMPTS[seed], seed=seed, **CALL).images[0].tobytes())
    yield


def streaming(
    look: Callable[[Any], bytes], place: tuple[Path, str, str], seed: int, found: Found
) -> Work:
    run = load(*place).stream(PROMPTS[seed], seed=seed, **CALL)
    yield
    for _ in range(CALL["steps"]):
        step = next(run)
        yield
        found.append(look(step))
        yield
    found.append(run.result.images[0].tobytes())
    yield


def cancelling(place: tuple[Path, str, str], seed: int, found: Found) -> Work:
    run = load(*place).stream(PROMPTS[seed], seed=seed, **CALL)
    yield
    found.append(np.asarray(next(run).latents).tobytes())
    yield
    run.close()
    yield
    with pytest.raises(UsageError, match="stopped"):
        _ = run.result
    yield from drawing(place, seed, found)


WORK: dict[str, Callable[[tuple[Path, str, str], int, Found], Work]] = {
    "load": loading,
    "draw": drawing,
    "stream": functools.partial(streaming, lambda step: np.asarray(step.latents).tobytes()),
    "sketch": functools.partial(streaming, lambda step: step.sketch().tobytes()),
    "preview": functools.partial(streaming, lambda step: step.preview().tobytes()),
    "cancel": cancelling,
}

# ------------------------------------------------------------------------------------ the threads


def in_a_thread(work: Callable[[], object]) -> None:
    """Run a function in a thread of its own; raise what it raises."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def same(*every: Work) -> None:
    for work in every:
        list(work)


def another(*every: Work) -> None:
    for work in every:
        in_a_thread(lambda work=work: list(work))  # type: ignore[misc]


def changing(*every: Work) -> None:
    """Each piece in a new thread; the pieces of all work mixed."""
    left = list(every)
    while left:
        for work in tuple(left):
            done: list[bool] = []
            in_a_thread(lambda work=work, done=done: done.append(next(work, True) is True))  # type: ignore[misc]
            if done[0]:
                left.remove(work)


def concurrent(*every: Work) -> None:
    start, raised = threading.Barrier(len(every)), list[BaseException]()

    def call(work: Work) -> None:
        start.wait(30)
        try:
            list(work)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=call, args=(work,)) for work in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


THREADS = (same, another, changing, concurrent)


def check(what: str, threads: Callable[..., None], backend: str, dtype: str, folder: Path) -> None:
    place = folder, backend, dtype
    right = expected(*place)
    found: tuple[Found, ...] = ([], [])
    threads(*(WORK[what](place, seed, found[seed]) for seed in range(len(PROMPTS))))
    assert list(found) == [one[what] for one in right]


@pytest.mark.parametrize("threads", THREADS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("what", WORK)
def test_a_cell_in_the_usual_type(
    what: str, threads: Callable[..., None], backend: str, folder: Path
) -> None:
    """float32 on a CPU; float16 with MLX, where what is lazy belongs to a thread."""
    check(what, threads, backend, {"numpy": "float32", "mlx": "float16"}[backend], folder)


@pytest.mark.slow
@pytest.mark.parametrize("threads", THREADS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("what", WORK)
def test_a_cell_in_the_other_type(
    what: str, threads: Callable[..., None], backend: str, folder: Path
) -> None:
    """float32 with MLX; NumPy refuses float16."""
    if backend == "mlx":
        check(what, threads, backend, "float32", folder)
        return
    with pytest.raises(UsageError, match="computes in float32 only"):
        check(what, threads, backend, "float16", folder)
