"""Read textual inversion files: learned vectors for a word (Gal et al. 2022).

Open a file once (``open_embedding``), then match it to a model (``match``): each text encoder gets
its vectors, and the word stands for them in both prompt syntaxes (``prompt.Word``).

Formats, as diffusers' loaders/textual_inversion.py and A1111's modules/textual_inversion read them:
one tensor named after the word (diffusers) or with a generic name; ``string_to_param`` beside
``name`` (A1111 and the original code, in a pickle); ``clip_l`` and ``clip_g`` (SDXL).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from mlxdiff.convert.checkpoint import all_finite
from mlxdiff.errors import CheckpointError, UsageError
from mlxdiff.networks.config import CLIPTextConfig
from mlxdiff.weights.pickles import SUFFIXES, PickleFile, open_tensors
from mlxdiff.weights.tensors import READABLE, LazyTensor

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""File names that diffusers uses in a folder."""

NAMELESS = ("*", "emb_params", "embedding", "weight")
"""Generic tensor names that do not give the word."""

_SDXL = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x"}
_MOST = 75  # maximum number of vectors: a chunk has 75 tokens

Given: TypeAlias = "str | os.PathLike[str] | tuple[str | os.PathLike[str], str | None] | Embedding"
"""A textual inversion as users give it: a path, (path, word), or an open one."""


@dataclass(frozen=True)
class Embedding:
    """A textual inversion: a word and its vectors.

    Attributes:
        path: the file.
        token: the word as written in a prompt.
        names: other spellings in A1111's syntax (the name of the file).
        vectors: "clip_l" and "clip_g", or "" for a model with one text encoder -> (N, D) float32.
        sha256: SHA-256 of the file.
    """

    path: Path
    token: str
    names: tuple[str, ...]
    vectors: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    sha256: str = field(repr=False)

    @property
    def count(self) -> int:
        """The number of vectors."""
        return max(len(rows) for rows in self.vectors.values())


def open_embedding(path: str | os.PathLike[str], token: str | None = None) -> Embedding:
    """Open a textual inversion file.

    Args:
        path: a file, or a folder that contains one.
        token: the word to write in a prompt; None takes the word in the file, or else the name of
            the file.
    Raises: CheckpointError.
    """
    file = _find(Path(path))
    opened = open_tensors(file)
    tensors = opened.tensors
    if isinstance(opened, PickleFile) and opened.refused:
        name, what = next(iter(opened.refused.items()))
        raise CheckpointError(f"{file}: its entry {name!r} is not a tensor: it is {what}")
    if set(tensors) <= set(_SDXL):
        told = None
        vectors = {name: _vectors(file, name, tensor) for name, tensor in tensors.items()}
    elif len(tensors) == 1:
        ((name, tensor),) = tensors.items()
        told = None if name in NAMELESS else name
        vectors = {"": _vectors(file, name, tensor)}
    else:
        few = ", ".join(map(repr, list(tensors)[:5]))
        raise CheckpointError(
            f"{file}: is not a textual inversion of one word: it holds {len(tensors)} tensors "
            f"({few}{', ...' if len(tensors) > 5 else ''}); expected one, or clip_l and clip_g"
        )
    if isinstance(opened, PickleFile):
        told = opened.texts.get("name") or told
    word = token or told or file.stem
    names = () if token or file.stem == word or file.name in FILES else (file.stem,)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Embedding(file, word, names, vectors, digest)


def _find(path: Path) -> Path:
    if os.path.isdir(path):
        known = [path / name for name in FILES if (path / name).is_file()]
        there = known[:1] or [
            p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", *SUFFIXES)
        ]
        if len(there) != 1:
            raise CheckpointError(
                f"{path}: this folder holds {len(there)} files that could be textual inversions; "
                "give the file itself"
            )
        return there[0]
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{path}: no such textual inversion; give a .safetensors, .pt or .bin file, "
            "optionally followed by a colon and the word"
        )
    return path


def _vectors(file: Path, name: str, tensor: LazyTensor) -> np.ndarray:
    """Read and check a tensor of vectors; return float32 (N, D)."""
    shape, dtype = tensor.shape, tensor.dtype
    if dtype not in READABLE or len(shape) not in (1, 2) or 0 in shape:
        raise CheckpointError(
            f"{file}: {name!r} is {dtype} of shape {list(shape)}; expected floating-point vectors "
            "of shape [vectors, width]"
        )
    values = np.asarray(tensor.read(), np.float32).reshape(-1, shape[-1])
    if not all_finite(values):
        raise CheckpointError(
            f"{file}: {name!r} holds values that are NaN or infinite; the file is damaged, or its "
            "training failed; use another file"
        )
    if len(values) > _MOST:
        raise CheckpointError(
            f"{file}: {name!r} has {len(values)} vectors; a prompt has room for {_MOST}"
        )
    return values


def open_all(given: Iterable[Given]) -> tuple[Embedding, ...]:
    """Open all given files. Raises: CheckpointError; UsageError if two have the same word."""
    opened = []
    for one in given:
        if isinstance(one, tuple):
            opened.append(open_embedding(*one))
        else:
            opened.append(one if isinstance(one, Embedding) else open_embedding(one))
    for i, one in enumerate(opened):
        for other in opened[:i]:
            if one.token == other.token:
                raise UsageError(
                    f"{other.path} and {one.path} have the same word {one.token!r}; give one of "
                    "them another word (--embedding PATH:WORD)"
                )
    return tuple(opened)


def match(embedding: Embedding, configs: Mapping[str, CLIPTextConfig]) -> dict[str, np.ndarray]:
    """Match a textual inversion to the text encoders of a model.

    Args:
        embedding: the textual inversion.
        configs: text encoder -> config.
    Returns: text encoder -> vectors (N, D), for each encoder that has vectors.
    Raises: UsageError if it was made for another kind of model.
    """
    if "" in embedding.vectors:
        found = {"text_encoder": embedding.vectors[""]} if len(configs) == 1 else {}
    else:
        found = {_SDXL[part]: rows for part, rows in embedding.vectors.items()}
        found = {name: rows for name, rows in found.items() if name in configs}
        if "text_encoder_2" not in configs:
            found = {}
    for name, rows in found.items():
        if name not in configs or rows.shape[1] != configs[name].hidden_size:
            found = {}
            break
    if not found:
        raise UsageError(
            f"{embedding.path}: was made for {_made_for(embedding)}; this model takes "
            + " and ".join(f"{name} {c.hidden_size}" for name, c in configs.items())
        )
    return found


def _made_for(embedding: Embedding) -> str:
    sizes = {part: rows.shape[1] for part, rows in embedding.vectors.items()}
    if "" not in sizes:
        return "SDXL (" + ", ".join(f"{part} {size}" for part, size in sizes.items()) + ")"
    width = sizes[""]
    family = _FAMILIES.get(width, "another model")
    return f"{family} (vectors of width {width}, for one text encoder)"
