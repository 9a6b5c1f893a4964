"""The safetensors reader and writer: results and errors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import write_json
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mlxdiff.errors import CheckpointError
from mlxdiff.machine.disk import sha256
from mlxdiff.weights.tensors import (
    LazyTensor,
    TensorFile,
    cast,
    open_weights,
    shard_files,
    write_safetensors,
)


def file_of(path: Path, header: Any, data: bytes = b"") -> Path:
    """Make a file with this header (a JSON value, or raw bytes)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def lazy(array: np.ndarray) -> LazyTensor:
    names = {"float64": "F64", "float32": "F32", "float16": "F16"}
    return LazyTensor(array.shape, names[array.dtype.name], lambda: array)


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "dtype", "f8 f4 f2 i8 i4 i2 i1 u8 u4 u2 u1 bool".split(), ids=lambda d: np.dtype(d).name
)
def test_reads_what_safetensors_writes(tmp_path: Path, dtype: str) -> None:
    arrays = {
        "matrix": (np.random.default_rng(0).standard_normal((3, 5)) * 9).astype(dtype),
        "scalar": np.ones((), dtype),
        "empty": np.ones((0, 4), dtype),
    }
    save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        tensor = file.tensors[name]
        assert tensor.shape == array.shape and tensor.nbytes == array.nbytes
        assert tensor.read().dtype == array.dtype
        np.testing.assert_array_equal(tensor.read(), array)


def test_reads_every_bfloat16_exactly(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype="<u2")
    file_of(tmp_path / "x", {"w": entry("BF16", [65536], 0, 131072)}, bits.tobytes())
    read = TensorFile(tmp_path / "x").tensors["w"].read()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read.view(np.uint32), bits.astype(np.uint32) << 16)


def test_reading_maps_the_file_instead_of_copying_it(tmp_path: Path) -> None:
    save_file({"w": np.ones((64, 64), np.float32)}, tmp_path / "x")
    values = TensorFile(tmp_path / "x").tensors["w"].read()
    assert not values.flags.owndata and not values.flags.writeable


def test_data_need_not_be_aligned(tmp_path: Path) -> None:
    want = np.arange(5, dtype="<f4")
    header = {"a": entry("U8", [1], 0, 1), "w": entry("F32", [5], 1, 21)}
    file_of(tmp_path / "x", header, b"\1" + want.tobytes())
    np.testing.assert_array_equal(TensorFile(tmp_path / "x").tensors["w"].read(), want)


GOOD = {"w": entry("F32", [2], 0, 8)}
FAULTS: dict[str, tuple[Any, bytes, str]] = {
    "truncated": (GOOD, b"1234", "truncated"),
    "trailing": (GOOD, b"12345678--", "2 bytes at the end"),
    "no JSON": (b"{'w': 1}", b"", "not a safetensors file"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not a safetensors file"),
    "deep": (b"[" * 100_000, b"", "not a safetensors file"),
    "huge number": (b'{"w": 1' + b"0" * 9000 + b"}", b"", "not a safetensors file"),
    "a list": ([1], b"", "not a JSON object"),
    "duplicate": (b'{"w": 1, "w": 2}', b"", "'w' occurs twice"),
    "control characters": ({"a\n\x1b[2J": entry("F4", [2], 0, 8)}, b"12345678", r"'a\n\x1b[2J'"),
    "long name": ({"w" * 2000: GOOD["w"]}, b"12345678", "name has 2000 characters"),
    "no entry": ({"w": 3}, b"", "'w'"),
    "extra key": ({"w": GOOD["w"] | {"more": 1}}, b"12345678", "'w'"),
    "unknown type": ({"w": entry("F4", [2], 0, 8)}, b"12345678", "'F4'"),
    "type no string": ({"w": entry([], [2], 0, 8)}, b"12345678", "'w'"),  # type: ignore[arg-type]
    "negative size": ({"w": entry("F32", [-2], 0, 8)}, b"12345678", "shape [-2]"),
    "fractional": ({"w": entry("F32", [2.0], 0, 8)}, b"12345678", "shape [2.0]"),  # type: ignore[list-item]
    "boolean size": ({"w": entry("F32", [True], 0, 4)}, b"1234", "shape [True]"),
    "huge size": ({"w": entry("F32", [2**62, 2**62], 0, 8)}, b"12345678", "needs"),
    "backwards": ({"w": entry("F32", [2], 8, 0)}, b"12345678", "has -8 bytes"),
    "beyond the file": ({"w": entry("F32", [2], 2**61, 2**61 + 8)}, b"12345678", "gap"),
    "too few bytes": ({"w": entry("F32", [2], 0, 4)}, b"1234", "has 4 bytes"),
    "overlap": (GOOD | {"v": entry("F32", [2], 4, 12)}, b"123456789012", "overlaps"),
    "gap": (GOOD | {"v": entry("F32", [1], 12, 16)}, b"1234567890123456", "gap"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
}


@pytest.mark.parametrize("header, data, says", FAULTS.values(), ids=FAULTS)
def test_refuses_a_faulty_header(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    path = file_of(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        TensorFile(path)
    message = str(caught.value)
    assert says in message and str(path) in message and "\n" not in message


NOT_SAFETENSORS = {
    "empty": (b"", "is empty"),
    "short": (b"\1\0", "truncated"),
    "length beyond the file": (b"\xff" * 20, "truncated"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "zip": (b"PK\3\4" + bytes(30), "pickle"),
    "gguf": (b"GGUF" + bytes(30), "GGUF"),
    "page": (b"<!DOCTYPE html><html>", "web page"),
}


@pytest.mark.parametrize("content, says", NOT_SAFETENSORS.values(), ids=NOT_SAFETENSORS)
def test_errors_name_the_kind_of_file(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        TensorFile(tmp_path / "x.safetensors")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        TensorFile(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TensorFile(tmp_path)


# Values of every eighth byte from 0 on; the formats are in Micikevicius et al. 2022.
E4M3 = [0, 2**-6, 2**-5, 2**-4, 2**-3, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256]
E5M2 = [0.0, *(2.0 ** (2 * i - 15) for i in range(1, 16))]


@pytest.mark.parametrize("kind, eighths", [("F8_E4M3", E4M3), ("F8_E5M2", E5M2)])
def test_8_bit_floats_are_read_exactly(tmp_path: Path, kind: str, eighths: list[float]) -> None:
    shown = bytes(range(0, 128, 8)) + bytes(range(128, 256, 8)) + b"\x01\x81"
    file_of(tmp_path / "x", {"w": entry(kind, [34], 0, 34)}, shown)
    values = TensorFile(tmp_path / "x").tensors["w"].read()
    least = 2.0**-9 if kind == "F8_E4M3" else 2.0**-16
    assert values.dtype == np.float32
    assert values.tolist() == [*eighths, *(-v for v in eighths), least, -least]


@pytest.mark.parity
def test_8_bit_floats_equal_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    every = np.arange(256, dtype=np.uint8)
    for kind, theirs in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        file_of(tmp_path / kind, {"w": entry(kind, [256], 0, 256)}, every.tobytes())
        want = torch.from_numpy(every.copy()).view(theirs).float().numpy()
        np.testing.assert_array_equal(TensorFile(tmp_path / kind).tensors["w"].read(), want)


def test_fuzzed_headers_raise_nothing_else(tmp_path: Path) -> None:
    """A randomly damaged file is still readable or raises a CheckpointError."""
    chance = random.Random(7)
    arrays = {f"layer.{i}.weight": np.ones((i + 1, 3), np.float16) for i in range(4)}
    save_file(arrays, tmp_path / "good", {"format": "pt"})
    good = (tmp_path / "good").read_bytes()
    bad = tmp_path / "bad"
    tokens = [b"-1", b"[", b"]", b"{", b"}", b'"', b",", b"null", b"1e999", b"true", b"9" * 30]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(800):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(data)) if chance.random() < 0.3 else chance.randrange(300)
            place = min(place, len(data) - 1)
            kind = chance.randrange(4)
            if kind == 0:
                data[place] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del data[place : place + chance.randint(1, 20)]
            elif kind == 2:
                token = chance.choice(tokens)
                data[place : place + len(token)] = token
            else:
                data[place:place] = chance.choice(tokens)
            data = data or bytearray(b"\0")
        bad.write_bytes(data)
        try:
            for tensor in TensorFile(bad).tensors.values():
                assert tensor.read().shape == tensor.shape
            outcomes["read"] += 1
        except CheckpointError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error)
    assert outcomes["refused"] > 300 and outcomes["read"] > 10


# ------------------------------------------------------------------------------------------- shards


def shards(folder: Path, weight_map: dict[str, Any], **files: dict[str, np.ndarray]) -> Path:
    for name, arrays in files.items():
        save_file(arrays, folder / f"{name}.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder / "model.safetensors.index.json"


ONE = np.ones(1, np.float32)


def test_shards_are_read_together(tmp_path: Path) -> None:
    places = {"x": "a.safetensors", "y": "b.safetensors"}
    index = shards(tmp_path, places, a={"x": ONE}, b={"y": ONE})
    assert set(open_weights(index)) == {"x", "y"}
    assert [p.name for p in shard_files(index)] == [
        "model.safetensors.index.json",
        "a.safetensors",
        "b.safetensors",
    ]


SHARD_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing shard": ({"x": "a.safetensors", "y": "c.safetensors"}, "c.safetensors is missing"),
    "not where it says": ({"x": "b.safetensors", "y": "b.safetensors"}, "'x' is not in b"),
    "not there at all": ({"x": "a.safetensors", "z": "a.safetensors"}, "'z' is not in a"),
    "outside the folder": ({"x": "../a.safetensors"}, "not a file name"),
    "absolute": ({"x": "/etc/passwd"}, "not a file name"),
    "no string": ({"x": 3}, "not a file name"),
    "no weights": ({"x": "a.txt"}, "not a weight file"),
    "empty": ({}, "no weight_map"),
}


@pytest.mark.parametrize("places, says", SHARD_FAULTS.values(), ids=SHARD_FAULTS)
def test_faulty_index(tmp_path: Path, places: dict[str, Any], says: str) -> None:
    index = shards(tmp_path, places, a={"x": ONE}, b={"y": ONE})
    with pytest.raises(CheckpointError, match=says):
        open_weights(index)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    places = {"x": "a.safetensors", "y": "b.safetensors"}
    index = shards(tmp_path, places, a={"x": ONE}, b={"x": ONE, "y": ONE})
    with pytest.raises(CheckpointError, match=r"'x' is in a.safetensors and in b.safetensors"):
        open_weights(index)


# ------------------------------------------------------------------------------------------ writing


def test_cast_to_bfloat16_rounds_to_the_nearest_even() -> None:
    bits = np.random.default_rng(1).integers(0, 0x7F000000, 20000, np.uint32)
    bits = np.concatenate([bits, (bits & 0xFFFF0000) | 0x8000])  # and ties
    values = bits.view(np.float32).astype(np.float64)
    low = (bits >> 16).astype(np.uint32)
    below, above = ((low + i) << 16 for i in (0, 1))
    down = values - below.view(np.float32)
    up = above.view(np.float32).astype(np.float64) - values
    want = np.where((up < down) | ((up == down) & (low % 2 == 1)), low + 1, low)
    np.testing.assert_array_equal(cast(bits.view(np.float32), "bfloat16", "w"), want)


def test_cast_keeps_values_in_range_and_refuses_others() -> None:
    edge = np.array([65504, -65504, 6e-8, 0], np.float32)
    assert cast(edge, "float16", "w").dtype == np.float16
    with pytest.raises(
        CheckpointError, match=r"w: values up to 65520 do not fit float16.*bfloat16"
    ):
        cast(np.array([1, -65520], np.float32), "float16", "w")
    with pytest.raises(CheckpointError, match="do not fit bfloat16; convert with float32"):
        cast(np.array([3.4e38], np.float32), "bfloat16", "w")
    with pytest.raises(CheckpointError, match="do not fit float32"):
        cast(np.array([1e39]), "float32", "w")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_readers_read_our_files(tmp_path: Path, dtype: str) -> None:
    source = np.random.default_rng(0).standard_normal((4, 3, 3, 5), np.float32)
    arrays = {"conv": source.transpose(0, 2, 1, 3), "empty": np.empty((0, 2), np.float32)}
    tensors = {name: lazy(array) for name, array in arrays.items()}
    digest = write_safetensors(tmp_path / "x", tensors, dtype)
    assert digest == sha256(tmp_path / "x")
    loaded = load_file(tmp_path / "x")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array.astype(dtype))
    with safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"format": "mlx"}
    assert list(TensorFile(tmp_path / "x").tensors) == list(arrays)
