"""`mlxdiff doctor --reference`: the facts, and the machinery on tiny models.

tests/golden/published holds cases of the same form as those of mlxdiff.report.published, drawn by
diffusers the way that its slow tests draw (make_published_goldens.py).
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import ADAPTERS, write_adapter, write_encoder
from click.testing import CliRunner, Result
from control_files import NETS, write_controlnet
from golden_data import GOLDEN, checkpoint, mask, photo
from PIL import Image

from mlxdiff.cli import main
from mlxdiff.errors import UsageError
from mlxdiff.report import published, reference
from mlxdiff.report.published import CASES, Case, File
from mlxdiff.store import catalogue, hub

FOLDER = GOLDEN / "published"
TINY: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())["cases"]


@lru_cache
def pictures() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "pictures.npz") as file:
        return {name: file[name] for name in file.files}


def tiny(name: str, folder: Path) -> Case:
    """A case of a tiny model; its files are written into the folder.

    The tolerance is the strictest of the published tests, 1e-4; as a cosine, whose distance is half
    the square of a relative difference, 1e-4 squared and halved.
    """
    tolerance = 0.5e-8 if TINY[name].get("measure") == "cosine" else 1e-4
    one = dict(TINY[name])
    files = {}
    for argument, (kind, height, width, *size) in one.get("files", {}).items():
        made = photo(height, width) if kind == "photo" else mask(kind, height, width)
        file = File(f"https://example.org/{name}-{argument}.png", tuple(size) or None)
        Image.fromarray(made).save(folder / file.name)
        files[argument] = file
    expected: Any = one.get("expected")
    if expected is None:
        expected = File(f"https://example.org/{name}.npy")
        np.save(folder / expected.name, pictures()[name])
    controlnets = []
    for net in one.get("controlnets", ()):
        seed, changes = NETS[net]
        controlnets.append(str(write_controlnet(folder / net, one["model"], seed, **changes)))
    adapter = None
    for kind in one.get("ip_adapters", ()):
        path = folder / "adapters" / f"{kind}.safetensors"
        adapter = str(
            write_adapter(path, ADAPTERS[kind][0], checkpoint(one["model"]), ADAPTERS[kind][1])
        )
        write_encoder(folder / "adapters" / "image_encoder")
    return Case(
        name,
        "tests/golden/make_published_goldens.py",
        one["model"],
        expected if isinstance(expected, File) else tuple(expected),
        tolerance,
        one["arguments"],
        measure=one.get("measure", "largest"),
        dtype=one.get("dtype", "float32"),
        noise=one.get("noise"),
        rows=tuple(one.get("rows", published.END)),
        columns=tuple(one.get("columns", published.END)),
        after=one.get("after"),
        scheduler=one.get("scheduler", {}),
        files=files,
        controlnets=tuple(controlnets),
        ip_adapter=adapter,
    )


def drawn(case: Case, folder: Path, backend: str = "numpy") -> dict[str, Any]:
    """The record of one case."""
    place = f"{case.model}={checkpoint(case.model)}"
    record = reference.reference(place, files=folder, backend=backend, cases=[case])
    return dict(record["cases"][0])


# ------------------------------------------------------------------------------------------- facts


def test_the_table_is_sound() -> None:
    assert len(CASES) >= 15 and len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert re.fullmatch(r"[\w/]+\.py::\w+::test_\w+", case.test), case.name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", case.model), case.name
        assert case.measure in ("largest", "cosine") and case.dtype in ("float32", "float16")
        assert 0 < case.tolerance <= 0.1 and "steps" in case.arguments
        assert "seed" in case.arguments and "guidance" in case.arguments
        if not isinstance(case.expected, File):
            assert len(case.expected) == 9
            assert case.after is not None or all(0 <= value <= 1 for value in case.expected)
        if case.noise is not None:
            assert {"width", "height"} <= set(case.arguments)
        for file in case.needed:
            assert file.url.startswith("https://") and "." in file.name


def test_what_the_table_covers() -> None:
    kinds = {"sd14", "sd15", "sd21", "sd21-base", "sdxl", "sdxl-turbo", "lcm", "sd15-inpainting"}
    kinds |= {"x4-upscaler", "instruct-pix2pix"}
    known = {k.name: k.repo for k in catalogue.KNOWN}
    assert {known[kind] for kind in kinds} <= {reference.canonical(case.model) for case in CASES}
    assert sum(not case.needed for case in CASES) >= 15  # weights are all that these need
    assert sum(bool(case.controlnets) for case in CASES) >= 3


def test_arguments_are_options_of_a_run(tmp_path: Path) -> None:
    """Every word of every case is one that generate takes."""
    words = {"image", "mask", "control_image", "ip_image"}
    words |= {name for case in CASES for name in case.arguments}
    text = CliRunner().invoke(main, ["generate", "--help"]).output
    for word in words:
        assert f"--{word.replace('_', '-')}" in text, word


# --------------------------------------------------------------------------------------- machinery


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_tiny_model_reproduces(name: str, tmp_path: Path) -> None:
    found = drawn(tiny(name, tmp_path), tmp_path)
    assert found["state"] == "ok", found


@pytest.mark.mlx
@pytest.mark.parametrize("name", ["pndm", "latents-2", "img2img", "guess", "turbo", "shown"])
def test_on_mlx(name: str, tmp_path: Path) -> None:
    found = drawn(tiny(name, tmp_path), tmp_path, "mlx")
    assert found["state"] == "ok", found


def test_a_wrong_expectation_is_a_miss(tmp_path: Path) -> None:
    case = tiny("pndm", tmp_path)
    assert isinstance(case.expected, tuple)
    wrong = Case(**{**vars(case), "expected": (case.expected[0] + 0.002, *case.expected[1:])})
    found = drawn(wrong, tmp_path)
    assert found["state"] == "miss" and abs(found["difference"] - 0.002) < 2e-4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pndm", {"noise": 1}),
        ("dpm", {"scheduler": {}}),
        ("velocity-unflawed", {"scheduler": {}}),
        ("latents-1", {"after": 2}),
        ("img2img-resized", {"rows": (26, 29)}),
        ("euler-start", {"noise": None}),
        ("upscale", {"arguments": TINY["upscale"]["arguments"] | {"noise_level": 21}}),
    ],
)
def test_what_a_case_says_counts(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    case = tiny(name, tmp_path)
    assert drawn(Case(**{**vars(case), **change}), tmp_path)["state"] == "miss"


def test_a_changed_scheduler_is_put_back(tmp_path: Path) -> None:
    config = {"a": 1, "b": 2}
    with reference._changed(config, {"a": 3, "c": 4}):
        assert config == {"a": 3, "b": 2, "c": 4}
    assert config == {"a": 1, "b": 2}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    case = tiny("img2img", tmp_path)
    (tmp_path / "img2img-image.png").unlink()
    found = drawn(case, tmp_path)
    assert found["state"] == "skipped"
    assert (
        "needs img2img-image.png in the folder of --files (https://example.org/" in found["reason"]
    )
    whole = tiny("whole", tmp_path)
    (tmp_path / "whole.npy").write_bytes(b"no array")
    assert "is no array of NumPy" in drawn(whole, tmp_path)["reason"]
    np.save(tmp_path / "whole.npy", np.zeros((8, 8, 3)))
    assert "another file?" in drawn(whole, tmp_path)["reason"]


def test_nothing_is_fetched_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("MLXDIFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", refuse)
    record = reference.reference("lcm", backend="numpy")
    assert {case["state"] for case in record["cases"]} == {"skipped"}
    reasons = {case["reason"] for case in record["cases"]}
    assert reasons == {"SimianLuo/LCM_Dreamshaper_v7 is not here; --download fetches it"}
    assert not hub.is_offline()


def test_names() -> None:
    assert reference.canonical("sd14") == "CompVis/stable-diffusion-v1-4"
    assert reference.canonical("sd21") == reference.canonical("stabilityai/stable-diffusion-2-1")
    assert reference.canonical("botp/stable-diffusion-v1-5-inpainting") == reference.canonical(
        "sd15-inpainting"
    )
    with pytest.raises(UsageError, match=r"no numbers for it that are known here.*sd14"):
        reference.reference("org/unheard-of")
    with pytest.raises(UsageError, match=r"say so: --reference NAME="):
        reference.reference(str(checkpoint("sd15")))
    with pytest.raises(UsageError, match="no such folder"):
        reference.reference("sd14", files="/nowhere")


def test_a_reason_names_no_person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    case = tiny("pndm", tmp_path)
    place = f"sd15={tmp_path / 'models' / 'sd15'}"
    record = reference.reference(place, backend="numpy", cases=[case])
    assert "~/models/sd15" in record["cases"][0]["reason"]
    assert str(tmp_path) not in json.dumps(record)


def test_measures() -> None:
    x, y = np.array([3.0, 4.0]), np.array([6.0, 8.0])
    assert reference.compare(x, y, "largest") == 4.0
    assert abs(reference.compare(x, y, "cosine")) < 1e-15
    assert abs(reference.compare(x, np.array([-4.0, 3.0]), "cosine") - 1) < 1e-15


# ------------------------------------------------------------------------------------ command line


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Two cases of a tiny model in place of the published ones; what to ask for."""
    cases = [tiny("pndm", tmp_path), tiny("img2img", tmp_path)]
    monkeypatch.setattr(reference.reference, "__kwdefaults__", {
        **(reference.reference.__kwdefaults__ or {}), "cases": cases})  # fmt: skip
    return f"sd15={checkpoint('sd15')}"


def test_ours_beside_theirs(small: str, tmp_path: Path) -> None:
    done = run("--reference", small, "--backend", "numpy", "--files", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "theirs" in done.output and "ours" in done.output and done.output.count("ok ") == 2
    as_json = run("--reference", small, "--backend", "numpy", "--json")
    assert as_json.exit_code == 0 and as_json.stdout.count("\n") == 1
    record = json.loads(as_json.stdout)
    assert [case["state"] for case in record["cases"]] == ["ok", "skipped"]
    assert record["schema"] == reference.SCHEMA and str(tmp_path) not in as_json.stdout


def test_exit_codes(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "compare", lambda *a: 1.0)
    assert run("--reference", small, "--backend", "numpy", "--quiet").exit_code == 1
    nothing = run("--reference", f"sd15={GOLDEN / 'missing'}", "--backend", "numpy")
    assert nothing.exit_code == 2 and "no case could be drawn" in nothing.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--files", "x"], "--files belongs to --reference"),
        (["--exact"], "--exact belongs to --self-test or --reference"),
        (["--self-test", "--backend", "numpy"], "--backend belongs to --reference"),
        (["--self-test", "--reference", "sd14"], "give one of them"),
        (["--reference", "sd14", "--online"], "--online belongs to the plain doctor"),
    ],
)
def test_options_that_do_not_belong(options: list[str], words: str) -> None:
    done = run(*options)
    assert done.exit_code == 2 and words in done.output
