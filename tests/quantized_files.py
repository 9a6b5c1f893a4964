"""Write small quantized checkpoints: scaled 8-bit floats, comfy-kitchen's forms, GGUF."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxdiff.weights.quantization import E4M3
from mlxdiff.weights.tensors import width_of

Raw = tuple[str, tuple[int, ...], bytes]
"""Type as safetensors names it, shape, bytes."""

NAMES = {"float16": "F16", "float32": "F32", "int8": "I8", "uint8": "U8", "int64": "I64"}
GGML = {"F32": 0, "F16": 1, "q4_0": 2, "q8_0": 8}


def raw(array: np.ndarray, kind: str | None = None) -> Raw:
    array = np.ascontiguousarray(array)
    return kind or NAMES[str(array.dtype)], array.shape, array.tobytes()


def text(content: Any) -> Raw:
    """A ``comfy_quant`` mark."""
    data = json.dumps(content).encode()
    return "U8", (len(data),), data


def write_safetensors(
    path: Path, tensors: Mapping[str, Raw], metadata: Mapping[str, str] | None = None
) -> Path:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        assert len(data) == int(np.prod(shape, dtype=np.int64)) * width_of(dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + len(data)],
        }
        end += len(data)
    head = json.dumps(header).encode()
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)
    return path


def e4m3(values: np.ndarray) -> np.ndarray:
    """Round to the nearest e4m3 number, by the table."""
    order = np.argsort(np.nan_to_num(E4M3, nan=1e9))[:254]
    table = E4M3[order]
    above = np.clip(np.searchsorted(table, values), 1, 253)
    nearer = np.where(values - table[above - 1] < table[above] - values, above - 1, above)
    return order[nearer].astype(np.uint8)


def scaled_fp8(array: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Return e4m3 codes and the scale of the tensor."""
    scale = np.float32(np.abs(array).max() / 448)
    return e4m3(array.astype(np.float32) / scale), scale


def int8_rows(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 integers and a scale for each row, with the axes of the weight."""
    axes = tuple(range(1, array.ndim))
    scale = np.abs(array.astype(np.float32)).max(axis=axes, keepdims=True) / np.float32(127)
    return np.rint(array / scale).astype(np.int8), scale.astype(np.float32)


def q8_0(array: np.ndarray) -> bytes:
    """Blocks of ggml's q8_0 for rows of a multiple of 32 values."""
    groups = array.astype(np.float32).reshape(-1, 32)
    scale = (np.abs(groups).max(axis=1) / 127).astype("<f2")
    step = np.where(scale == 0, 1, scale).astype(np.float32)
    codes = np.clip(np.rint(groups / step[:, None]), -127, 127).astype(np.int8)
    return np.concatenate([scale[:, None].view(np.uint8), codes.view(np.uint8)], 1).tobytes()


def q4_0(array: np.ndarray) -> bytes:
    """Blocks of ggml's q4_0: the value furthest from 0 becomes -8 times the scale."""
    groups = array.astype(np.float32).reshape(-1, 32)
    furthest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    scale = (furthest / -8).astype("<f2")
    step = np.where(scale == 0, 1, scale).astype(np.float32)
    codes = np.clip(np.rint(groups / step) + 8, 0, 15).astype(np.uint8)
    return np.concatenate([scale.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], 1).tobytes()


_BLOCKS = {"q8_0": q8_0, "q4_0": q4_0}


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    form: Callable[[str, np.ndarray], str] = lambda name, array: str(NAMES[str(array.dtype)]),
    metadata: Mapping[str, Any] | None = None,
    flatten: bool = False,
) -> Path:
    """Write a GGUF file.

    Args:
        form: name and values -> "F16", "F32", "q8_0" or "q4_0".
        metadata: texts and lists of integers.
        flatten: store a tensor whose rows do not fit blocks of 256 as ComfyUI-GGUF does.
    """
    entries: dict[str, Any] = dict(metadata or {})
    infos, blobs, place = [], [], 0
    for name, array in tensors.items():
        kind, shape = form(name, array), array.shape
        if flatten and array.ndim > 1 and array.size % 256 == 0 and shape[-1] % 256:
            entries[f"comfy.gguf.orig_shape.{name}"] = list(shape)
            array = array.reshape(-1, 256)
        if kind in _BLOCKS:
            data = _BLOCKS[kind](array)
        else:
            data = array.astype({"F16": "<f2", "F32": "<f4"}[kind]).tobytes()
        sides = array.shape[::-1]
        infos.append(
            _text(name)
            + struct.pack("<I", len(sides))
            + struct.pack(f"<{len(sides)}Q", *sides)
            + struct.pack("<IQ", GGML[kind], place)
        )
        blobs.append(data + bytes(-len(data) % 32))
        place += len(blobs[-1])
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries))
    for key, value in entries.items():
        head += _text(key)
        if isinstance(value, str):
            head += struct.pack("<I", 8) + _text(value)
        else:
            head += struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    head += b"".join(infos)
    path.write_bytes(head + bytes(-len(head) % 32) + b"".join(blobs))
    return path


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data
