"""A run belongs to what it began with: steps, pictures and results, one after another and at once.

pytest -m slow tests/test_runs.py      200 runs of two threads, 1,000 pictures in one process
"""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from golden_data import checkpoint, mask, photo
from PIL import Image

import mlxdiff
from mlxdiff.errors import UsageError
from mlxdiff.run import denoiser as denoiser_module
from mlxdiff.run.denoiser import Denoiser

QUICK: dict[str, Any] = {"steps": 2, "width": 32, "height": 32}
TAGGED, PLAIN = "a cat <lora:sd15-kohya:1>", "a dog"
SYNTAX = {"prompt_syntax": "a1111"}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA."""
    folder = tmp_path_factory.mktemp("loras")
    lora_files.write("sd15-kohya", folder)
    return folder


def load(backend: str, loras: Path, **options: Any) -> mlxdiff.Pipeline:
    return mlxdiff.load(checkpoint("sd15"), backend=backend, lora_folder=loras, **options)


def names(picture: Any) -> list[str]:
    """The LoRAs that a picture says it was drawn with."""
    return [one["name"] for one in picture.metadata.to_dict().get("loras") or ()]


# ------------------------------------------------------------------------------------ its own state


def test_two_suspended_runs_in_one_thread_are_both_right(backend: str, loras: Path) -> None:
    pipe = load(backend, loras)
    alone = [pipe.generate(p, seed=s, **SYNTAX, **QUICK) for p, s in ((TAGGED, 1), (PLAIN, 2))]
    runs = [pipe.stream(p, seed=s, **SYNTAX, **QUICK) for p, s in ((TAGGED, 1), (PLAIN, 2))]
    for steps in zip(*runs, strict=True):
        assert len(steps) == 2
    assert [run.result for run in runs] == alone
    assert [names(run.finished[0]) for run in runs] == [["sd15-kohya.safetensors"], []]


def test_what_changes_on_the_pipeline_changes_no_run(backend: str, loras: Path) -> None:
    pipe = load(backend, loras)
    before = pipe.generate(PLAIN, seed=1, **QUICK)
    run = pipe.stream(PLAIN, seed=1, count=2, **QUICK)
    next(run)
    pipe.set_loras([loras / "sd15-kohya.safetensors"])
    pipe.save_memory(True)
    assert run.result.images[0].tobytes() == before.images[0].tobytes()
    assert run.result.metadata[0] == before.metadata[0]
    after = pipe.generate(PLAIN, seed=1, **QUICK)
    assert after != before and "loras" in after.metadata[0].to_dict()


def test_decoding_and_drawing_inside_a_loop_over_steps(backend: str, loras: Path) -> None:
    for low_memory in (False, True):
        pipe = load(backend, loras, low_memory=low_memory)
        alone = pipe.generate(PLAIN, seed=1, **QUICK)
        run = pipe.stream(PLAIN, seed=1, **QUICK)
        for step in run:
            assert pipe.decode(step.latents[None])[0].tobytes() == step.preview().tobytes()
            step.sketch()
            pipe.generate("another", seed=3, **QUICK | {"steps": 1})
        assert run.result == alone


def test_a_run_ends_in_the_result_of_generate(loras: Path) -> None:
    pipe = load("numpy", loras)
    options = {
        **QUICK,
        "image": photo(32, 32),
        "mask": mask("hard", 32, 32),
        "paste_original": True,
    }
    expected = pipe.generate("a", seed=4, count=2, **options)
    run = pipe.stream("a", seed=4, count=2, **options)
    seen = [step.seed for step in run]
    assert seen == [4, 4, 5, 5]
    assert run.result == expected and run.result.timings.keys() == expected.timings.keys()
    assert pipe.stream("a", seed=4, count=2, **options).result == expected  # draws it all
    half = pipe.stream("a", seed=4, count=2, **options)
    next(half)
    assert half.result == expected  # draws the rest


def test_a_run_that_was_stopped_says_so_and_keeps_what_is_finished(loras: Path) -> None:
    run = load("numpy", loras).stream(PLAIN, seed=1, count=3, **QUICK)
    for step in run:
        if step.picture == 1:
            break
    run.close()
    assert [picture.seed for picture in run.finished] == [1]
    with pytest.raises(UsageError, match="no result: it was stopped"):
        _ = run.result
    taken = load("numpy", loras).stream(PLAIN, seed=1, **QUICK)
    assert [picture.seed for picture in taken.pictures()] == [1]
    with pytest.raises(UsageError, match="handed out"):
        _ = taken.result


def test_each_picture_is_handed_out_before_the_next_is_drawn(loras: Path) -> None:
    run = load("numpy", loras).stream(PLAIN, seed=1, count=2, **QUICK)
    order: list[str] = []
    for picture in run.pictures(lambda step: order.append(f"step {step.picture}")):
        order.append(f"picture {picture.index}")
    one = ["step 0", "step 0", "picture 0"]
    assert order == [*one, *(word.replace("0", "1") for word in one)]


def test_low_memory_draws_groups_and_the_same_pictures(
    loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxdiff.run.drawing.GROUP", 2)
    given = {"seed": 1, "count": 5, **QUICK}
    expected = load("numpy", loras).generate(PLAIN, **given)
    run = load("numpy", loras, low_memory=True).stream(PLAIN, **given)
    order: list[str] = []
    found = []
    for picture in run.pictures(lambda step: order.append("s")):
        order.append("p")
        found.append(picture)
    assert "".join(order) == "ssssppssssppssp"
    for picture, image in zip(found, expected.images, strict=True):
        assert picture.image.tobytes() == image.tobytes()


def test_pictures_that_are_drawn_are_rescued(loras: Path) -> None:
    """In low memory the latents wait for the end of their group."""

    def stop(step: Any) -> None:
        if step.picture == 2:
            raise KeyboardInterrupt

    expected = load("numpy", loras).generate(PLAIN, seed=1, count=2, **QUICK)
    run = load("numpy", loras, low_memory=True).stream(PLAIN, seed=1, count=4, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        next(run.pictures(stop))
    saved = run.rescue()
    assert [one.image.tobytes() for one in saved] == [one.tobytes() for one in expected.images]


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_leaves_no_reference_cycle(
    whole: bool, backend: str, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of the text leave memory with the run, not with the garbage collector."""
    made: list[weakref.ref[Any]] = []

    class Watched(Denoiser):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    monkeypatch.setattr(denoiser_module, "Denoiser", Watched)
    pipe = load(backend, loras, low_memory=True)
    run = pipe.stream(PLAIN, seed=1, **QUICK)
    gc.collect()
    gc.disable()
    try:
        if whole:
            _ = run.result
        else:
            next(run)
        del run
        assert made and all(ref() is None for ref in made)
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------ threads


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """Run functions at the same time; return what they return, or raise."""
    found: dict[int, Any] = {}

    def call(place: int) -> None:
        try:
            found[place] = work[place]()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(len(work))]


def thread_matrix(pipe: mlxdiff.Pipeline, runs: int) -> None:
    asked = [(TAGGED, 1, 4), (PLAIN, 2, 5), ("a tree <lora:sd15-kohya:0.5>", 3, 3)]
    call = {"width": 32, "height": 32, **SYNTAX}
    alone = [pipe.generate(p, seed=s, steps=n, **call) for p, s, n in asked]
    for i in range(runs):
        pairs = [(0, 1), (0, 2), (1, 2), (0, 1, 2)][i % 4]

        def work(place: int) -> Any:
            prompt, seed, steps = asked[place]
            return pipe.generate(prompt, seed=seed, steps=steps, **call)

        found = in_threads(*(lambda place=place: work(place) for place in pairs))  # type: ignore[misc]
        assert found == [alone[place] for place in pairs], f"run {i}"


def test_threads_with_loras_in_their_prompts(loras: Path) -> None:
    """Case 06 of the public reports."""
    thread_matrix(load("numpy", loras), 4)


@pytest.mark.slow
@pytest.mark.parametrize("low_memory", [False, True])
def test_two_hundred_runs_of_threads(backend: str, low_memory: bool, loras: Path) -> None:
    thread_matrix(load(backend, loras, low_memory=low_memory), 100)


def test_nothing_waits_for_a_suspended_run(loras: Path) -> None:
    pipe = load("numpy", loras)
    run = pipe.stream(PLAIN, seed=1, **QUICK)
    next(run)
    other = in_threads(lambda: pipe.generate(TAGGED, seed=1, **SYNTAX, **QUICK))
    assert isinstance(other[0], mlxdiff.Result)


def test_one_run_in_two_threads_is_refused(loras: Path) -> None:
    run = load("numpy", loras).stream(PLAIN, seed=1, **QUICK)
    inside, go_on = threading.Event(), threading.Event()
    decode = run._planned.model.prompt_timeline  # type: ignore[attr-defined]

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        go_on.wait(30)
        return decode(*args, **kwargs)

    run._planned.model.prompt_timeline = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: next(run))
    thread.start()
    inside.wait(30)
    with pytest.raises(UsageError, match="another thread"):
        next(run)
    go_on.set()
    thread.join()


def _draw_in_a_fork(queue: Any, pipe: mlxdiff.Pipeline) -> None:
    try:
        queue.put(pipe.generate(PLAIN, seed=1, **QUICK).images[0].tobytes())
    except Exception as error:
        queue.put(error)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_draws_or_is_refused(backend: str, loras: Path) -> None:
    """Case 16 of the public reports."""
    pipe = load(backend, loras)
    expected = pipe.generate(PLAIN, seed=1, **QUICK).images[0].tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_draw_in_a_fork, args=(queue, pipe))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    if backend == "numpy":
        assert found == expected
    else:
        assert isinstance(found, UsageError) and "spawn" in str(found)


@pytest.mark.slow
def test_a_thousand_pictures_take_no_more_memory(loras: Path) -> None:
    pipe = load("numpy", loras)
    sizes = []
    for i in range(500):
        given = {"seed": i, "steps": 1, "width": 32, "height": 32, **SYNTAX}
        prompt = f"number {i} <lora:sd15-kohya:0.{i % 3 + 1}>" if i % 5 == 0 else f"number {i}"
        for picture in pipe.stream(prompt, count=2, **given).pictures():
            picture.image.tobytes()
        sizes.append(resident())
    first, last = sum(sizes[100:150]) / 50, sum(sizes[-50:]) / 50
    print(f"1,000 pictures: {first / 1e6:.1f} MB after 200 to 300, {last / 1e6:.1f} MB at the end")
    assert last - first < 5e6


def resident() -> int:
    """Bytes of this process in memory."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("this system does not say how much memory a process takes")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ------------------------------------------------------------------------------------ for notebooks


def test_a_result_is_saved_with_its_settings(loras: Path, tmp_path: Path) -> None:
    pipe = load("numpy", loras)
    result = pipe.generate("a red cat", seed=3, count=2, **QUICK)
    with pytest.raises(UsageError, match="same name"):
        result.save(tmp_path / "x.png")
    paths = result.save(tmp_path / "{prompt}-{seed:04d}-{index}.png")
    assert [path.name for path in paths] == ["a-red-cat-0003-0.png", "a-red-cat-0004-1.png"]
    for i, path in enumerate(paths):
        with Image.open(path) as saved:
            assert saved.tobytes() == result.images[i].tobytes()
            assert saved.text == result.metadata[i].chunks()  # type: ignore[attr-defined]
        assert path.read_bytes() == result.png(i)
    with pytest.raises(UsageError, match="exists"):
        result.save(str(tmp_path / "{prompt}-{seed:04d}-{index}.png"))
    assert len(result.save(tmp_path / "{prompt}-{seed:04d}-{index}.png", overwrite=True)) == 2
    for bad in ("x.jpg", "{x}.png", 3, tmp_path / "no" / "{seed}.png"):
        with pytest.raises(UsageError):
            result.save(bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="2 pictures"):
        result.png(2)
    with Image.open(io.BytesIO(result._repr_png_())) as sheet:
        assert sheet.size == (64, 32)


def test_reprs_are_short_and_results_compare(loras: Path) -> None:
    pipe = load("numpy", loras)
    run = pipe.stream(PLAIN, seed=1, **QUICK)
    step = next(run)
    result = run.result
    said = [repr(one) for one in (pipe, run, step, result, run.finished[0])]
    assert all(len(text) < 120 for text in said), said
    assert "sd1" in said[0] and "numpy" in said[0]
    assert result == pipe.generate(PLAIN, seed=1, **QUICK)
    assert result != pipe.generate(PLAIN, seed=2, **QUICK) and result != "x"
    assert len({result, pipe.generate(PLAIN, seed=1, **QUICK)}) == 1
    assert step == next(pipe.stream(PLAIN, seed=1, **QUICK)) and hash(step)


# ------------------------------------------------------------------------------- Python's arguments


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("guidance", 9, "give guidance to generate"),
        ("guidance_scale", 9, "give guidance to generate"),
        ("scheduler", None, "give sampler and schedule"),
        ("low_memory", True, "give low_memory to mlxdiff.load"),
        ("loras", [], r"call set_loras\(\.\.\.\)"),
        ("anything", 1, "takes no anything"),
    ],
)
def test_an_unknown_attribute_of_a_pipeline(name: str, value: Any, says: str, loras: Path) -> None:
    pipe = load("numpy", loras)
    with pytest.raises(UsageError, match=says) as caught:
        setattr(pipe, name, value)
    assert isinstance(caught.value, AttributeError)


def test_names_of_other_libraries_are_answered(loras: Path) -> None:
    pipe = load("numpy", loras)
    with pytest.raises(AttributeError, match="set_loras"):
        pipe.load_lora_weights("x")
    assert not hasattr(pipe, "enable_model_cpu_offload")
    with pytest.raises(UsageError, match=r"not called itself; call generate\(\.\.\.\)"):
        pipe("a cat")
    with pytest.raises(UsageError, match=r"Pipeline has no from_pretrained; call mlxdiff\.load"):
        mlxdiff.Pipeline.from_pretrained("sd15")
    assert not hasattr(mlxdiff.Pipeline, "from_config")


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"seed": np.int64(3)}, {"seed": 3}),
        ({"seed": np.uint32(3)}, {"seed": 3}),
        ({"guidance": np.float32(3)}, {"guidance": 3.0}),
        ({"guidance": np.int8(3)}, {"guidance": 3.0}),
        ({"width": np.int32(40)}, {"width": 40}),
        ({"guidance_interval": np.array([0.0, 0.5])}, {"guidance_interval": (0.0, 0.5)}),
        ({"count": np.int16(1)}, {"count": 1}),
    ],
)
def test_numpy_numbers_are_numbers(
    given: dict[str, Any], plain: dict[str, Any], loras: Path
) -> None:
    """Case 12 of the public reports."""
    pipe = load("numpy", loras)
    base = {"seed": 1, **QUICK}
    found = pipe.generate("a", **base | given)
    assert found == pipe.generate("a", **base | plain)
    assert json.loads(found.metadata[0].to_json())


@pytest.mark.parametrize("name", ["seed", "steps", "guidance", "width", "strength", "count"])
@pytest.mark.parametrize("value", ["3", b"3", [3], np.bool_(True), True, {}])
def test_numbers_as_text_and_other_things_are_refused(name: str, value: Any, loras: Path) -> None:
    with pytest.raises(UsageError, match=f"{name} is .*expected a (whole )?number"):
        load("numpy", loras).generate("a", **{name: value})


@pytest.mark.parametrize("name", ["image", "mask", "control_image", "ip_image"])
@pytest.mark.parametrize(
    "value", [b"\x89PNG", bytearray(b"x"), io.BytesIO(b"x"), 5, "", {}, object(), np.float32(1)]
)
def test_what_is_no_picture_is_refused_alike(name: str, value: Any, loras: Path) -> None:
    with pytest.raises(UsageError, match=rf"{name} is .*PIL\.Image\.open"):
        load("numpy", loras).generate("a", **{name: value})


@pytest.mark.parametrize("name", ["loras", "embeddings"])
@pytest.mark.parametrize("value", ["x.safetensors", b"x", 5, Path("x")])
def test_one_path_is_no_list(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=f"{name} is .*expected a list"):
        mlxdiff.load(checkpoint("sd15"), backend="numpy", **given)
    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy")
    with pytest.raises(UsageError, match=f"{name} is .*expected a list"):
        getattr(pipe, f"set_{name}")(value)


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: mlxdiff.load(""),
        lambda pipe: mlxdiff.load(5),
        lambda pipe: pipe.set_vae(5),
        lambda pipe: pipe.set_controlnets(5),
        lambda pipe: pipe.set_controlnets([b"x"]),
        lambda pipe: pipe.set_ip_adapters([5]),
        lambda pipe: pipe.set_refiner(5),
        lambda pipe: pipe.limit_memory("4"),
        lambda pipe: pipe.generate(5),
        lambda pipe: pipe.generate("a", num_inference_steps=3),
    ],
)
def test_every_bad_argument_is_a_usage_error(call: Callable[[Any], Any], loras: Path) -> None:
    with pytest.raises(UsageError):
        call(load("numpy", loras))


def test_documented_submodules_after_one_import() -> None:
    import subprocess
    import sys

    code = (
        "import mlxdiff, sys; assert 'numpy' not in sys.modules\n"
        "mlxdiff.convert.convert, mlxdiff.pictures.preprocess.edges, mlxdiff.samplers.timesteps\n"
        "mlxdiff.noise.Generator, mlxdiff.tokenizer.Tokenizer, mlxdiff.store.hub.resolve\n"
        "mlxdiff.library.open_model, mlxdiff.run.memory.estimate, mlxdiff.networks.cost\n"
        "assert not hasattr(mlxdiff, 'nothing') and not hasattr(mlxdiff.run, 'nothing')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True).returncode == 0
