"""Measure what quantized checkpoints of other tools cost: memory, time and pictures.

    python benchmarks/foreign_files.py memory FOLDER     # SDXL, full size, random weights: 20 GB
    python benchmarks/foreign_files.py pictures          # the built-in model in other tools' forms

memory: each file is converted to float16 by a process of its own. Peak memory is the system's count
(maximum resident size) minus the size before the file is opened. Results are appended to
FOLDER/memory.jsonl; forms that stand there are not repeated.
pictures: PSNR of pictures against those of the float16 file, same seeds: the mean, and the lowest
tenth. An identical picture counts as 60 dB.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
FORMS = ("float16", "fp8_scaled", "int8_convrot", "q8_0", "q4_0", "mxfp8", "nvfp4", "q4_K")
DRAWN = ("fp8_scaled", "fp8 plain", "int8 rows", "q8_0", "q4_0")
UNET = "model.diffusion_model."


# ---------------------------------------------------------------------------- files of random bytes


@cache
def _block(kind: str) -> bytes:
    """Return 16 MB of random bytes of finite values."""
    chance = np.random.default_rng(0)
    if kind == "F16":
        return chance.normal(0, 0.02, 1 << 23).astype("<f2").tobytes()
    # In GGUF, float16 numbers of such bytes stay below 0.01.
    most = 32 if kind == "GGUF" else 120
    return chance.integers(0, most, 1 << 24, dtype=np.uint8).tobytes()


def _bytes(count: int, kind: str) -> Iterator[bytes]:
    """Yield random bytes of finite values."""
    block = _block(kind if kind in ("F16", "GGUF") else "U8")
    for start in range(0, count, len(block)):
        yield block[: min(len(block), count - start)]


def _layers(names: dict[str, tuple[int, ...]], form: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name -> type and shape of the tensors of a safetensors file in this form."""
    result: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in names.items():
        stem = name.removesuffix(".weight")
        inside = name.startswith(UNET) and stem != name and len(shape) in (2, 4)
        matrix = inside and len(shape) == 2
        if form == "fp8_scaled" and matrix:
            result |= {name: ("F8_E4M3", shape), f"{stem}.scale_weight": ("F32", ())}
        elif form == "int8_convrot" and inside and shape[0] > 4:
            result[name] = ("I8", shape)
            result[f"{stem}.weight_scale"] = ("F32", (shape[0], *(1,) * (len(shape) - 1)))
            rotated = matrix and shape[1] % 256 == 0
            result[f"{stem}.comfy_quant"] = ("U8", (100 if rotated else 99,))
        elif form == "mxfp8" and matrix and shape[1] % 32 == 0:
            rows, blocks = -(-shape[0] // 128) * 128, -(-(shape[1] // 32) // 4) * 4
            result |= {name: ("F8_E4M3", shape), f"{stem}.weight_scale": ("U8", (rows, blocks))}
            result[f"{stem}.comfy_quant"] = ("U8", (40,))
        elif form == "nvfp4" and matrix and shape[1] % 16 == 0:
            rows, blocks = -(-shape[0] // 128) * 128, -(-(shape[1] // 16) // 4) * 4
            result[name] = ("U8", (shape[0], shape[1] // 2))
            result[f"{stem}.weight_scale"] = ("F8_E4M3", (rows, blocks))
            result |= {f"{stem}.weight_scale_2": ("F32", ()), f"{stem}.comfy_quant": ("U8", (40,))}
        else:
            result[name] = ("F16", shape)
    return result


def _marks(form: str, size: int) -> bytes:
    mark: dict[str, Any] = {"format": form}
    if form == "int8_convrot":
        mark = {"format": "int8_tensorwise"}
        if size == 100:
            mark |= {"convrot": True, "convrot_groupsize": 256}
    return json.dumps(mark).encode().ljust(size)[:size]


def write_safetensors(path: Path, names: dict[str, tuple[int, ...]], form: str) -> None:
    from mlxdiff.weights.tensors import width_of

    layers, header, place = _layers(names, form), {}, 0
    marks = {n: _marks(form, s[0]) for n, (_, s) in layers.items() if n.endswith("comfy_quant")}
    layers |= {name: ("U8", (len(mark),)) for name, mark in marks.items()}
    for name, (kind, shape) in layers.items():
        stop = place + math.prod(shape) * width_of(kind)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, stop]}
        place = stop
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, (kind, shape) in layers.items():
            size = math.prod(shape) * width_of(kind)
            if kind == "F32":
                file.write(np.full(math.prod(shape), 1e-4, "<f4").tobytes())
            elif name in marks:
                file.write(marks[name])
            else:
                for part in _bytes(size, kind):
                    file.write(part)


def write_gguf(path: Path, names: dict[str, tuple[int, ...]], form: str) -> None:
    from mlxdiff.weights.gguf import BLOCKS

    number, blocks = next((n, f) for n, f in BLOCKS.items() if f.name == form)
    infos, entries, sizes, place = [], [], [], 0

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    for name, shape in names.items():
        stored = shape
        if len(shape) > 1 and math.prod(shape) % 256 == 0:
            if shape[-1] % blocks.values:
                stored = (math.prod(shape) // 256, 256)
                key = f"comfy.gguf.orig_shape.{name}"
                entries.append(
                    text(key)
                    + struct.pack("<IIQ", 9, 5, len(shape))
                    + struct.pack(f"<{len(shape)}i", *shape)
                )
            kind, size = number, math.prod(shape) // blocks.values * blocks.bytes
        else:
            kind, size = 1, 2 * math.prod(shape)
        infos.append(
            text(name)
            + struct.pack("<I", len(stored))
            + struct.pack(f"<{len(stored)}Q", *stored[::-1])
            + struct.pack("<IQ", kind, place)
        )
        sizes.append((size, kind))
        place += size + -size % 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries))
    head += b"".join(entries) + b"".join(infos)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for size, kind in sizes:
            for part in _bytes(size, "F16" if kind == 1 else "GGUF"):
                file.write(part)
            file.write(bytes(-size % 32))


# ------------------------------------------------------------------------------------------- memory


def measure(folder: Path) -> None:
    """Convert SDXL in each form. Append the results to memory.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    path = ROOT / "tests" / "golden" / "ldm-names" / "sdxl.json.gz"
    names = {k: tuple(v) for k, v in json.loads(gzip.decompress(path.read_bytes())).items()}
    names = {k: v for k, v in names.items() if not k.endswith("position_ids")}
    log = folder / "memory.jsonl"
    done = (
        {json.loads(line)["form"] for line in log.read_text().splitlines()} if log.exists() else ()
    )
    shutil.copytree(ROOT / "tests/golden/sdxl/checkpoint/tokenizer", folder / "tokenizer",
                    dirs_exist_ok=True)  # fmt: skip
    for form in FORMS:
        if form in done:
            continue
        gguf = form.startswith("q")
        source = folder / ("x.gguf" if gguf else "x.safetensors")
        (write_gguf if gguf else write_safetensors)(source, names, form)
        run = subprocess.run(
            [sys.executable, __file__, "convert", str(source)], capture_output=True, text=True
        )
        if run.returncode:
            raise SystemExit(run.stderr)
        result = {"form": form, "bytes": source.stat().st_size, **json.loads(run.stdout)}
        source.unlink()
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(result, flush=True)


def convert_one(source: Path) -> None:
    """Convert a file, and print memory and time as JSON."""
    from mlxdiff.convert import convert

    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    start = time.process_time()
    dest = source.parent / "out"
    report = convert(source, dest)
    used = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    shutil.rmtree(dest)
    print(json.dumps({"peak": peak, "seconds": used, "bytes_out": report.bytes_out}))


# ----------------------------------------------------------------------------------------- pictures


def pictures(count: int, steps: int, forms: Sequence[str]) -> None:
    """Draw with the built-in model in each form. Print the PSNR against float16."""
    from quantized_files import e4m3, int8_rows, raw, scaled_fp8, text, write_safetensors

    import mlxdiff
    from mlxdiff.convert import open_source
    from mlxdiff.loading import BUILTIN

    model = open_source(BUILTIN)
    tensors: dict[str, np.ndarray] = {}
    for component in model.components:
        for name, tensor in model.tensors(component).items():
            values = tensor.read().astype(np.float16).astype(np.float32)
            values = values.transpose(0, 3, 1, 2) if values.ndim == 4 else values
            tensors[f"{component}.{name}"] = np.ascontiguousarray(values)
    prompts = [
        f"a {size} {colour} {shape} on a {ground} background"
        for size, colour, shape, ground in zip(
            ("small", "large") * count,
            ("red", "green", "blue", "yellow", "purple") * count,
            ("circle", "square", "triangle") * count,
            ("white", "black", "yellow", "blue") * count,
            strict=False,
        )
    ][:count]
    drawn: dict[str, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as place:
        for form in ("float16", *forms):
            path = Path(place) / f"x.{'gguf' if form.startswith('q') else 'safetensors'}"
            if form.startswith("q"):
                _write_gguf_model(path, tensors, form)
            else:
                layers = {}
                for name, array in tensors.items():
                    stem = name.removesuffix(".weight")
                    inside = name.startswith("unet.") and stem != name and array.ndim in (2, 4)
                    if inside and array.ndim == 2 and form == "fp8_scaled":
                        codes, scale = scaled_fp8(array)
                        layers |= {name: raw(codes, "F8_E4M3"), f"{stem}.scale_weight": raw(scale)}
                    elif inside and form == "fp8 plain":
                        layers[name] = raw(e4m3(array), "F8_E4M3")
                    elif inside and array.shape[0] > 4 and form == "int8 rows":
                        codes, rows = int8_rows(array)
                        layers |= {name: raw(codes), f"{stem}.weight_scale": raw(rows)}
                        layers[f"{stem}.comfy_quant"] = text({"format": "int8_tensorwise"})
                    else:
                        layers[name] = raw(array.astype(np.float16))
                write_safetensors(path, layers)
            pipe = mlxdiff.load(path, config=BUILTIN, dtype="float32")
            drawn[form] = [
                np.asarray(
                    pipe.generate(prompt, seed=seed, steps=steps, guidance=4.0).images[0],
                    np.float64,
                )
                for seed, prompt in enumerate(prompts)
            ]
            errors = [
                np.mean((a - b) ** 2) for a, b in zip(drawn[form], drawn["float16"], strict=True)
            ]
            psnr = [min(60.0, 10 * math.log10(255**2 / e)) if e else 60.0 for e in errors]
            if form != "float16":
                low = sorted(psnr)[len(psnr) // 10]
                print(
                    f"| {form} | {path.stat().st_size / 1e6:.1f} MB | {np.mean(psnr):.1f} dB | "
                    f"{low:.1f} dB |",
                    flush=True,
                )
            else:
                print(f"| float16 | {path.stat().st_size / 1e6:.1f} MB | | |", flush=True)
            path.unlink()


def _write_gguf_model(path: Path, tensors: dict[str, np.ndarray], form: str) -> None:
    from quantized_files import write_gguf

    def choose(name: str, array: np.ndarray) -> str:
        fits = name.startswith("unet.") and array.ndim > 1 and array.size % 256 == 0
        return form if fits else "F16"

    write_gguf(path, tensors, choose, flatten=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("memory", "convert", "pictures"))
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--forms", nargs="+", default=DRAWN, choices=DRAWN)
    arguments = parser.parse_args()
    if arguments.what == "memory":
        measure(arguments.path)
    elif arguments.what == "convert":
        convert_one(arguments.path)
    else:
        pictures(arguments.count, arguments.steps, arguments.forms)


if __name__ == "__main__":
    main()
