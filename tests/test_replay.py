"""Pictures of other programs: what is read, what is honoured, what is named (docs/replay.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import (
    EASY,
    MFLUX,
    NOVELAI,
    SAMPLES,
    SWARM,
    a1111,
    api_graph,
    comment,
    png,
    stealth,
    with_exif,
    workflow,
)
from PIL import Image, PngImagePlugin

from mlxdiff.errors import UsageError
from mlxdiff.pictures.image import save_png
from mlxdiff.pictures.metadata import Metadata, exif, read

_TOOLS = {"a1111": "automatic1111", "sd.cpp": "stable-diffusion.cpp"}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_picture_of_another_program(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    found = read(sample.write(tmp_path)).to_dict()
    for key, value in sample.says.items():
        assert found.get(key) == value, key
    named = found.get("parameters") or {}
    assert sample.named <= set(named)
    assert all(isinstance(value, str) for value in named.values())
    program = name.partition(",")[0].rstrip(" 0123456789.")
    assert found["tool"].lower().startswith(_TOOLS.get(program, program))


_BASE = (
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x768, "
    "{}Version: v1.10.1"
)


@pytest.mark.parametrize(
    ("prompt", "more", "says", "named"),
    [
        ("a cat", 'Denoising strength: 0.5, Hires upscale: 2, Hires prompt: "a dog, red", Hires '
         "upscaler: Latent, Hires sampler: Euler a, Hires CFG Scale: 7, ",
         {"hires": 2.0, "hires_strength": 0.5}, {"Hires prompt", "Hires sampler"}),
        ("a cat", 'ADetailer model: face.pt, ADetailer prompt: "a face, (nice:1.2)", ADetailer '
         "model 2nd: hand.pt, ", {},
         {"ADetailer model", "ADetailer prompt", "ADetailer model 2nd"}),
        ("a cat", 'ControlNet 0: "Module: canny, Model: c [d14], Weight: 1, Threshold A: 100", ',
         {"seed": 42, "model": None}, {"ControlNet 0"}),
        ("two cats BREAK a red cat", 'RP Active: True, RP Ratios: "1,1", ', {},
         {"RP Active", "RP Ratios"}),
        ("a cat", "Refiner: sd_xl_refiner [744], Refiner switch at: 0.8, ", {},
         {"Refiner", "Refiner switch at"}),
        ("a cat, bad", 'TI hashes: "bad: c74b, bad: c74b", ', {}, {"TI hashes"}),
        ("a cat", "Style Selector Enabled: True, Style Selector Style: base, ", {},
         {"Style Selector Enabled", "Style Selector Style"}),
        ("a red cat", 'Wildcard prompt: "a __color__ cat, x", ', {}, {"Wildcard prompt"}),
        ("a cat <lora:one:0.8> <lora:two:0.5:0.3>", 'Lora hashes: "one: aa, two: bb", ', {}, set()),
        ("a cat <lora:one:0.8>", 'Lora hashes: "one: aa, three: cc", ', {}, {"Lora hashes"}),
        ("a cat", "Denoising strength: 0.75, Mask blur: 4, Soft inpainting enabled: True, ",
         {"mask": "(not named)", "strength": 0.75}, {"Mask blur", "Soft inpainting enabled"}),
        ("a cat", "Dynamic thresholding enabled: True, Mimic scale: 7, ", {},
         {"Dynamic thresholding enabled", "Mimic scale"}),
        ("a cat", "freeu_enabled: True, freeu_b1: 1.01, pag_scale: 3, ", {},
         {"freeu_enabled", "freeu_b1", "pag_scale"}),
        ("a cat", "Denoising strength: 0.4, Noise multiplier: 0.9, Extra noise: 0.05, ",
         {"image": "(not named)"}, {"Noise multiplier", "Extra noise"}),
        ("a cat", 'Script: X/Y/Z plot, X Type: Steps, X Values: "10,20", ', {"steps": 20},
         {"Script", "X Type", "X Values"}),
        ("a cat", "Face restoration: CodeFormer, Token merging ratio: 0.5, ", {},
         {"Face restoration", "Token merging ratio"}),
        ("[cat:dog:0.5] [a|b] AND a (dog:1.2) :0.7", "", {}, set()),
        ("a cat", "VAE: None, VAE Decoder: TAESD, ", {"vae": None}, {"VAE Decoder"}),
    ],
)  # fmt: skip
def test_what_people_use_in_a1111(
    prompt: str, more: str, says: dict[str, Any], named: set[str], tmp_path: Path
) -> None:
    text = f"{prompt}\nNegative prompt: blurry\n{_BASE.format(more)}"
    found = read(png(tmp_path / "p.png", {"parameters": text})).to_dict()
    expected = {"prompt": prompt, "negative_prompt": "blurry", "sampler": "dpmpp-2m"} | says
    assert {key: found.get(key) for key in expected} == expected
    assert set(found.get("parameters") or {}) == named


def test_eta_is_that_of_ddim(tmp_path: Path) -> None:
    line = "Steps: 20, Sampler: DDIM, CFG scale: 7, Seed: 42, Eta DDIM: 0.3, Version: v1.10.1"
    found = read(png(tmp_path / "p.png", {"parameters": f"a\n{line}"})).to_dict()
    assert (found["sampler"], found["eta"], found.get("parameters")) == ("ddim", 0.3, None)


def test_a_comment_beside_the_inner_part_of_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x9286] = json.dumps({"prompt": api_graph()})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "p.webp", exif=exif)
    assert read(tmp_path / "p.webp").seed == 42


def test_utf_8_in_a_chunk_that_is_latin_1(tmp_path: Path) -> None:
    text = a1111("Steps: 20, Seed: 42, CFG scale: 7", "漢字")["parameters"]
    latin = PngImagePlugin.PngInfo()
    latin.add(b"tEXt", b"parameters\0" + text.encode())
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "p.png", pnginfo=latin)
    assert read(tmp_path / "p.png").prompt == "漢字"


@pytest.mark.parametrize("kind", ["TextGenerate", "SDPromptReader", "StringConcatenate"])
def test_a_prompt_in_a_node_that_is_not_read(kind: str, tmp_path: Path) -> None:
    graph = api_graph()
    graph["6"]["inputs"]["text"] = ["50", 0]
    graph["50"] = {
        "class_type": kind,
        "inputs": {"prompt": "photo.png", "string_a": ["51", 0], "clip": ["10", 1]},
    }
    found = read(png(tmp_path / "p.png", {"prompt": json.dumps(graph)}))
    assert found.prompt == "" and kind in found.extra["unread_prompt"]


def test_values_in_long_rows_of_nodes_end(tmp_path: Path) -> None:
    graph = api_graph()
    graph["6"]["inputs"]["text"] = ["c0", 0]
    for i in range(1000):
        both = {"string_a": [f"c{i + 1}", 0], "string_b": [f"c{i + 1}", 0], "delimiter": ""}
        graph[f"c{i}"] = {"class_type": "StringConcatenate", "inputs": both}
    found = read(png(tmp_path / "p.png", {"prompt": json.dumps(graph)}))
    assert "unread_prompt" in found.extra


def _documents() -> dict[str, Any]:
    """JSON of each program, as chunks of a function of one more key."""
    return {
        "swarmui": lambda more: {"parameters": json.dumps({"sui_image_params": SWARM | more})},
        "easy diffusion": lambda more: {"parameters": json.dumps(EASY | more)},
        "mflux": lambda more: {"parameters": json.dumps(MFLUX | more)},
        "novelai": lambda more: {"Software": "NovelAI", "Comment": json.dumps(NOVELAI | more)},
        "fooocus": lambda more: {
            "parameters": json.dumps(json.loads(SAMPLES["fooocus"].texts["parameters"]) | more)
        },
        "invokeai": lambda more: {
            "invokeai_metadata": json.dumps(
                json.loads(SAMPLES["invokeai 4"].texts["invokeai_metadata"]) | more
            )
        },
    }


@pytest.mark.parametrize("name", _documents())
def test_what_no_reader_knows_is_named(name: str, tmp_path: Path) -> None:
    path = png(tmp_path / "p.png", _documents()[name]({"some_new_thing": 5}))
    assert read(path).extra["parameters"]["some_new_thing"] == "5"


@pytest.mark.parametrize("name", _documents())
def test_values_of_a_wrong_kind_are_named_not_used(name: str, tmp_path: Path) -> None:
    path = png(tmp_path / "p.png", _documents()[name]({"seed": [1], "steps": {"a": 1}}))
    found = read(path)
    assert found.seed is None or found.seed == 42  # mflux's note of its noise
    assert "seed" in found.extra["parameters"]


@pytest.mark.parametrize("place", ["parameters", "UserComment", "Comment", "jpeg"])
@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        '[{"prompt": "x"}]',
        '{"prompt": "a red circle", "x": ',
        '{ "k": "',
        "{'prompt': 'a red circle', 'steps': 20}",
        '"{\\"aux\\": \\"a red circle\\"}"',
        '\ufeff{"a": "a red circle"}',
        '<?xml version="1.0"?><a>a red circle</a>',
        "{}",
        "[]",
    ],
)
def test_json_is_never_a_prompt(place: str, text: str, tmp_path: Path) -> None:
    if place in ("UserComment", "jpeg"):
        path = with_exif(tmp_path / "p.jpg", {0x9286: comment(text)})
    else:
        path = png(tmp_path / "p.png", {place: text})
    with pytest.raises(UsageError, match=r"says nothing|that mlxdiff does not read"):
        read(path)


def test_a_graph_without_a_known_sampler_is_named(tmp_path: Path) -> None:
    graph = {"1": {"class_type": "StrangeSampler", "inputs": {"seed": 1}}}
    path = png(tmp_path / "p.png", {"prompt": json.dumps(graph)})
    with pytest.raises(UsageError, match="StrangeSampler"):
        read(path)


@pytest.mark.parametrize(
    "text",
    [
        "a portrait, style: oil, lens: 50mm, time: dusk",
        "Model: a tall woman, Size: large, Seed: of doubt",
        "Steps to heaven, style: oil, Seed: 3, mood: calm",
        "title: one\nsubtitle: two, a: b, c: d, e: f",
        "{red|blue} circle",
        "[a circle], [b: c: 0.5], d: e, f: g",
        "a circle\nNegative prompt: style: oil, lens: 50mm, time: dusk",
    ],
)
def test_a_prompt_with_colons_stays_a_prompt(text: str, tmp_path: Path) -> None:
    """Case 14."""
    found = read(png(tmp_path / "p.png", {"parameters": text}))
    prompt, _, negative = text.partition("\nNegative prompt: ")
    assert (found.prompt, found.negative_prompt or "") == (prompt, negative)
    assert (found.seed, found.steps, found.sampler) == (None, None, None)


@pytest.mark.parametrize("text", ["Screenshot", "Created with GIMP", "", "\0\0\0", "   "])
def test_a_comment_of_a_camera_says_nothing(text: str, tmp_path: Path) -> None:
    path = with_exif(tmp_path / "p.jpg", {0x9286: comment(text, "ascii"), 0x010F: "Camera"})
    with pytest.raises(UsageError, match="says nothing"):
        read(path)


def test_pixels_without_a_hidden_text_say_nothing(tmp_path: Path) -> None:
    Image.fromarray(np.full((5, 3, 4), 255, np.uint8)).save(tmp_path / "p.png")
    with pytest.raises(UsageError, match="says nothing"):
        read(tmp_path / "p.png")


@pytest.mark.parametrize(
    "kind", ["stealth_pnginfo", "stealth_pngcomp", "stealth_rgbinfo", "stealth_rgbcomp"]
)
def test_texts_in_pixels(kind: str, tmp_path: Path) -> None:
    text = a1111("Steps: 20, Sampler: Euler, Seed: 42, Version: v1.6.0")["parameters"]
    stealth(text, kind).save(tmp_path / "p.png")
    assert read(tmp_path / "p.png").seed == 42


def test_a_hidden_text_that_claims_too_much_is_none(tmp_path: Path) -> None:
    pixels = np.asarray(stealth("x" * 50, "stealth_pnginfo")).copy()
    column = pixels.transpose(1, 0, 2)[:, :, 3].reshape(-1)
    column[15 * 8 : 15 * 8 + 32] |= 1  # a length of 2^32 bits
    pixels[:, :, 3] = column.reshape(pixels.shape[:2]).T
    Image.fromarray(pixels).save(tmp_path / "p.png")
    with pytest.raises(UsageError, match="says nothing"):
        read(tmp_path / "p.png")


def test_nodes_that_are_switched_off_do_nothing(tmp_path: Path) -> None:
    graph = workflow()
    graph["nodes"].append(
        {"id": 20, "type": "LoraLoader", "mode": 4, "widgets_values": ["x.safetensors", 1.0, 1.0],
         "inputs": [{"name": "model", "link": 30}, {"name": "clip", "link": None}]}
    )  # fmt: skip
    graph["links"].append([30, 1, 0, 20, 0, "MODEL"])
    for link in graph["links"]:
        if link[0] == 5:
            link[1] = 20
    found = read(png(tmp_path / "p.png", {"workflow": json.dumps(graph)}))
    assert "loras" not in found.extra
    assert found.model == "sd15.safetensors"


def test_a_graph_in_a_circle_ends(tmp_path: Path) -> None:
    graph = api_graph(positive=["6", 0], model=["50", 0])
    graph["6"] = {"class_type": "ConditioningConcat", "inputs": {"conditioning": ["6", 0]}}
    graph["50"] = {"class_type": "Reroute", "inputs": {"": ["50", 0]}}
    assert read(png(tmp_path / "p.png", {"prompt": json.dumps(graph)})).prompt == ""


# Our own text alone


OWN = Metadata(
    prompt="a (red:1.2) circle",
    negative_prompt="",
    prompt_2="a second one",
    seed=42,
    width=512,
    height=768,
    steps=20,
    guidance=7.5,
    guidance_rescale=0.7,
    sampler="dpmpp-2m",
    schedule="normal",
    clip_skip=1,
    model="org/name",
    revision="0" * 40,
    version="0.1.0",
    extra={
        "strength": 0.4,
        "image": "photo, 1: x.png",
        "mask": "5",
        "prompt_syntax": "a1111",
        "rng": "gpu",
        "sampler_rng": "cpu",
        "vary": [11, 0.25],
        "noise_size": [512, 384],
        "noise_seed_delta": 31337,
        "hires": 1.5,
        "hires_strength": 0.6,
        "hires_steps": 12,
        "hires_upscaler": "latent-nearest",
        "control_scale": [1.0, 0.5],
        "paste_original": True,
        "vae": "org/vae",
        "embeddings": [{"name": "x.safetensors", "token": "a, b", "sha256": "0" * 64}],
    },
)


def test_our_text_alone_holds_all(tmp_path: Path) -> None:
    found = Metadata.from_parameters(OWN.to_parameters())
    assert found.to_dict() == OWN.to_dict()


def test_our_text_has_the_words_of_others() -> None:
    loras = [
        {"name": "pastel.safetensors", "scale": 0.8, "short_hash": "0123456789ab"},
        {"name": "two: x.safetensors", "scale": -1, "text_scale": 0.5},
        {"name": "called.safetensors", "scale": 1, "in_prompt": True},
    ]
    drawn = Metadata(
        prompt="a <lora:x:1> b", seed=1, steps=2, version="1", extra={"loras": loras, "strength": 1}
    )
    text = drawn.to_parameters()
    assert text.startswith("a <lora:x:1> b <lora:pastel:0.8> <lora:two_ x:0.5:-1>\n")
    assert "Denoising strength: 1" in text and "Prompt syntax: plain" in text
    found = Metadata.from_parameters(text)
    assert found.prompt == "a <lora:x:1> b"
    assert found.extra["loras"] == loras[:2]
    assert "Denoising strength: 0.6" in OWN.to_parameters()  # of the hires pass


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_a_copy_that_keeps_the_text_alone(suffix: str, encoding: str, tmp_path: Path) -> None:
    """Case 05: programs that keep only the text of A1111."""
    if suffix == "png":
        path = png(tmp_path / "p.png", {"parameters": OWN.to_parameters()})
    else:
        path = with_exif(tmp_path / f"p.{suffix}", {0x9286: comment(OWN.to_parameters(), encoding)})
    assert read(path).to_dict() == OWN.to_dict()


# What readers of other people find in our pictures

_PROMPTS = ["a red circle", "a (red:1.2) circle, [blue]", "two\nlines, colon: x", "漢字 <lora:x:1>"]


def _ours(prompt: str) -> list[Metadata]:
    """Pictures of each kind."""
    plain = Metadata(
        prompt=prompt, negative_prompt="blurry, dark", seed=42, width=512, height=768, steps=20,
        guidance=7.5, sampler="dpmpp-2m", schedule="karras", model="org/name", version="0.1.0",
    )  # fmt: skip
    extras: list[dict[str, Any]] = [
        {},
        {"strength": 0.6, "image": "photo.png"},
        {"hires": 2.0, "hires_strength": 0.5, "hires_upscaler": "lanczos"},
        {"loras": [{"name": "pastel.safetensors", "scale": 0.8, "short_hash": "0123456789ab"}]},
        {"vary": [1, 0.5], "rng": "gpu", "control_scale": [1.0, 0.5]},
        {"strength": 0.75, "image": "photo.png", "mask": "5", "paste_original": True},
        {"embeddings": [{"name": "x.safetensors", "token": "x", "sha256": "0" * 64}]},
        {"seamless": "xy", "step_noise": "brownian", "guider": "pag:scale=3"},
    ]
    return [Metadata(**{**vars(plain), "extra": extra}) for extra in extras]


def _saved(folder: Path, drawn: Metadata, number: int, suffix: str) -> Path:
    """Write a picture as a run does."""
    path = folder / f"{number}.{suffix}"
    if suffix == "png":
        save_png(np.zeros((64, 64, 3), np.uint8), path, drawn.chunks())
    else:
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path, exif=exif(drawn))
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg"])  # it reads no WebP
@pytest.mark.parametrize("prompt", _PROMPTS)
def test_sd_parsers_agrees(prompt: str, suffix: str, tmp_path: Path) -> None:
    """Case 20."""
    sd_parsers = pytest.importorskip("sd_parsers")
    for number, drawn in enumerate(_ours(prompt)):
        path = _saved(tmp_path, drawn, number, suffix)
        found = sd_parsers.ParserManager().parse(path)
        sampler = found.samplers[0]
        tags = " <lora:pastel:0.8>" if "loras" in drawn.extra else ""
        assert [one.value for one in sampler.prompts] == [prompt + tags]
        assert [one.value for one in sampler.negative_prompts] == ["blurry, dark"]
        assert sampler.name == "DPM++ 2M"
        assert sampler.parameters["seed"] in ("42", 42)
        assert str(sampler.parameters["steps"]) == "20"
        assert sampler.model.name == "org/name"
        said = {str(k): str(v) for k, v in {**sampler.parameters, **found.metadata}.items()}
        if strength := drawn.extra.get("hires_strength", drawn.extra.get("strength")):
            assert str(strength) in said.values()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("prompt", _PROMPTS)
def test_sd_prompt_reader_agrees(prompt: str, suffix: str, tmp_path: Path) -> None:
    """Case 20."""
    module = pytest.importorskip("sd_prompt_reader.image_data_reader")
    for number, drawn in enumerate(_ours(prompt)):
        path = _saved(tmp_path, drawn, number, suffix)
        found = module.ImageDataReader(path)
        tags = " <lora:pastel:0.8>" if "loras" in drawn.extra else ""
        assert found.tool == "A1111 webUI"
        assert (found.positive, found.negative) == (prompt + tags, "blurry, dark")
        expected = {
            "model": "org/name", "sampler": "DPM++ 2M", "seed": "42", "cfg": "7.5", "steps": "20",
            "size": "512x768",
        }  # fmt: skip
        assert found.parameter == expected
        if strength := drawn.extra.get("hires_strength", drawn.extra.get("strength")):
            assert f"Denoising strength: {strength}" in found.setting
