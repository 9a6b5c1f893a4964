"""Read textual inversion files: learned vectors for a word (Gal et al. 2022).

Open a file once (``open_embedding``), then match it to a model (``match``): each text encoder gets
its vectors, and the word stands for them in both prompt syntaxes (``prompt.Word``).

Formats, as diffusers' loaders/textual_inversion.py and A1111's modules/textual_inversion read them:
one tensor named after the word (diffusers) or with a generic name; ``string_to_param`` beside
``name`` (A1111 and the original code, in a pickle, or in a text chunk of a PNG); ``clip_l`` and
``clip_g`` (SDXL). Files of several words: one tensor for each word, or inside a LoRA
(``bundle_emb.WORD.*``; cloneofsimo's, which marks words in the metadata).
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mlxdiff.convert import recognise
from mlxdiff.convert.checkpoint import all_finite
from mlxdiff.errors import CheckpointError, UsageError, argument
from mlxdiff.machine.disk import sha256
from mlxdiff.networks.config import CLIPTextConfig
from mlxdiff.pictures.image import open_picture
from mlxdiff.weights.pickles import SUFFIXES, PickleFile, open_tensors
from mlxdiff.weights.tensors import READABLE, LazyTensor, shown

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""File names that diffusers uses in a folder."""

NAMELESS = ("*", "emb_params", "embedding", "weight")
"""Generic tensor names that do not give the word."""

_PNG_KEY = "sd-ti-embedding"
_SDXL = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x"}
_MOST = 75  # maximum number of vectors: a chunk has 75 tokens

Given: TypeAlias = (
    "str | os.PathLike[str] | tuple[str | os.PathLike[str], str | None] | TextualInversion"
)
"""A textual inversion as users give it: a path, (path, word), or an open one."""


@dataclass(frozen=True)
class TextualInversion:
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


def open_embedding(path: str | os.PathLike[str], token: str | None = None) -> TextualInversion:
    """Open a textual inversion file.

    Args:
        path: a file, or a folder that contains one.
        token: the word to write in a prompt; None takes the word in the file, or else the name of
            the file. It chooses one of several words in the file.
    Raises: CheckpointError.
    """
    file = _find(Path(path))
    told, parts = _of_picture(file) if _is_png(file) else _of_weights(file, token)
    vectors = {part: _vectors(file, part or told or "*", tensor) for part, tensor in parts.items()}
    word = token or told or file.stem
    names = () if token or file.stem == word or file.name in FILES else (file.stem,)
    return TextualInversion(file, word, names, vectors, sha256(file))


Parts: TypeAlias = Mapping[str, LazyTensor]
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(?:string_to_param\.\*|emb_params|(clip_[lg]))")


def _of_weights(file: Path, token: str | None) -> tuple[str | None, Parts]:
    """Return the word that a weight file gives, and its tensors: "clip_l" and "clip_g", or ""."""
    words, tensors = _words(file)
    if token in words:
        return token, words[token]
    if len(words) == 1:
        return next(iter(words.items()))
    raise CheckpointError(f"{file}: {_not_one_word(tensors, [str(word) for word in words])}")


def _words(file: Path) -> tuple[dict[str | None, dict[str, LazyTensor]], Parts]:
    """Return the words in a weight file (None: it has one and does not name it), and all tensors.

    If nothing marks the words, every tensor counts as one.
    """
    opened = open_tensors(file)
    tensors = opened.tensors
    if isinstance(opened, PickleFile) and opened.refused:
        name, what = next(iter(opened.refused.items()))
        raise CheckpointError(f"{file}: its entry {name!r} is not a tensor: it is {what}")
    marks = {} if isinstance(opened, PickleFile) else opened.metadata
    words: dict[str | None, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if bundled := _BUNDLED.fullmatch(name):
            words.setdefault(bundled[1], {})[bundled[2] or ""] = tensor
        elif marks.get(name) == "<embed>":
            words[name] = {"": tensor}
    if words:
        return words, tensors
    said = opened.texts.get("name") if isinstance(opened, PickleFile) else None
    if set(tensors) <= set(_SDXL):
        return {said: dict(tensors)}, tensors
    if len(tensors) == 1:
        ((name, tensor),) = tensors.items()
        return {said or (None if name in NAMELESS else name): {"": tensor}}, tensors
    return {name: {"": tensor} for name, tensor in tensors.items()}, tensors


def _not_one_word(tensors: Parts, words: Sequence[str]) -> str:
    few = ", ".join(repr(shown(word)) for word in words[:5])
    few += ", ..." if len(words) > 5 else ""
    inside = len(words) < len(tensors)  # of a LoRA
    if not inside and not recognise.is_unknown(tensors):
        return (
            f"{recognise.refusal(tensors)}; expected a textual inversion: one tensor, or clip_l "
            "and clip_g"
        )
    return (
        f"is not a textual inversion of one word: it holds {len(words)} tensors that could be one "
        f"({few}); choose with {_with_word()}"
    )


def _with_word() -> str:
    return argument("embeddings", form="PATH:WORD")


def _is_png(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(8) == b"\x89PNG\r\n\x1a\n"


def _of_picture(file: Path) -> tuple[str | None, Parts]:
    """Return the word and the vectors in a PNG of A1111: base64 of JSON, in a text chunk."""
    with open_picture(file) as picture:
        text = picture.info.get(_PNG_KEY)
    if not isinstance(text, str):
        raise CheckpointError(
            f"{file}: this picture has no text chunk {_PNG_KEY}, so no textual inversion that "
            "mlxdiff reads; give the .pt or .safetensors file of it"
        )
    try:
        data = json.loads(base64.b64decode(text, validate=True))
        (rows,) = data["string_to_param"].values()
        values = np.asarray(rows["TORCHTENSOR"], np.float32)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{file}: its text chunk {_PNG_KEY} is malformed; give the .pt or .safetensors file"
        ) from None
    name = data.get("name")
    word = name if isinstance(name, str) else None
    return word, {"": LazyTensor(values.shape, "F32", lambda: values)}


def is_embedding(path: str | os.PathLike[str]) -> bool:
    """Return True if a file or folder holds textual inversions and nothing else."""
    try:
        file = _find(Path(path))
        if _is_png(file):
            with open_picture(file) as picture:
                return _PNG_KEY in picture.info
        tensors = open_tensors(file).tensors
    except (CheckpointError, UsageError):
        return False
    known = set(tensors) <= {*_SDXL, *NAMELESS} or all(
        re.fullmatch(r"<[^<>]+>", name) for name in tensors
    )
    few = all(len(t.shape) in (1, 2) and t.size < 2**20 for t in tensors.values())
    alone = (
        len(tensors) == 1 and recognise.is_unknown(tensors) and not any("." in n for n in tensors)
    )
    return few and (known or alone)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a textual inversion in plain JSON values, for `mlxdiff info`.

    Raises: the errors of ``open_embedding``.
    """
    file = _find(Path(path))
    words = [] if _is_png(file) else [str(word) for word in _words(file)[0]]
    if len(words) > 1:
        return {
            "kind": "textual inversions",
            "path": str(file),
            "use": f"give it with {_with_word()}, and write the word in the prompt",
            "words": words,
        }
    one, given = open_embedding(file), argument("embeddings", form="PATH")
    return {
        "kind": "textual inversion",
        "path": str(one.path),
        "use": f"give it with {given}, and write {one.token!r} in the prompt",
        "word": one.token,
        "word_in_a1111_syntax": list(one.names),
        "vectors": one.count,
        "made_for": _made_for(one),
        "sha256": one.sha256,
    }


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


def open_all(given: Iterable[Given]) -> tuple[TextualInversion, ...]:
    """Open all given files. Raises: CheckpointError; UsageError if two have the same word."""
    opened = []
    for one in given:
        if isinstance(one, tuple):
            opened.append(open_embedding(*one))
        else:
            opened.append(one if isinstance(one, TextualInversion) else open_embedding(one))
    for i, one in enumerate(opened):
        for other in opened[:i]:
            if one.token == other.token:
                raise UsageError(
                    f"{other.path} and {one.path} have the same word {one.token!r}; give one of "
                    f"them another word ({_with_word()})"
                )
    return tuple(opened)


def match(
    embedding: TextualInversion, configs: Mapping[str, CLIPTextConfig]
) -> dict[str, np.ndarray]:
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


def _made_for(embedding: TextualInversion) -> str:
    sizes = {part: rows.shape[1] for part, rows in embedding.vectors.items()}
    if "" not in sizes:
        return "SDXL (" + ", ".join(f"{part} {size}" for part, size in sizes.items()) + ")"
    width = sizes[""]
    family = _FAMILIES.get(width, "another model")
    return f"{family} (vectors of width {width}, for one text encoder)"
