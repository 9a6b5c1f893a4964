"""Files in PyTorch's formats, put together byte by byte, sound and hostile; needs no torch.

Opcodes are those of pickletools. Nothing here is ever given to a real unpickler.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

import numpy as np

PROTO = b"\x80\x02"
MAGIC = PROTO + b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
PROTOCOL = PROTO + b"M\xe9\x03."
SYSTEM = PROTO + b"}."

# The pieces of a pickle: each leaves one value on the stack.


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(path: str) -> bytes:
    module, _, last = path.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def row(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def numbers(*values: int) -> bytes:
    return row(*map(number, values))


def call(path: str, *arguments: bytes) -> bytes:
    return name(path) + row(*arguments) + b"R"


def table(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key: str, count: int, kind: str = "torch.FloatStorage", *view: bytes) -> bytes:
    return row(text("storage"), name(kind), text(key), text("cpu"), number(count), *view) + b"Q"


def tensor(
    key: str,
    count: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    kind: str = "torch.FloatStorage",
) -> bytes:
    """Make a tensor over a storage of ``count`` values. Default strides: contiguous."""
    if strides is None:
        steps = [1]
        for size in reversed(shape[1:]):
            steps.insert(0, steps[0] * size)
        strides = tuple(steps[: len(shape)])
    place = storage(key, count, kind), number(offset), numbers(*shape), numbers(*strides)
    return call("torch._utils._rebuild_tensor_v2", *place, b"\x89", b"}")


def pickled(value: bytes) -> bytes:
    return PROTO + value + b"."


# The files.


def zipped(
    entries: Iterable[tuple[str, bytes]],
    *,
    method: int = 0,
    flags: int = 0,
    plain: int | None = None,
    header: int | None = None,
    zip64: bool = False,
    count: int | None = None,
) -> bytes:
    """Make a zip archive. The options change fields of its directory."""
    body, directory, entries = b"", b"", list(entries)
    for path, data in entries:
        raw = path.encode()
        at = len(body) if header is None else header
        size = len(data) if plain is None else plain
        sizes, extra = (len(data), size, at), b""
        if zip64:
            extra = struct.pack("<2H3Q", 1, 24, size, len(data), at)
            sizes = (0xFFFFFFFF,) * 3
        directory += b"PK\x01\x02" + struct.pack(
            "<6H3I5H2I", 45, 45, flags, method, 0, 0, 0, *sizes[:2], len(raw), len(extra), 0, 0, 0,
            0, sizes[2],
        )  # fmt: skip
        directory += raw + extra
        local = (20, flags, method, 0, 0, 0, len(data), len(data), len(raw), 0)
        body += b"PK\x03\x04" + struct.pack("<5H3I2H", *local) + raw + data
    number = len(entries) if count is None else count
    place = len(body), len(directory)
    end = b""
    if zip64:
        record = (44, 45, 45, 0, 0, number, number, place[1], place[0])
        end += b"PK\x06\x06" + struct.pack("<Q2H2I4Q", *record)
        end += b"PK\x06\x07" + struct.pack("<IQI", 0, sum(place), 1)
        number, place = 0xFFFF, (0xFFFFFFFF, 0xFFFFFFFF)
    end += b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, number, number, place[1], place[0], 0)
    return body + directory + end


def zip_file(value: bytes, storages: Mapping[str, bytes] | None = None, **how: object) -> bytes:
    """Make a file in the format of torch 1.6 and later. ``value``: opcodes of the saved value."""
    data = [(f"archive/data/{key}", content) for key, content in (storages or {}).items()]
    return zipped([("archive/data.pkl", pickled(value)), *data], **how)  # type: ignore[arg-type]


def stream_file(value: bytes, storages: Mapping[str, bytes] | None = None, width: int = 4) -> bytes:
    """Make a file in the format before torch 1.6."""
    storages = storages or {}
    keys = pickled(b"](" + b"".join(map(text, storages)) + b"e")
    data = [struct.pack("<q", len(raw) // width) + raw for raw in storages.values()]
    return MAGIC + PROTOCOL + SYSTEM + pickled(value) + keys + b"".join(data)


KINDS = {
    "float16": "torch.HalfStorage",
    "float32": "torch.FloatStorage",
    "float64": "torch.DoubleStorage",
    "int64": "torch.LongStorage",
}


def saved(
    arrays: Mapping[str, np.ndarray], wrap: str = "", stream: bool = False, first: bytes = b""
) -> bytes:
    """Make the file that torch.save writes for these tensors.

    ``wrap``: the key that the table stands under. ``first``: opcodes before all others.
    """
    storages = {str(n): array.tobytes() for n, array in enumerate(arrays.values())}
    value = table({
        name: tensor(str(n), array.size, array.shape, kind=KINDS[array.dtype.name])
        for n, (name, array) in enumerate(arrays.items())
    })  # fmt: skip
    if wrap:
        value = table({wrap: value, "when": call("datetime.datetime", number(7))})
    if not stream:
        return zip_file(first + value, storages)
    (width,) = {array.itemsize for array in arrays.values()}
    return stream_file(first + value, storages, width)
