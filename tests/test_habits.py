"""What people bring along from other programs: a note or an error that helps, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden_data import checkpoint, photo
from golden_runs import Opened
from PIL import Image, PngImagePlugin

import mlxdiff
from mlxdiff.cli import main
from mlxdiff.errors import HubError, UsageError
from mlxdiff.pictures.metadata import read
from mlxdiff.run.options import FileOptions, LoadOptions, RunOptions
from mlxdiff.run.table import entries
from mlxdiff.run.values import Each, Files, Picture, Place

ADDRESS = "https://example.com/files/1?type=Model"
SIZE = {"width": 64, "height": 64}


def notes(caplog: pytest.LogCaptureFixture, pipe: Any, **options: Any) -> list[str]:
    caplog.clear()
    pipe.settings(**{"prompt": "a"} | options)
    return [record.getMessage() for record in caplog.records]


def run(*words: str, stdin: str | None = None) -> Any:
    given = ["generate", "--steps", "1", "-s", "0", "-W", "32", "-H", "32", "--backend", "numpy"]
    return CliRunner().invoke(main, [*given, *words], input=stdin)


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    ("prompt", "sign"),
    [
        ("a (red:1.3) car", "(word:1.2)"),
        ("a ((red)) car", "((word))"),
        ("a [red:blue:0.5] car", "[from:to:when]"),
        ("a [cat|dog]", "[a|b]"),
        ("a cat <lora:sketch:0.8>", "<lora:name:1>"),
        ("a cat <LYCO:sketch>", "<lora:name:1>"),
        ("a cat BREAK a dog", "BREAK"),
    ],
)
def test_a1111s_syntax_in_a_plain_prompt_is_told(
    prompt: str, sign: str, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = opened("sd15")
    for options in ({"prompt": prompt}, {"negative_prompt": prompt}):
        (note,) = notes(caplog, pipe, **options)
        assert sign in note and "prompt_syntax='a1111'" in note
    if "lora" not in sign:
        assert notes(caplog, pipe, prompt=prompt, prompt_syntax="a1111") == []


def test_several_signs_make_one_note(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    (note,) = notes(caplog, opened("sd15"), prompt="(a:1.2) [b|c] BREAK", negative_prompt="((d))")
    assert "(word:1.2) and ((word)) and [a|b] and BREAK" in note


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
@pytest.mark.parametrize("prompt", ["a {red|blue} car", "a __colour__ car"])
def test_wildcards_are_told(
    syntax: str, prompt: str, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    (note,) = notes(caplog, opened("sd15"), prompt=prompt, prompt_syntax=syntax)
    assert "write each prompt out" in note


@pytest.mark.parametrize(
    "prompt", ["a (small) cat", "f(x) [note] {b}", "16:9, 5:4", "break it", "a | b", "<3", "a_b"]
)
def test_plain_prompts_are_left_alone(
    prompt: str, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    assert notes(caplog, opened("sd15"), prompt=prompt) == []


@pytest.mark.parametrize("form", ["bom", "crlf", "cr", "line separator", "stdin"])
def test_prompt_files_of_other_systems(form: str, tmp_path: Path) -> None:
    """Case 07. Each is the same two prompts, byte for byte the same pictures."""
    first = "a\u2028b\x0bc" if form == "line separator" else "a red circle"
    plain = f"{first}\na blue square\n"
    text = {
        "bom": f"\ufeff{plain}",
        "crlf": plain.replace("\n", "\r\n"),
        "cr": plain.replace("\n", "\r"),
        "line separator": plain,
        "stdin": f"\ufeff{plain}",
    }[form]
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode())
    source = ["--prompt-file", "-"] if form == "stdin" else ["--prompt-file", str(path)]
    out = tmp_path / "out-{index}.png"
    done = run(*source, "-o", str(out), stdin=text if form == "stdin" else None)
    assert done.exit_code == 0, done.output
    drawn = sorted(tmp_path.glob("out-*.png"))
    assert len(drawn) == 2
    assert [read(one).prompt for one in drawn] == [first, "a blue square"]


# -------------------------------------------------------------------------------------- seed, size


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 2**64 - 1])
def test_a_seed_that_torch_does_not_take_is_refused_before_loading(
    seed: int, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="seed"):
        opened("sd15").stream("a", seed=seed, count=2)
    monkeypatch.setattr("mlxdiff.loading.load", None)
    error = run("a", "-s", str(seed), "-b", "2").stderr
    assert "2**64 - 1" in error and error.count("Error") == 1


def test_seed_minus_one_is_told(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    (note,) = notes(caplog, opened("sd15"), seed=-1)
    assert "seed -1 is one seed like any other" in note and "4294967295" in note
    assert notes(caplog, opened("sd15"), seed=-2) == []
    done = run("a", "-s", "-1", "-o", "-")
    assert done.output.count("seed -1 is one seed") <= 1


@pytest.mark.parametrize(
    ("width", "height", "says"),
    [
        (64, 64, None),
        (64, 96, None),
        (96, 96, None),
        (128, 64, None),
        (128, 128, "repeated subjects; hires"),
        (32, 32, "poor pictures"),
    ],
)
def test_a_size_far_from_the_models_own_is_told(
    width: int,
    height: int,
    says: str | None,
    opened: Opened,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = opened("sd15")
    assert pipe.model.default_size == (64, 64)
    found = notes(caplog, pipe, width=width, height=height)
    assert len(found) == (says is not None)
    if says is not None:
        assert says in found[0] and f"{width}x{height} is far from" in found[0]
        # A picture to start from brings its own composition.
        assert notes(caplog, pipe, width=width, height=height, image=photo(64, 64)) == []


def test_a_sampler_without_zero_snr_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(checkpoint("sd21v"), tmp_path / "model")
    place = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {"rescale_betas_zero_snr": True}))
    pipe = mlxdiff.load(tmp_path / "model", backend="numpy")
    (note,) = notes(caplog, pipe, sampler="heun")
    assert "sampler heun has no zero terminal SNR" in note and "euler" in note
    for sampler in ("auto", "euler", "ddim", "checkpoint"):
        assert notes(caplog, pipe, sampler=sampler) == []


# ----------------------------------------------------------------------------------------- samplers


def test_a_sampler_by_another_name_is_the_sampler(opened: Opened) -> None:
    pipe = opened("sd15")
    for name in ("DPM++ 2M Karras", "dpmpp_2m_karras"):
        settings = pipe.settings("a", sampler=name)
        assert (settings.sampler, settings.schedule) == ("dpmpp-2m", "karras")
    settings = pipe.settings("a", sampler="EulerAncestralDiscreteScheduler", schedule="SGM Uniform")
    assert (settings.sampler, settings.schedule) == ("euler-a", "sgm-uniform")
    with pytest.raises(UsageError, match="names the schedule karras; leave trailing out"):
        pipe.settings("a", sampler="DPM++ 2M Karras", schedule="trailing")
    refused = r"sampler is 'DPM adaptive'; expected one of auto.* planned before it starts: take"
    with pytest.raises(UsageError, match=refused):
        pipe.settings("a", sampler="DPM adaptive")


def test_a_sampler_by_another_name_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    done = run("a", "--sampler", "Euler a", "--schedule", "normal", "-o", str(out), "--json")
    assert done.exit_code == 0, done.output
    said = next(json.loads(line) for line in done.output.splitlines() if line.startswith("{"))
    assert (said["sampler"], said["schedule"]) == ("euler-a", "normal")


# ---------------------------------------------------------------------------------- web addresses


def _kind(entry: Any) -> Any:
    return getattr(entry.kind, "kind", entry.kind) if isinstance(entry.kind, Each) else entry.kind


FILES = {
    name: entry
    for table in (LoadOptions, FileOptions)
    for name, entry in entries(table).items()
    if isinstance(_kind(entry), (Picture, Place, Files))
}


@pytest.mark.parametrize("name", FILES)
def test_a_web_address_where_a_file_is_wanted(name: str, opened: Opened) -> None:
    table = entries(LoadOptions)
    many = isinstance(FILES[name].kind, (Each, Files))
    for address in (ADDRESS, "HTTP://EXAMPLE.COM/a.png"):
        value = [address] if many else address
        with pytest.raises(UsageError, match="download it first, and give its path") as caught:
            if name in table:
                mlxdiff.load(**{name: value})
            else:
                opened("sd15").settings("a", **{name: value})
        assert str(caught.value).startswith(f"{name} is {address!r}")


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora", ADDRESS],
        ["--embedding", ADDRESS],
        ["-i", ADDRESS],
        ["--prompt-file", ADDRESS],
        ["--from-image", ADDRESS],
        ["-m", ADDRESS],
        ["--lora", f"{ADDRESS}:0.8"],
    ],
)
def test_a_web_address_on_the_command_line(flags: list[str]) -> None:
    prompt = [] if "--prompt-file" in flags else ["a"]
    done = run(*prompt, *flags)
    assert done.exit_code == 2, done.output
    assert "download it first" in done.output.replace("\n", " "), done.output


@pytest.mark.parametrize("command", ["info", "convert"])
def test_a_web_address_of_a_model(command: str, tmp_path: Path) -> None:
    more = [str(tmp_path / "out")] if command == "convert" else []
    done = CliRunner().invoke(main, [command, ADDRESS, *more])
    assert done.exit_code == 2
    assert "only addresses of models on huggingface.co are fetched" in done.output


def test_the_address_of_a_hub_model_is_its_name() -> None:
    kind = entries(LoadOptions)["model"].kind
    address = "https://huggingface.co/org/name"
    assert kind.accept(address) == address
    assert set(entries(RunOptions)) >= {"image", "mask"}


# ----------------------------------------------------------------------------------- token, VAE


@pytest.mark.parametrize(
    ("variable", "says"), [("HF_TOKEN", "unset HF_TOKEN"), (None, "hf auth logout")]
)
def test_an_expired_token_is_named(
    variable: str | None, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Case 13."""
    from fake_hub import serve

    from mlxdiff.store.hub import resolve

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with serve({}, monkeypatch) as server:
        server.fault = "401 InvalidCredentials"
        if variable is not None:
            monkeypatch.setenv(variable, "made-up")
        else:
            monkeypatch.setattr("huggingface_hub.get_token", lambda: "made-up")
        with pytest.raises(HubError, match="refuses your access token") as caught:
            resolve("org/name")
    assert says in str(caught.value) and "made-up" not in str(caught.value)


def test_a_vae_of_another_family_is_refused(tmp_path: Path, opened: Opened) -> None:
    """SDXL's latents have another scale; the picture would be pale or glaring."""
    shutil.copytree(checkpoint("segmind-vega") / "vae", tmp_path / "vae")
    pipe = opened("bk-sdm-tiny")
    with pytest.raises(UsageError, match=r"another family.*0\.13025.*0\.18215"):
        pipe.set_vae(tmp_path / "vae")
    pipe.set_vae(checkpoint("taesd"))  # made for either
    pipe.set_vae(None)
    # Playground's latents have a mean of their own, SDXL's have none.
    with pytest.raises(UsageError, match="another family"):
        opened("playground").set_vae(tmp_path / "vae")
    opened("cosxl").set_vae(tmp_path / "vae")
    opened("cosxl").set_vae(None)
    assert np.isfinite(pipe.generate("a", steps=1, seed=0, **SIZE).latents).all()


# ------------------------------------------------------------- pictures that lost our own settings


def test_a_picture_with_a1111s_text_alone_is_drawn_again(tmp_path: Path) -> None:
    """What web sites keep: the syntax and the hires pass are in the text."""
    first, again = tmp_path / "1.png", tmp_path / "2.png"
    model = ("-m", str(checkpoint("sd15")))
    options = ("--steps", "2", "--prompt-syntax", "a1111", "--hires", "2", "-o", str(first))
    assert run("a (red:1.3) cat", *model, *options).exit_code == 0
    with Image.open(first) as picture:
        kept = PngImagePlugin.PngInfo()
        kept.add_text("parameters", picture.text["parameters"])  # type: ignore[attr-defined]
        picture.save(again, pnginfo=kept)
    replayed = CliRunner().invoke(
        main, ["generate", "--from-image", str(again), *model, "-o", str(tmp_path / "3.png")]
    )
    assert replayed.exit_code == 0, replayed.output
    with Image.open(first) as one, Image.open(tmp_path / "3.png") as other:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert "plain text in this prompt syntax" not in replayed.stderr
