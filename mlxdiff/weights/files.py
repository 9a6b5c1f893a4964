"""Open a file of weights in any container, with its quantized layers decoded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mlxdiff.errors import CheckpointError
from mlxdiff.machine.disk import SourceFile
from mlxdiff.weights import gguf
from mlxdiff.weights.gguf import GGUFFile
from mlxdiff.weights.pickles import PickleFile, open_tensors
from mlxdiff.weights.scaled import decode, foreign_form
from mlxdiff.weights.tensors import LazyTensor


@dataclass(frozen=True)
class WeightFile:
    """A file of weights, opened.

    Attributes:
        path: the file.
        container: "safetensors", "PyTorch's pickle" or "GGUF".
        tensors: name -> tensor. A quantized layer is one tensor with the shape of the layer.
        metadata: texts in its header.
        ignored: (name, reason) of what has no use.
        refused: name -> description of values that are not readable tensors, see PickleFile.
        notes: facts about the file, one line each.
    """

    path: Path
    container: str
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    ignored: tuple[tuple[str, str], ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_file(path: str | os.PathLike[str]) -> WeightFile:
    """Open a file in safetensors, PyTorch's format or GGUF. Its content decides, not its name.

    Raises: CheckpointError for a damaged file, and for a quantized form that only another program
        reads.
    """
    path = Path(path)
    file = GGUFFile(path) if _is_gguf(path) else open_tensors(path)
    if words := foreign_form(file.tensors):
        raise CheckpointError(f"{path}: holds {words}")
    container = "GGUF" if isinstance(file, GGUFFile) else "safetensors"
    metadata: dict[str, str] = {}
    ignored: tuple[tuple[str, str], ...] = ()
    refused: dict[str, str] = {}
    if isinstance(file, PickleFile):
        container, ignored, refused = "PyTorch's pickle", file.ignored, file.refused
    else:
        metadata = {k: v for k, v in file.metadata.items() if isinstance(v, str)}
    decoded = decode(path, file.tensors, metadata)
    ignored += tuple(decoded.ignored)
    return WeightFile(path, container, decoded.tensors, metadata, ignored, refused, decoded.notes)


def _is_gguf(path: Path) -> bool:
    """Return True for GGUF, by content; if unclear, by suffix."""
    try:
        file = SourceFile(path)
        head = bytes(file.read(0, min(9, file.size)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if head[8:9] == b"{" or head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return False
    return head.startswith(gguf.MAGIC) or path.suffix.lower() == ".gguf"
