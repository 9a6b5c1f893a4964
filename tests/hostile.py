"""Hostile input for every parser: generators with fixed seeds, and the judge of what becomes of it.

An input is known by its parser and its number, and is the same each time (``pictures:17``). Each
must be read, or refused by an MlxdiffError of one line, within SECONDS of processor time and MEMORY
bytes.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from folders import TEXT, diffusers_folder
from lora_files import write as write_lora
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from mlxdiff.errors import MlxdiffError

SECONDS = 2.0
MEMORY = 512 << 20

Chance = random.Random
Run = Callable[[], object]
Make = Callable[[Chance], Run]
"""Makes the next input, and returns what reads it."""

# ---------------------------------------------------------------------------------------- spoiling

# fmt: off
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 1.5, 1e308, -1e-320, 10**30, 2**31, 2**53, 2**63, 2**64,
    10**400, float("inf"), float("nan"), "x", "", "1", "NaN", "é" * 300, "x" * 5000, "../x", "..",
    "/etc/passwd", "~root/x", "C:\\x", "\\\\host\\x", "a/../../b", "\x00", "\x1b[2J", "\ud800",
    "\u202e", "a\nb", "a" * 40, "0" * 64, "model-00001-of-00002.safetensors", [], {}, [1], [None],
    [[[]]], {"a": 1}, {"": ""}, [0] * 40, "@DEEP@", "@HUGE@",
]
TOKENS = [
    b"[", b"{", b'"', b"]", b"}", b":", b",", b"null", b"true", b"1e999", b"-1", b"9" * 30, b"\0",
    b"\\u0000", b"\\ud800", b"\x80", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"{" * 99,
]
# fmt: on
DEEP = "[" * 6000 + "]" * 6000
HUGE = "9" * 6000


def _text(data: bytes) -> str:
    """Decode JSON that can be damaged; keep halves of surrogate pairs where possible."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace")


def spoil_bytes(data: bytes, chance: Chance, within: int = 1 << 30) -> bytes:
    """Change, remove, double, move or insert a few bytes, or cut the end off."""
    spoilt = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        place, length = (
            chance.randrange(min(len(spoilt), within) or 1),
            chance.choice((1, 1, 4, 20)),
        )
        kind = chance.randrange(8)
        if kind == 0 and spoilt:
            spoilt[place] = chance.randrange(256)
        elif kind == 1:
            del spoilt[place : place + length]
        elif kind == 2:
            spoilt[place:place] = chance.choice(TOKENS)
        elif kind == 3:
            token = chance.choice(TOKENS)
            spoilt[place : place + len(token)] = token
        elif kind == 4:
            spoilt[place:place] = spoilt[place : place + length] * chance.choice((1, 2, 50))
        elif kind == 5:
            other = chance.randrange(len(spoilt) or 1)
            spoilt[place : place + length] = spoilt[other : other + length]
        elif kind == 6 and spoilt:
            spoilt[place] ^= 1 << chance.randrange(8)
        elif chance.random() < 0.3:
            del spoilt[place:]
    return bytes(spoilt)


def spoil_value(value: Any, chance: Chance) -> Any:
    """Replace, drop, rename or add one value somewhere in a JSON document."""
    if isinstance(value, dict) and value and chance.random() < 0.95:
        key = chance.choice(list(value))
        kind = chance.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            name = chance.choice([key + "s", "", "\ud800", "x" * 2000, "../x", "a\x1b[31m"])
            return value | {name: chance.choice([value[key], *STRANGE])}
        return value | {key: spoil_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], spoil_value(value[place], chance), *value[place + 1 :]]
    return chance.choice(STRANGE)


def spoil_json(value: Any, chance: Chance) -> bytes:
    """Return a JSON document with a few faults."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        value = spoil_value(value, chance)
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    text = text.replace('"@DEEP@"', DEEP).replace('"@HUGE@"', HUGE)
    data = text.encode("utf-8", "surrogatepass")
    return spoil_bytes(data, chance) if chance.random() < 0.2 else data


def spoil_file(file: Path, good: bytes, chance: Chance) -> bytes:
    """Return the content of a file with faults: of its JSON, if it is JSON."""
    if file.suffix == ".json" and chance.random() < 0.8:
        return spoil_json(json.loads(good), chance)
    return spoil_bytes(good, chance)


# ----------------------------------------------------------------------------------------- parsers


def safetensors_headers(folder: Path) -> Make:
    """Headers of weight files, small and large."""
    from mlxdiff.weights.tensors import TensorFile

    arrays = {f"layer.{i}": np.ones((i + 1, 3), np.float16) for i in range(4)}
    save_file(arrays, folder / "good", {"format": "pt"})
    good, bad = (folder / "good").read_bytes(), folder / "bad.safetensors"
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def read() -> None:
        for tensor in TensorFile(bad).tensors.values():
            assert tensor.dtype.startswith("F8") or tensor.read().shape == tensor.shape

    def make(chance: Chance) -> Run:
        kind = chance.random()
        if kind < 0.4:
            raw = spoil_json(header, chance)
        elif kind < 0.402:  # few, and large
            count = chance.choice((10_000, 100_000))
            raw = {
                0: b"[" + b"[]," * count + b"[]]",
                1: b'{"w":[' + b"[]," * count + b"[]]}",
                2: b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(count)) + b"}}",
                3: b"{" * count,
                4: b'{"w":{"dtype":"U8","shape":[' + b"0," * count + b'0],"data_offsets":[0,0]}}',
                5: b"{"
                + b",".join(
                    b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i
                    for i in range(count)
                )
                + b"}",
            }[chance.randrange(6)]
        else:
            bad.write_bytes(spoil_bytes(good, chance, 400))
            return read
        bad.write_bytes(len(raw).to_bytes(8, "little") + raw + good[8 + length :])
        return read

    return make


def ggufs(folder: Path) -> Make:
    """GGUF files: the header, texts and lists in it, blocks of every form."""
    from quantized_files import write_gguf

    from mlxdiff.weights.files import open_file

    golden = Path(__file__).parent / "golden" / "quantized" / "container.gguf"
    values = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    forms = {"a": "q8_0", "b": "q4_0", "c": "F16", "d": "F32"}
    said = {"general.architecture": "sd1", "comfy.gguf.orig_shape.c": [8, 128]}
    own = write_gguf(
        folder / "good.gguf", dict.fromkeys(forms, values), lambda name, _: forms[name], said
    )
    goods, bad = [golden.read_bytes(), own.read_bytes()], folder / "bad.gguf"

    def read() -> None:
        for tensor in open_file(bad).tensors.values():
            assert tensor.dtype.startswith("F8") or tensor.read().shape == tensor.shape

    def make(chance: Chance) -> Run:
        data = chance.choice(goods)
        if chance.random() < 0.3:  # a number of the header: counts, lengths, types, places
            place = 4 * chance.randrange(1, 120)
            wild = chance.choice((0, 1, 8, 9, 255, 1 << 31, 1 << 62, (1 << 64) - 1))
            data = data[:place] + wild.to_bytes(8, "little") + data[place + 8 :]
        else:
            data = spoil_bytes(data, chance, 700)
        bad.write_bytes(data)
        return read

    return make


def quantized(folder: Path) -> Make:
    """Layers in the quantized forms of other tools: headers, marks, scales."""
    from quantized_files import text, write_safetensors

    from mlxdiff.weights.files import open_file

    with np.load(Path(__file__).parent / "golden" / "quantized" / "comfy.npz") as file:
        arrays = {name: file[name] for name in file.files}
    cases = json.loads(arrays["headers"].tobytes())
    bad = folder / "bad.safetensors"

    def read() -> None:
        for tensor in open_file(bad).tensors.values():
            if not tensor.dtype.startswith("F8"):
                assert tensor.read().shape == tensor.shape

    def make(chance: Chance) -> Run:
        case = chance.choice(list(cases))
        mark = cases[case]["config"]
        if chance.random() < 0.5:
            mark = spoil_value(mark, chance)
        try:
            mark = text(mark)
        except (ValueError, UnicodeEncodeError):
            mark = text("x")
        tensors = {"l.comfy_quant": mark}
        for name, (dtype, shape) in cases[case]["tensors"].items():
            data = arrays[f"{case}/{name}"].tobytes()
            if chance.random() < 0.1:
                data = bytes(chance.choice((0, 0x7F, 0xFF)) for _ in range(4)) * (len(data) // 4)
            if len(data) == len(arrays[f"{case}/{name}"].tobytes()) and chance.random() < 0.95:
                tensors[f"l.{name}"] = (dtype, tuple(shape), data)
        write_safetensors(bad, tensors, {"quantization": "x"} if chance.random() < 0.1 else None)
        if chance.random() < 0.6:
            bad.write_bytes(_with_header(bad.read_bytes(), chance))
        return read

    return make


def controls(folder: Path) -> Make:
    """ControlNets, Control-LoRAs and IP-Adapters in one file."""
    from adapter_files import write_adapter
    from control_files import controlnet_config, controlnet_tensors
    from golden_data import checkpoint
    from test_control_lora import made

    from mlxdiff.convert import open_source
    from mlxdiff.convert.controlnet import open_controlnet
    from mlxdiff.convert.ip_adapter import open_ip_adapter

    path = checkpoint("sd15")
    model = open_source(path)
    unet = model.config("unet")
    save_file(controlnet_tensors(controlnet_config("sd15"), 1), folder / "net")
    save_file({n: np.ascontiguousarray(a) for n, a in made("sd15")[0].items()}, folder / "lora")
    goods = [(folder / name).read_bytes() for name in ("net", "lora")]
    for kind in ("image", "plus"):
        write_adapter(folder / "adapter.safetensors", kind, path, 0)
        goods.append((folder / "adapter.safetensors").read_bytes())
    bad = folder / "bad.safetensors"

    def read() -> None:
        with suppress(MlxdiffError):
            open_ip_adapter(bad, unet)
        net = open_controlnet(bad, unet, unet_tensors=lambda: model.tensors("unet"))
        for tensor in list(net.tensors().values())[:20]:
            assert tensor.read().shape == tensor.shape

    def make(chance: Chance) -> Run:
        bad.write_bytes(_with_header(chance.choice(goods), chance))
        return read

    return make


def pickles(folder: Path) -> Make:
    """Files of torch.save, zip and older."""
    import zipfile

    from pickle_files import zipped

    from mlxdiff.weights.pickles import PickleFile

    golden = Path(__file__).parent / "golden" / "pickles"
    sources = [
        f.read_bytes() for f in sorted(golden.iterdir()) if f.suffix in (".bin", ".pt", ".ckpt")
    ]
    sources = [source for source in sources if len(source) < 100_000]
    bad = folder / "bad.ckpt"

    def read() -> None:
        for tensor in PickleFile(bad).tensors.values():
            assert tensor.dtype.startswith("F8") or tensor.read().shape == tensor.shape

    def make(chance: Chance) -> Run:
        data = chance.choice(sources)
        if data[:2] == b"PK" and chance.random() < 0.7:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                entries = {name: file.read(name) for name in file.namelist()}
            key = next(name for name in entries if name.endswith("data.pkl"))
            entries[key] = spoil_bytes(entries[key], chance)
            bad.write_bytes(zipped(entries.items(), zip64=chance.random() < 0.2))
        else:
            bad.write_bytes(spoil_bytes(data, chance))
        return read

    return make


def _spoilt_folder(path: Path, read: Run, largest: int = 200_000) -> Make:
    """Spoil one document of a folder at a time."""
    files = {f: f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
    documents = [f for f in files if f.suffix in (".json", ".txt") and len(files[f]) < largest]
    touched: list[Path] = []

    def make(chance: Chance) -> Run:
        for file in touched:
            file.write_bytes(files[file])
        touched[:] = chance.sample(documents, chance.choice((1, 1, 2)))
        for file in touched:
            file.write_bytes(spoil_file(file, files[file], chance))
        return read

    return make


def configs(folder: Path) -> Make:
    """Documents of diffusers folders: of a plain model, and of models that read a picture."""
    from golden_data import checkpoint
    from svd_files import write_svd

    from mlxdiff.convert import describe

    diffusers_folder(folder / "model")
    for name in ("unclip", "zero123", "marigold-depth"):
        shutil.copytree(checkpoint(name), folder / name)
    write_svd(folder / "svd")
    spoilt = [
        _spoilt_folder(folder / name, lambda name=name: describe(folder / name))  # type: ignore[misc]
        for name in ("model", "unclip", "zero123", "marigold-depth", "svd")
    ]
    return lambda chance: chance.choice(spoilt)(chance)


def manifests(folder: Path) -> Make:
    """Documents of a converted folder, its manifest among them, and of an index of shards."""
    from mlxdiff.convert import convert
    from mlxdiff.store.folder import open_folder

    diffusers_folder(folder / "model")
    convert(folder / "model", folder / "plain")
    convert(folder / "model", folder / "packed", quantize=4)
    halves = [
        _spoilt_folder(folder / name, lambda name=name: open_folder(folder / name))  # type: ignore[misc]
        for name in ("plain", "packed")
    ]
    return lambda chance: chance.choice(halves)(chance)


def original_configs(folder: Path) -> Make:
    """The .yaml of the LDM code beside a checkpoint."""
    from mlxdiff.convert import original_config

    good = (
        b"model:\n  base_learning_rate: 1.0e-04\n  target: ldm.ddpm.LatentDiffusion\n"
        b'  params:\n    parameterization: "v"\n    linear_start: 0.00085\n    timesteps: 1000\n'
        b"    use_ema: False # a comment\n    image_size: 64\n    unet_config:\n      params:\n"
        b"        attention_resolutions: [ 4, 2, 1 ]\n        channel_mult:\n"
        b"        - 1\n        - 2\n"
    )
    bad = folder / "bad.yaml"

    def make(chance: Chance) -> Run:
        if chance.random() < 0.02:
            bad.write_bytes(chance.choice(TOKENS) * chance.choice((600, 20_000)))
        else:
            bad.write_bytes(spoil_bytes(good, chance))
        return lambda: original_config.read(bad)

    return make


def schedulers(folder: Path) -> Make:
    """Schedules from wild numbers in scheduler_config.json."""
    from mlxdiff import samplers

    good = {
        "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "rho": 7.0,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1,
        "prediction_type": "epsilon", "timestep_spacing": "leading", "trained_betas": None,
        "rescale_betas_zero_snr": False, "solver_order": 2, "sigma_min": None, "sigma_max": None,
        "original_inference_steps": 50, "final_sigmas_type": "zero", "timestep_scaling": 10.0,
    }  # fmt: skip
    wild = [1e-308, 1e-30, 0.5, 0.999, 2, 1e5, 10**9, 10**12, [0.1] * 3, [0.5] * 1000, "trailing"]

    def make(chance: Chance) -> Run:
        config = dict(good)
        for key in chance.sample(list(good), chance.choice((1, 1, 2, 3))):
            config[key] = chance.choice([*wild, *STRANGE])  # type: ignore[assignment]
        name, schedule = chance.choice(samplers.NAMES), chance.choice(list(samplers.SCHEDULES))
        steps = chance.choice((1, 2, 5, 20, 50, 1000))
        return lambda: samplers.plan(config, name, schedule, steps)

    return make


WORDS = [
    "a",
    "b",
    "ab",
    "a b",
    "",
    "<|endoftext|>",
    "<|startoftext|>",
    "!",
    "\ud800",
    "\0",
    "é" * 9,
]


def tokenizers(folder: Path) -> Make:
    """Files of a tokenizer."""
    from mlxdiff.store.folder import check_tokenizer
    from mlxdiff.tokenizer import Tokenizer

    source = Path(__file__).parent.parent / "mlxdiff" / "builtin" / "tokenizer"
    path = folder / "tokenizer"
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    specials = {"bos_token": "<|startoftext|>", "eos_token": {"content": "<|endoftext|>"}}
    vocabulary = json.loads((path / "vocab.json").read_bytes())
    (path / "special_tokens_map.json").write_text(json.dumps(specials))
    (path / "added_tokens.json").write_text(json.dumps({"<new>": len(vocabulary)}))
    from mlxdiff.networks.config import CLIPTextConfig

    known = {"text_encoder": CLIPTextConfig.from_dict(TEXT | {"vocab_size": len(vocabulary) + 1})}
    saved = (path / "tokenizer.json").read_bytes()

    def read() -> None:
        tokenizer = Tokenizer.from_folder(path, pad_token="<|endoftext|>")
        check_tokenizer(tokenizer, "tokenizer", known, str(path))
        for word in WORDS:
            with suppress(MlxdiffError):
                ids = tokenizer.encode(word)
                assert all(0 <= i <= len(vocabulary) for i in ids)
                tokenizer.truncated(word), tokenizer.unknown_words(word), tokenizer.decode(ids)
        with suppress(MlxdiffError):
            tokenizer.with_tokens(["<another>"])

    spoil = _spoilt_folder(path, read)

    def make(chance: Chance) -> Run:
        run = spoil(chance)
        if chance.random() < 0.5:
            (path / "tokenizer.json").unlink(missing_ok=True)
        elif not (path / "tokenizer.json").exists():
            (path / "tokenizer.json").write_bytes(saved)
        return run

    return make


def pictures(folder: Path) -> Make:
    """Picture files of all formats, and of formats that must not be opened."""
    from mlxdiff.pictures.image import load_image, load_levels
    from mlxdiff.pictures.metadata import read as read_metadata

    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat\nSteps: 4, Seed: 1".encode("utf-16-be")
    sources: list[bytes] = []
    for kind, modes in {
        "PNG": "1 L LA P RGB RGBA I;16", "JPEG": "L RGB CMYK", "WEBP": "RGB RGBA", "BMP": "L RGB",
        "TIFF": "L RGB F I;16 CMYK", "GIF": "P", "AVIF": "RGB", "PPM": "L RGB", "ICO": "RGB",
        "TGA": "RGB", "EPS": "RGB", "PDF": "RGB", "PCX": "RGB", "DDS": "RGB", "SGI": "RGB",
    }.items():  # fmt: skip
        for mode in modes.split():
            picture = Image.fromarray(pixels).convert("L" if mode in ("LA", "I;16") else "RGB")
            options = {"exif": exif.tobytes()} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
            with suppress(Exception), io.BytesIO() as file:  # a Pillow without some format
                picture.convert(mode).save(file, kind, **options)
                sources.append(file.getvalue())
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a cat\nSteps: 4, Sampler: Euler, Seed: 1", zip=True)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG", pnginfo=texts)
        sources.append(file.getvalue())
    bad = folder / "bad.png"

    def read() -> None:
        with suppress(MlxdiffError):
            read_metadata(bad)
        with suppress(MlxdiffError):
            assert load_levels(bad).ndim == 2
        assert load_image(bad).ndim == 3

    def make(chance: Chance) -> Run:
        kind = chance.random()
        if kind < 0.004:  # a bomb: few bytes, many pixels
            bad.write_bytes(_bomb(*chance.choice(BOMBS)))
        elif kind < 0.1:
            bad.write_bytes(_with_size(sources[0], chance))
        else:
            bad.write_bytes(spoil_bytes(chance.choice(sources), chance))
        return read

    return make


def videos(folder: Path) -> Make:
    """Animated pictures, and motion adapters in one file."""
    from golden_data import checkpoint
    from motion_files import original_names

    from mlxdiff.convert import open_motion_adapter, open_source
    from mlxdiff.pictures.videos import describe, encode_video, load_video

    unet = open_source(checkpoint("sd15")).config("unet")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 13, 3), np.uint8)
    frames = [Image.fromarray(one) for one in pixels]
    sources = {name: encode_video(frames, name, 8) for name in (".gif", ".webp", ".png")}
    save_file(original_names("v1", "sd15"), folder / "motion")
    motion = (folder / "motion").read_bytes()

    def make(chance: Chance) -> Run:
        if chance.random() < 0.2:
            path = folder / "bad.safetensors"
            path.write_bytes(_with_header(motion, chance))
            return lambda: open_motion_adapter(path, unet).tensors()
        name = chance.choice(list(sources))
        path = folder / f"bad{name}"
        path.write_bytes(spoil_bytes(sources[name], chance))

        def read() -> None:
            with suppress(MlxdiffError):
                describe(path)
            assert load_video(path)[0].ndim == 3

        return read

    return make


BOMBS = [(20_000, 20_000), (60_000, 900), (1, 2**31 - 1), (7000, 7000)]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(min(width * height, 50_000_000)), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", rows)
        + _chunk(b"IEND", b"")
    )


def _with_size(png: bytes, chance: Chance) -> bytes:
    """Return a PNG that says it has another size, bit depth or colour type."""
    width, height = (chance.choice((0, 1, 13, 1000, 20_000, 2**31 - 1)) for _ in range(2))
    kind = [chance.choice((1, 2, 4, 8, 16, 3)), chance.choice((0, 2, 3, 4, 6, 9)), 0, 0, 0]
    header = struct.pack(">II", width, height) + bytes(kind)
    return png[:8] + _chunk(b"IHDR", header) + png[33:]


SAID = {
    "schema": "mlxdiff.image/1", "prompt": "a cat", "negative_prompt": "", "seed": 1, "width": 64,
    "height": 64, "steps": 4, "guidance": 7.5, "sampler": "euler", "schedule": "karras",
    "clip_skip": 1, "model": "org/name", "revision": "a" * 40, "version": "0.1.0", "vae": "a/b",
    "loras": [{"name": "x.safetensors", "scale": 1.0, "sha256": "0" * 64}], "control_image": ["a"],
    "embeddings": [{"name": "e.pt", "token": "toy", "sha256": "0" * 64}], "controlnet": ["org/net"],
    "refiner": "org/refiner", "ip_adapter": ["a/b"], "image": "x.png", "strength": 0.5,
    "guidance_interval": [0.0, 1.0], "quantize": 4, "hires": 2.0,
}  # fmt: skip
PARAMETERS = (
    "a (cat:1.2) <lora:x:1>\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M, Schedule type: "
    'Karras, CFG scale: 7, Seed: 3, Size: 64x64, Model: x, Lora hashes: "x: 1", Clip skip: 2'
)


def metadata(folder: Path) -> Make:
    """What a picture says about itself, and its replay."""
    from mlxdiff.cli.replay import replayed
    from mlxdiff.pictures.metadata import Metadata

    def read(texts: dict[str, str]) -> None:
        found = []
        if "mlxdiff" in texts:
            found.append(Metadata.from_json(texts["mlxdiff"]))
        found.append(Metadata.from_parameters(texts.get("parameters", "")))
        for one in found:
            one.to_parameters(), one.to_dict()
            with mock.patch("mlxdiff.pictures.metadata.read", lambda path: one):  # noqa: B023
                replayed({}, "picture.png")

    def make(chance: Chance) -> Run:
        kind = chance.random()
        if kind < 0.5:
            texts = {"mlxdiff": _text(spoil_json(SAID, chance))}
        elif kind < 0.9:
            data = spoil_bytes(PARAMETERS.encode(), chance)
            texts = {
                "parameters": data.decode("utf-8", chance.choice(("replace", "surrogateescape")))
            }
        else:
            piece = chance.choice(
                ("ab ", "a:", 'ab:"', '\\"', "ab: 1,", "-", " ", "\n", "é", "(", '"')
            )
            texts = {"parameters": "x\n" + piece * (98_000 // len(piece))}
        return lambda: read(texts)

    return make


def foreign(folder: Path) -> Make:
    """Pictures of other programs, and their replay."""
    from foreign_files import SAMPLES, png, stealth, with_exif

    from mlxdiff.cli.replay import replayed
    from mlxdiff.pictures.metadata import read as read_metadata

    samples = list(SAMPLES.values())
    path = folder / "p.png"

    def read() -> None:
        found = read_metadata(path)
        found.to_parameters(), found.to_dict()
        replayed({}, str(path))

    def spoil(text: str, chance: Chance) -> str:
        value: Any = None
        with suppress(ValueError):
            value = json.loads(text)
        if isinstance(value, dict) and chance.random() < 0.8:
            return _text(spoil_json(value, chance))
        return spoil_bytes(text.encode(), chance).decode("utf-8", "replace")

    def make(chance: Chance) -> Run:
        sample, kind = chance.choice(samples), chance.random()
        if kind < 0.02:
            graph = _endless_graph(chance)
            png(path, {chance.choice(("prompt", "workflow")): graph})
        elif kind < 0.03:
            piece = chance.choice(("[],", '{"a":1},', '"",', "1.5,", "[[[[", '{"a":'))
            large = f'{{"prompt":"x","seed":[{piece * (3_900_000 // len(piece))}0]}}'
            png(path, {chance.choice(("parameters", "prompt", "Comment", "Dream")): large})
        elif sample.hidden is not None:
            pixels = np.asarray(stealth(sample.hidden)).copy()
            for _ in range(chance.choice((0, 1, 40))):
                pixels[chance.randrange(len(pixels)), chance.randrange(4), 3] ^= 1
            Image.fromarray(pixels).save(path)
        elif sample.exif:
            tags = {tag: spoil_bytes(_as_bytes(v), chance) for tag, v in sample.exif.items()}
            with suppress(Exception):  # Pillow writes no such tag
                with_exif(path, {tag: v if tag == 0x9286 else v.decode("latin-1")
                                 for tag, v in tags.items()})  # fmt: skip
        else:
            texts = {key: spoil(text, chance) for key, text in sample.texts.items()}
            png(
                path, {key: text.encode("utf-8", "replace").decode() for key, text in texts.items()}
            )
        return read

    return make


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _endless_graph(chance: Chance) -> str:
    """Return a large graph whose nodes lead to each other in circles, or in long rows."""
    count = chance.choice((3, 1000, 4999, 9000))
    kinds = ("KSampler", "Reroute", "LoraLoader", "VAEDecode", "SaveImage", "CLIPTextEncode")
    names = ("samples", "images", "latent_image", "model", "positive", "clip", "text", "vae", "")
    kind = chance.choice(kinds)
    return json.dumps({
        str(i): {
            "class_type": kind if chance.random() < 0.7 else chance.choice(kinds),
            "inputs": {name: [str((i + 1) % count), 0] for name in names},
        }
        for i in range(count)
    })  # fmt: skip


def prompts(folder: Path) -> Make:
    """Prompts, in both syntaxes."""
    from mlxdiff.text import a1111
    from mlxdiff.text.prompt import Vocabulary
    from mlxdiff.tokenizer import Tokenizer

    source = Path(__file__).parent.parent / "mlxdiff" / "builtin" / "tokenizer"
    vocabulary = Vocabulary(Tokenizer.from_folder(source), 2000)
    # fmt: off
    pieces = [
        "(", ")", "[", "]", ":", "|", "a", " ", "BREAK", "AND", "\\", "<lora:x:1>", "<lora:", ">",
        "<", ":1.3)", ":0.5]", "1e999", "9" * 400, "\ud800", "\0", "é", "\u0301\u0323", "a b, ",
        "((",
        "[a|b]", "[a:b:3]", "\n", "\u2028", "😀", "<|endoftext|>", "__", "{a|b}", "-",
    ]
    # fmt: on

    def read(text: str) -> None:
        def each(run: Run) -> None:
            with suppress(MlxdiffError):
                run()

        each(lambda: a1111.weigh(text))
        each(lambda: a1111.networks(text))
        each(lambda: a1111.refuse_composition(text))
        each(lambda: a1111.edits(text, 20))
        each(lambda: vocabulary.plain(text))
        each(lambda: vocabulary.tokenizer.unknown_words(text))
        vocabulary.a1111(text)

    def make(chance: Chance) -> Run:
        kind = chance.random()
        if kind < 0.97:
            text = "".join(chance.choice(pieces) for _ in range(chance.randint(0, 30)))
        elif kind < 0.99:
            few = chance.sample(pieces, chance.choice((1, 1, 2)))
            text = "".join(few) * chance.choice((100, 600, 2000))
        else:
            piece = chance.choice(pieces)
            text = piece * (chance.choice((12_000, 98_000, 200_000)) // len(piece))
        return lambda: read(text)

    return make


def lines(folder: Path) -> Make:
    """Files of prompts, axes and presets; wildcards of prompts."""
    from mlxdiff.batch import jobs, presets
    from mlxdiff.batch.lines import read_lines
    from mlxdiff.batch.wildcards import Wildcards

    (folder / "a.txt").write_text("__b__\n{x|y}\n")
    (folder / "b.txt").write_text("__a__ __a__\n__b__\nz\n")
    preset = folder / "preset.toml"
    words = Wildcards(folder)
    # fmt: off
    pieces = [
        "{", "}", "|", "__", "__a__", "__b__", "__../a__", "_", " ", "a", "{a|b}", "\n", "\r", '"',
        "'", "--", "--steps ", "--prompt ", "--lora ", "--guess-mode ", "=", ",", ":", "[", "]",
        "9" * 400, "1e999", '{"', '"steps": ', '"loras": [["x", ', "steps = ", "loras = [[", "#",
        "\\", "\0", "é", "\ud800", "steps=1,2", "x.png", "-1", "true", "[[", "{" * 50, "\u2028",
    ]
    # fmt: on

    def read(text: str) -> None:
        def each(run: Run) -> None:
            with suppress(MlxdiffError):
                run()

        found = read_lines(text, "x")
        each(lambda: jobs.expand({"count": 2}, 1, found, wildcards=words))
        each(lambda: jobs.read_axis(text))
        preset.write_text(text, "utf-8", errors="replace")
        each(lambda: presets.read_preset(str(preset)))
        words.fill(text, 1)

    def make(chance: Chance) -> Run:
        if chance.random() < 0.95:
            text = "".join(chance.choice(pieces) for _ in range(chance.randint(0, 30)))
        else:
            few = "".join(chance.sample(pieces, chance.choice((1, 2, 3))))
            text = few * (chance.choice((12_000, 98_000)) // len(few))
        return lambda: read(text)

    return make


def templates(folder: Path) -> Make:
    """Names of output files, and what is filled in."""
    from mlxdiff.pictures.names import Template

    # fmt: off
    pieces = [
        "{seed}", "{index:09d}", "{step}", "{prompt}", "{model}", "{image}", "{date}", "{", "}",
        "{{", "}}",
        "{seed:>9999999999}", "{seed.__class__}", "{0}", "{}", "{seed!r}", "{prompt:5}", "a", "~",
        "../", "/", "~x/", "\0", "\ud800", "é", "\u202e", "%s", "$HOME", "x" * 300, ".png", " ",
    ]
    # fmt: on

    def make(chance: Chance) -> Run:
        text = "".join(chance.choice(pieces) for _ in range(chance.randint(0, 6))) + ".png"
        values: dict[str, Any] = {"date": "2026-01-01", "index": 0, "step": 1, "frame": 0}
        values["seed"] = chance.choice((0, -1, 2**64, 10**100))
        words = "".join(chance.choice(pieces) for _ in range(3))
        values["prompt"] = words * chance.choice((1, 5000))
        values["model"] = chance.choice(("org/name", "../x", "", "\ud800", "."))
        values["image"] = chance.choice(("../photo", "", "a\0b", "x" * 300))

        def read() -> None:
            filled = Template(text, "--output").fill(**values)
            own = Template(text, "--output").fields
            if not own & {"prompt", "model", "image"} or "/" in text or text.startswith("~"):
                return
            assert "/" not in str(filled) and len(filled.name.encode("utf-8", "replace")) < 3000

        return read

    return make


def loras(folder: Path) -> Make:
    """LoRA and textual inversion files."""
    from golden_data import checkpoint

    from mlxdiff.adapters import lora
    from mlxdiff.adapters.textual_inversion import match, open_embedding
    from mlxdiff.convert import open_source

    model = open_source(checkpoint("sd15"))
    named = {name: model.config(name) for name in model.components if name != "vae"}
    tensors = {name: model.tensors(name) for name in named}
    texts = {"text_encoder": model.config("text_encoder")}
    scales = (1.0, 0.0, -1e9, 1e9, 1e-30)
    width = texts["text_encoder"].hidden_size
    save_file({"<toy>": np.ones((2, width), np.float32)}, folder / "toy.safetensors")
    goods = [write_lora(name, folder) for name in LORAS] + [folder / "toy.safetensors"]
    for form, parts in _lora_forms(model.tensors("unet")[f"{LORA_MODULE}.weight"].shape).items():
        save_file(parts, folder / f"{form}.safetensors")
        goods.append(folder / f"{form}.safetensors")
    contents = [file.read_bytes() for file in goods]
    contents += [_one_layer(form, tensors["unet"], folder) for form in _FORMS]
    bad = folder / "bad.safetensors"

    def read() -> None:
        with suppress(MlxdiffError):
            match(open_embedding(bad), texts)
        scale = scales[bad.stat().st_size % len(scales)]
        matched = lora.match(lora.open_lora(bad), scale, named, "sd1")
        matched.report()
        for component, deltas in matched.deltas.items():
            changed = lora.changed([matched], component, tensors[component])
            for name in list(deltas)[:2]:
                assert np.isfinite(changed[name].read()).all()

    def make(chance: Chance) -> Run:
        data = chance.choice(contents)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if len(header) > 40:  # a few modules are enough
            first = list(header)[: chance.choice((4, 12, 40))]
            end = max(header[n]["data_offsets"][1] for n in first if n != "__metadata__")
            header = {n: v for n, v in header.items() if n in first}
            data = data[: 8 + length + end]
        whole = _with_header(data, chance, header)
        length = int.from_bytes(whole[:8], "little")
        raw, rest = whole[8 : 8 + length], whole[8 + length :]
        if chance.random() < 0.3:
            rest = bytes(chance.choice((0, 0x7F, 0xFF)) for _ in range(4)) * (
                len(rest) // 4
            ) + bytes(len(rest) % 4)
        bad.write_bytes(len(raw).to_bytes(8, "little") + raw + rest)
        return read

    return make


LORAS = ("sd15-kohya", "sd15-peft", "sd15-rslora")
LORA_MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def _lora_forms(shape: tuple[int, ...]) -> dict[str, dict[str, np.ndarray]]:
    """One file of each form beside plain LoRA, for a matrix of this shape (out, in)."""
    out, inputs = shape

    def ones(*sides: int) -> np.ndarray:
        return np.full(sides, 0.1, np.float16)

    forms = {
        "dora": {"lora_up.weight": ones(out, 2), "lora_down.weight": ones(2, inputs),
                 "dora_scale": ones(out, 1)},
        "loha": {f"hada_w{i}_{part}": ones(*sides)
                 for i in (1, 2) for part, sides in (("a", (out, 2)), ("b", (2, inputs)))},
        "lokr": {"lokr_w1": ones(2, 2), "lokr_w2_a": ones(out // 2, 2),
                 "lokr_w2_b": ones(2, inputs // 2)},
        "glora": {"a1.weight": ones(2, inputs), "a2.weight": ones(inputs, 2),
                  "b1.weight": ones(2, inputs), "b2.weight": ones(out, 2)},
        "oft": {"oft_blocks": ones(out // 8, 8, 8), "rescale": ones(out)},
        "boft": {"oft_blocks": ones(2, out // 4, 4, 4)},
        "ia3": {"weight": ones(out), "on_input": np.array(False)},
        "full": {"diff": ones(out, inputs), "diff_b": ones(out)},
    }  # fmt: skip
    name = "lora_unet_" + LORA_MODULE.replace(".", "_")
    alpha = {f"{name}.alpha": np.array(1.0, np.float32)}
    return {
        form: {f"{name}.{part}": values for part, values in parts.items()} | alpha
        for form, parts in forms.items()
    }


_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_FORMS: tuple[dict[str, Any], ...] = (  # names and shapes; n: width of the layer
    {"hada_w1_a": "n,4", "hada_w1_b": "4,n", "hada_w2_a": "n,4", "hada_w2_b": "4,n", "alpha": ""},
    {"lokr_w1": "2,2", "lokr_w2": "n//2,n//2", "alpha": ""},
    {"lokr_w1_a": "2,1", "lokr_w1_b": "1,2", "lokr_w2_a": "n//2,2", "lokr_w2_b": "2,n//2"},
    {"lora_down.weight": "4,n", "lora_up.weight": "n,4", "alpha": "", "dora_scale": "n,1"},
    {"oft_blocks": "4,n//4,n//4", "alpha": ""},
    {"oft_blocks": "2,4,n//4,n//4", "alpha": ""},
    {"weight": "n", "on_input": ""},
    {"a1.weight": "4,n", "a2.weight": "n,4", "b1.weight": "4,n", "b2.weight": "n,4", "alpha": ""},
    {"diff": "n,n", "diff_b": "n"},
)


def _one_layer(form: dict[str, str], tensors: Any, folder: Path) -> bytes:
    """A LoRA file of one layer, in some form."""
    n = tensors[f"{_LAYER}.weight"].shape[0]
    shapes = {
        name: eval(f"({shape},)" if shape else "()", {"n": n}) for name, shape in form.items()
    }
    stem = f"lora_unet_{_LAYER.replace('.', '_')}"
    file = folder / "one.safetensors"
    save_file({f"{stem}.{k}": np.full(s, 0.1, np.float32) for k, s in shapes.items()}, file)
    return file.read_bytes()


def _with_header(data: bytes, chance: Chance, header: Any = None) -> bytes:
    """A safetensors file with a few faults in its header.

    Args:
        header: takes the place of its own first.
    """
    length = int.from_bytes(data[:8], "little")
    raw = data[8 : 8 + length] if header is None else json.dumps(header).encode()
    for _ in range(chance.choice((0, 1, 1, 2))):
        raw = spoil_bytes(raw, chance) if chance.random() < 0.4 else _renamed(raw, chance)
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def _renamed(raw: bytes, chance: Chance) -> bytes:
    """Change one word, number or shape of a LoRA's header."""
    found = list(re.finditer(rb"[A-Za-z_]+|\d+|\[[^\]]*\]", raw))
    if not found:
        return raw
    match = chance.choice(found)
    new = chance.choice(
        b"lora_down alpha dora_scale F16 I8 0 1 [] [1] hada_w1_a lokr_w1 unet text_model [4,4] "
        b"[1,1,1,1,1] 99999999999999999999 diff bias oft_blocks on_input rescale a1 F64 BOOL".split(
            b" "
        )
    )
    return raw[: match.start()] + new + raw[match.end() :]


def hubs(folder: Path) -> Make:
    """References, and what a hub answers: listings and bodies."""
    from huggingface_hub.hf_api import ModelInfo

    from mlxdiff.store import hub, reference

    files = {
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        "scheduler/scheduler_config.json": b"{}",
    }
    files |= {"unet/diffusion_pytorch_model.safetensors": b"u" * 3000, "x.safetensors": b"x"}
    listing = {
        "id": "org/name",
        "sha": "a" * 40,
        "siblings": [
            {"rfilename": name, "size": len(body), "blobId": _git_sha1(body)}
            for name, body in files.items()
        ],
    }
    texts = [
        "org/name",
        "org/name@main",
        "org/name/x.safetensors",
        "https://huggingface.co/org/name",
    ]
    texts += [
        "org/name@" + "a" * 40,
        "https://hf.co/org/name/resolve/main/x.safetensors?download=true",
    ]
    home = folder / "home"
    outside = folder / "outside"
    outside.write_text("the user's own")
    answer: dict[str, Any] = {}

    def model_info(reference: Any) -> Any:
        return ModelInfo(**json.loads(answer["listing"]))

    def http_get(url: str, file: Any, *, resume_size: int = 0, **rest: Any) -> None:
        name = url.partition("/resolve/")[2].partition("/")[2]
        body = files.get(name, b"?")[resume_size:]
        if answer["chance"].random() < 0.3:
            body = spoil_bytes(body, answer["chance"])
        for start in range(0, len(body), 1000):
            file.write(body[start : start + 1000])

    def read() -> None:
        with (
            mock.patch.dict("os.environ", {"HF_HUB_CACHE": str(home), "HF_HUB_OFFLINE": ""}),
            mock.patch.object(hub, "_model_info", model_info),
            mock.patch("huggingface_hub.file_download.http_get", http_get),
        ):
            found = reference.parse(answer["text"])
            if found is not None:
                try:
                    hub.resolve(str(found), components=("unet", "scheduler"))
                finally:
                    assert outside.read_text() == "the user's own"
                    here = {path.name for path in folder.iterdir()}
                    assert here <= {"home", "outside"}, here

    def make(chance: Chance) -> Run:
        import shutil

        shutil.rmtree(home, ignore_errors=True)
        text = chance.choice(texts)
        if chance.random() < 0.3:
            text = spoil_bytes(text.encode(), chance).decode("utf-8", "replace")
        document = spoil_json(listing, chance) if chance.random() < 0.9 else json.dumps(listing)
        if isinstance(document, bytes):
            document = _text(document)
        answer.update(text=text, listing=document, chance=chance)
        return read

    return make


def _git_sha1(body: bytes) -> str:
    import hashlib

    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@dataclass(frozen=True)
class Parser:
    """A parser and its hostile inputs.

    Attributes:
        prepare: gets an empty folder, returns what makes the inputs.
        long, short: number of inputs in the slow test and in the short one.
    """

    prepare: Callable[[Path], Make]
    long: int
    short: int


PARSERS = {
    parser.prepare.__name__: parser
    for parser in (
        Parser(safetensors_headers, 23_000, 300),
        Parser(ggufs, 3_000, 80),
        Parser(quantized, 3_000, 80),
        Parser(controls, 1_000, 30),
        Parser(pickles, 14_000, 200),
        Parser(configs, 6_000, 60),
        Parser(manifests, 3_000, 30),
        Parser(tokenizers, 6_000, 60),
        Parser(pictures, 9_000, 150),
        Parser(videos, 1_000, 40),
        Parser(schedulers, 2_000, 60),
        Parser(original_configs, 2_000, 60),
        Parser(metadata, 6_000, 150),
        Parser(foreign, 2_000, 150),
        Parser(prompts, 7_000, 200),
        Parser(lines, 1_000, 150),
        Parser(templates, 2_000, 100),
        Parser(loras, 5_000, 100),
        Parser(hubs, 4_000, 60),
    )
}

# ------------------------------------------------------------------------------------------- judge


class Hang(BaseException):
    """An input took more than five times SECONDS."""


@dataclass
class Verdict:
    """What became of the inputs of a parser.

    Attributes:
        outcomes: "read" or "refused" -> number.
        faults: one line for each input that crashed, hung or took too much memory.
        seconds, memory: the most that one input took.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0


def judge(name: str, numbers: Iterator[int] | range, folder: Path) -> Verdict:
    """Give inputs to a parser.

    Args:
        name: of the parser.
        numbers: which of its inputs.
        folder: an empty folder.
    """
    make, verdict = PARSERS[name].prepare(folder), Verdict()
    for number in numbers:
        run = make(random.Random(f"{name}:{number}"))
        before = _memory()[0]
        start = time.process_time()
        try:
            with _alarm(5 * SECONDS):
                run()
            outcome = "read"
        except MlxdiffError as error:
            outcome = "refused"
            if not str(error).isprintable() or not 0 < len(str(error)) <= 2000:
                verdict.faults.append(f"{name}:{number}: not one line: {str(error)[:200]!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "crashed"
            verdict.faults.append(f"{name}:{number}: {type(error).__name__}: {str(error)[:200]}")
        seconds, peak = time.process_time() - start, _memory()[1]
        # The peak can be an earlier input's. It is forgotten before it can hide another's.
        memory = max(0, peak - before)
        if memory > MEMORY // 4:
            _forget_peak()
        verdict.outcomes[outcome] += 1
        verdict.seconds, verdict.memory = max(verdict.seconds, seconds), max(verdict.memory, memory)
        if seconds > SECONDS or memory > MEMORY:
            verdict.faults.append(f"{name}:{number}: {seconds:.1f} s, {memory >> 20} MB")
    return verdict


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise Hang after this much processor time."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _memory() -> tuple[int, int]:
    """Return the memory of this process now, and its peak, in bytes; 0 and 0 if not on Linux."""
    if sys.platform != "linux":
        return 0, 0
    status = Path("/proc/self/status").read_text()
    now, peak = (re.search(rf"{key}:\s+(\d+)", status) for key in ("VmRSS", "VmHWM"))
    assert now is not None and peak is not None
    return int(now[1]) << 10, int(peak[1]) << 10


def _forget_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
