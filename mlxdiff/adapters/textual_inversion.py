"""Textual inversion files: words with vectors of their own (Gal et al. 2022).

A file is opened once (``open_embedding``) and matched to a model (``match``): each text encoder
gets its vectors, and the words stand for them in both prompt syntaxes (``prompt.Word``).

Formats, as diffusers' loaders/textual_inversion.py and A1111's modules/textual_inversion read them:
one tensor under the word itself (diffusers), or under a name that says nothing; ``string_to_param``
beside ``name`` (A1111, and the original code, in a pickle); ``clip_l`` and ``clip_g`` (SDXL).
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
"""What diffusers calls them in a folder."""

NAMELESS = ("*", "emb_params", "embedding", "weight")
"""Names under which tools keep the tensor of a word that they do not tell."""

_SDXL = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x"}
_MOST = 75  # vectors: a chunk has no more tokens

Given: TypeAlias = "str | os.PathLike[str] | tuple[str | os.PathLike[str], str | None] | Embedding"
"""An embedding as people give it: path, (path, word), or one that is open."""


@dataclass(frozen=True)
class Embedding:
    """A word that stands for vectors.

    Attributes:
        path: its file.
        token: how it is written in a prompt.
        names: other ways to write it in A1111's syntax: the file's name.
        vectors: "clip_l" and "clip_g", or "" for a model with one text encoder -> (N, D) float32.
        sha256: of the file.
    """

    path: Path
    token: str
    names: tuple[str, ...]
    vectors: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    sha256: str = field(repr=False)

    @property
    def count(self) -> int:
        """How many vectors it has."""
        return max(len(rows) for rows in self.vectors.values())


def open_embedding(path: str | os.PathLike[str], token: str | None = None) -> Embedding:
    """Open a file of one word.

    Args:
        path: a file, or a folder with one.
        token: the word to write in a prompt; None: the one that the file tells, else its name.
    Raises: CheckpointError.
    """
    file = _find(Path(path))
    opened = open_tensors(file)
    tensors = opened.tensors
    if isinstance(opened, PickleFile) and opened.refused:
        name, what = next(iter(opened.refused.items()))
        raise CheckpointError(f"{file}: {name!r} in it is no tensor: it is {what}")
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
            f"{file}: is no textual inversion of one word: it holds {len(tensors)} tensors "
            f"({few}{', ...' if len(tensors) > 5 else ''}); expected one, or clip_l and clip_g"
        )
    if isinstance(opened, PickleFile):
        told = opened.texts.get("name") or told
    word = token or told or file.stem
    names = () if token or file.stem == word or file.name in FILES else (file.stem,)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Embedding(file, word, names, vectors, digest)


def _find(path: Path) -> Path:
    if path.is_dir():
        known = [path / name for name in FILES if (path / name).is_file()]
        there = known[:1] or [
            p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", *SUFFIXES)
        ]
        if len(there) != 1:
            raise CheckpointError(
                f"{path}: this folder holds {len(there)} files that may be a textual inversion; "
                "give the file itself"
            )
        return there[0]
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such textual inversion (expected a .safetensors, .pt or .bin file, and "
            "after a colon its word)"
        )
    return path


def _vectors(file: Path, name: str, tensor: LazyTensor) -> np.ndarray:
    """(N, D) of a tensor."""
    shape, dtype = tensor.shape, tensor.dtype
    if dtype not in READABLE or len(shape) not in (1, 2) or 0 in shape:
        raise CheckpointError(
            f"{file}: {name!r} is {dtype} of shape {list(shape)}; the vectors of a word are of "
            "shape [vectors, width]"
        )
    values = np.asarray(tensor.read(), np.float32).reshape(-1, shape[-1])
    if not all_finite(values):
        raise CheckpointError(f"{file}: {name!r} holds values that are NaN or infinite")
    if len(values) > _MOST:
        raise CheckpointError(
            f"{file}: {name!r} has {len(values)} vectors; a prompt has room for {_MOST}"
        )
    return values


def open_all(given: Iterable[Given]) -> tuple[Embedding, ...]:
    """Open what people give. Raises: CheckpointError; UsageError where two are the same word."""
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
                    f"{other.path} and {one.path} are both the word {one.token!r}; give one of "
                    "them another (--embedding PATH:WORD)"
                )
    return tuple(opened)


def match(embedding: Embedding, configs: Mapping[str, CLIPTextConfig]) -> dict[str, np.ndarray]:
    """The vectors for each text encoder of a model.

    Args:
        configs: text encoder -> its config.
    Returns: text encoder -> (N, D), for those that have any.
    Raises: UsageError where it was made for another kind of model.
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
            f"{embedding.path}: is made for {_made_for(embedding)}; this model takes "
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
