"""What a picture says of itself, through our own reader and through A1111's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from mlxdiff.errors import UsageError
from mlxdiff.pictures import foreign
from mlxdiff.pictures.foreign.record import Texts
from mlxdiff.pictures.image import save_png
from mlxdiff.pictures.metadata import (
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
    SCHEMA,
    Metadata,
    read,
)

# The pattern by which A1111 reads its line of parameters.
A1111 = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
PICTURE = np.zeros((2, 2, 3), np.uint8)
FULL = Metadata(
    prompt="a red circle",
    negative_prompt="blurry, dark",
    seed=42,
    width=512,
    height=768,
    steps=20,
    guidance=7.5,
    guidance_rescale=0.0,
    sampler="dpmpp-2m",
    schedule="karras",
    clip_skip=1,
    model="org/name",
    revision="0" * 40,
    dtype="float32",
    backend="mlx",
    version="0.1.0",
    extra={"strength": 0.6, "loras": [{"name": "x", "scale": 1}]},
)
HOSTILE = [
    'say "hi", then\nSteps: 3, x: y',
    "Steps: 3, Sampler: Euler a, CFG scale: 7",
    "a\\b \\n \\\" ', : ; {json: [1, 2]}",
    "Negative prompt: not really",
    "\n\nblank lines\n\n",
    " spaces ",
    "漢字 😀 e\u0301 \u2028 \u0085",
    "tab\tand\rreturn",
    "",
]


def a1111_unquotes(text: str) -> str:
    """Its `unquote`: what is no JSON stays as it is."""
    if not text or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def a1111_reads(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and parameters as A1111's reader finds them."""
    *lines, last = text.strip().split("\n")
    if len(A1111.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompt, negative, done = "", "", False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            done, line = True, line[16:].strip()
        if done:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    pairs = {}
    for key, value in A1111.findall(last):
        pairs[key] = a1111_unquotes(value)
    return prompt, negative, pairs


def test_a_prompt_with_colons_or_braces_is_a_prompt() -> None:
    for text in ("a portrait, style: oil, lens: 50mm, time: dusk", "{red|blue} car", "{}car"):
        assert Metadata.from_parameters(text).prompt == text
    assert not foreign.unknown_keys(Texts(parameters="{red|blue} car"))


def test_the_parameters_text() -> None:
    assert FULL.to_parameters() == (
        "a red circle <lora:x:1>\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, "
        "Size: 512x768, Denoising strength: 0.6, Model: org/name, RNG: CPU, Clip skip: 2, "
        f'Revision: {"0" * 40}, Added loras: ["x"], Prompt syntax: plain, Version: mlxdiff 0.1.0'
    )
    plain = Metadata(prompt="p", steps=4, sampler="euler-a", guidance=7.0, seed=0, version="0.1.0")
    for negative, said in ((None, ""), ("", "Empty negative prompt: true, ")):
        assert Metadata(**{**vars(plain), "negative_prompt": negative}).to_parameters() == (
            "p\nSteps: 4, Sampler: Euler a, CFG scale: 7, Seed: 0, RNG: CPU, "
            f"{said}Prompt syntax: plain, Version: mlxdiff 0.1.0"
        )


@pytest.mark.parametrize("negative", [None, *HOSTILE])
@pytest.mark.parametrize("prompt", HOSTILE)
def test_hostile_prompts_survive(prompt: str, negative: str | None, tmp_path: Path) -> None:
    """Exactly in our JSON; and in A1111's reader the parameters stay what they are."""
    written = Metadata(**{**vars(FULL), "prompt": prompt, "negative_prompt": negative})
    path = tmp_path / "a.png"
    save_png(PICTURE, path, written.chunks())
    assert read(path) == written
    with Image.open(path) as picture:
        assert isinstance(picture, PngImagePlugin.PngImageFile)
        text = picture.text["parameters"]
    _, _, pairs = a1111_reads(text)
    assert pairs.pop("Empty negative prompt", None) == ("true" if negative == "" else None)
    assert pairs == {
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "42",
        "Size": "512x768",
        "Denoising strength": "0.6",
        "Model": "org/name",
        "RNG": "CPU",
        "Clip skip": "2",
        "Revision": "0" * 40,
        "Added loras": '["x"]',
        "Prompt syntax": "plain",
        "Version": "mlxdiff 0.1.0",
    }


TEXT = st.text(st.characters(codec="utf-8"))


@settings(deadline=None)
@example("p", None, ",\0")
@given(TEXT, st.none() | TEXT, TEXT.filter(lambda s: s.strip()))
def test_our_reading_of_a1111_is_a1111s(prompt: str, negative: str | None, model: str) -> None:
    # Without a LoRA: its tag stands in A1111's prompt, and our reader takes it out again.
    texts = {"prompt": prompt, "negative_prompt": negative, "extra": {"strength": 0.6}}
    written = Metadata(**{**vars(FULL), **texts})
    object.__setattr__(written, "model", model)  # any value, to try the quoting
    text = written.to_parameters()
    theirs_prompt, theirs_negative, pairs = a1111_reads(text)
    ours = Metadata.from_parameters(text)
    assert (ours.prompt, ours.negative_prompt or "") == (theirs_prompt, theirs_negative)
    assert (ours.seed, ours.steps, ours.guidance) == (42, 20, 7.5)
    assert (ours.sampler, ours.schedule, ours.clip_skip) == ("dpmpp-2m", "karras", 1)
    assert pairs["Seed"] == "42" and pairs["Clip skip"] == "2"
    if re.search("[,:\n]", model):
        assert pairs["Model"] == model


@settings(deadline=None)
@given(st.text(), st.none() | st.text(), st.none() | st.integers(), st.none() | st.floats(0, 99))
def test_json_round_trip(
    prompt: str, negative: str | None, seed: int | None, scale: float | None
) -> None:
    written = Metadata(prompt=prompt, negative_prompt=negative, seed=seed, guidance=scale)
    assert written.to_json().isascii()
    assert Metadata.from_json(written.to_json()) == written
    assert json.loads(written.to_json()) == written.to_dict()


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read(text: str) -> None:
    assert isinstance(Metadata.from_parameters(text), Metadata)


def test_sampler_and_schedule_names_go_both_ways() -> None:
    for sampler, schedule in [
        *((s, "karras") for s in SAMPLER_NAMES),
        *(("euler", s) for s in SCHEDULE_NAMES),
    ]:
        written = Metadata(
            prompt="p", steps=1, seed=1, sampler=sampler, schedule=schedule, version="1"
        )
        found = Metadata.from_parameters(written.to_parameters())
        assert (found.sampler, found.schedule) == (sampler, schedule)


def test_a_file_of_a1111(tmp_path: Path) -> None:
    text = (
        "masterpiece, (a cat:1.2),\nsitting <lora:x:0.7>\n"
        "Negative prompt: bad hands,\nworst quality\n"
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 5.5, "
        "Seed: 965400086, Size: 832x1216, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, "
        "VAE: vae.ckpt, Clip skip: 2, Denoising strength: 0.4, RNG: NV, "
        'Lora hashes: "x: 0123456789, y: abc", Version: v1.10.1'
    )
    found = Metadata.from_parameters(text)
    assert found == Metadata(
        prompt="masterpiece, (a cat:1.2),\nsitting <lora:x:0.7>",
        negative_prompt="bad hands,\nworst quality",
        seed=965400086,
        width=832,
        height=1216,
        steps=28,
        guidance=5.5,
        sampler="dpmpp-2m",
        schedule="sgm-uniform",
        clip_skip=1,
        model="v1-5-pruned-emaonly",
        extra={
            "tool": "AUTOMATIC1111 v1.10.1",
            "prompt_syntax": "a1111",
            "image": "(not named)",
            "strength": 0.4,
            "vae": "vae.ckpt",
            "rng": "gpu",
            "seed_order": "a1111",
            "parameters": {
                "Model hash": "6ce0161689",
                "Lora hashes": "x: 0123456789, y: abc",
            },
        },
    )
    # The same from a PNG, and from the EXIF comment that A1111 writes into a JPEG or WebP.
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.fromarray(PICTURE).save(tmp_path / "a.png", pnginfo=info)
    files = [tmp_path / "a.png"]
    for suffix in ("jpg", "webp"):
        for code, encoding in (
            ("UNICODE", "utf-16-be"),
            ("UNICODE", "utf-16-le"),
            ("ASCII", "ascii"),
        ):
            exif = Image.Exif()
            exif.get_ifd(0x8769)[0x9286] = code.encode().ljust(8, b"\0") + text.encode(encoding)
            files.append(tmp_path / f"{encoding}.{suffix}")
            Image.fromarray(PICTURE).save(files[-1], exif=exif)
    for file in files:
        assert read(file) == found, file


@pytest.mark.parametrize(
    ("line", "sampler", "schedule"),
    [
        ("Sampler: DPM++ 2M Karras", "dpmpp-2m", "karras"),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp-2m-sde", "exponential"),
        ("Sampler: Euler a", "euler-a", "linspace"),  # of before 1.9: even steps
        ("Sampler: DPM++ 2M", "dpmpp-2m", "linspace"),
        ("Sampler: DPM++ 2M, Version: v1.10.1", "dpmpp-2m", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp-2m", "karras"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "dpmpp-2m-sde", "exponential"),
        ("Sampler: DPM++ 2M, Schedule type: Uniform, Version: v1.10.1", "dpmpp-2m", "linspace"),
        ("Sampler: DDIM", "ddim", "leading"),
        ("Sampler: DPM adaptive, Schedule type: Turbo", "DPM adaptive", "Turbo"),
        ("Size: 1x1", None, None),
    ],
)
def test_samplers_of_other_programs(line: str, sampler: str | None, schedule: str | None) -> None:
    found = Metadata.from_parameters(f"p\nSteps: 2, Seed: 3, CFG scale: 1, {line}")
    assert (found.sampler, found.schedule) == (sampler, schedule)


def test_values_that_are_none_stay_as_text() -> None:
    for size, scale in (("big", "x"), ("1" * 5000 + "x1", "inf"), ("1x1.5", "nan")):
        text = f"p\nSteps: many, Seed: 3, Size: {size}, CFG scale: {scale}"
        found = Metadata.from_parameters(text)
        assert (found.steps, found.seed, found.width, found.guidance) == (None, 3, None, None)
        named = found.extra["parameters"]
        assert named.pop("Size").rstrip(".") == size[: 197 if len(size) > 200 else None]
        assert named == {"Steps": "many", "CFG scale": scale}


def test_less_than_three_pairs_are_prompt() -> None:
    assert Metadata.from_parameters("a: b, c: d").prompt == "a: b, c: d"


# Names, not places


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("org/name", "org/name"),
        ("/home/someone/models/sd15", "sd15"),
        ("/home/someone/models/sd15/", "sd15"),
        ("~/models/x.safetensors", "x.safetensors"),
        ("../x", "x"),
        ("./sd, 15: v2", "sd, 15: v2"),
        ("a/b/c", "c"),
        (r"C:\Users\someone\sd15", "sd15"),
        ("sd15", "sd15"),
    ],
)
def test_no_path_is_told(model: str, shown: str) -> None:
    written = Metadata(prompt="p", model=model)
    assert written.model == shown
    assert "someone" not in written.to_json() + written.to_parameters()


def test_a_checkpoint_is_named_as_a1111_does() -> None:
    assert "Model: v1-5, " in Metadata(model="v1-5.safetensors", version="1").to_parameters()
    assert 'Model: "a, b: c"' in Metadata(model="a, b: c").to_parameters()


# Other and damaged files


def test_unknown_keys_are_kept_and_told_again() -> None:
    text = json.dumps({"schema": SCHEMA, "prompt": "p", "strength": 0.5, "new": {"a": [1]}})
    found = Metadata.from_json(text)
    assert found.extra == {"strength": 0.5, "new": {"a": [1]}}
    assert json.loads(found.to_json())["new"] == {"a": [1]}


def test_extra_does_not_hide_a_field() -> None:
    with pytest.raises(ValueError, match="must not repeat a field: schema, seed"):
        Metadata(extra={"seed": 1, "schema": 2})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"schema": "mlxdiff.image/1", "x": NaN}', "is not JSON .NaN is not"),
        ({"schema": "mlxdiff.image/2"}, "has schema 'mlxdiff.image/2', this version reads"),
        ({}, "has schema None"),
        ({"schema": SCHEMA, "seed": "1; rm"}, "seed in its mlxdiff metadata is '1; rm', expected"),
        ({"schema": SCHEMA, "steps": True}, "steps .* is True, expected an integer"),
        ({"schema": SCHEMA, "guidance": "x"}, "guidance .* expected a number"),
        ({"schema": SCHEMA, "prompt": None}, "prompt .* expected a text"),
        ({"schema": SCHEMA, "model": ["a"]}, "model .* expected a text"),
    ],
)
def test_a_chunk_that_is_not_ours(value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(PICTURE, path, {"mlxdiff": value if isinstance(value, str) else json.dumps(value)})
    with pytest.raises(UsageError, match=message) as error:
        read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_picture_that_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for text in ({}, {"parameters": " "}, {"prompt": "{}", "workflow": "{}"}):
        save_png(PICTURE, path, text, overwrite=True)
        with pytest.raises(UsageError, match="says nothing about how it was made"):
            read(path)
    with pytest.raises(UsageError, match="no such picture file"):
        read(tmp_path / "none.png")
