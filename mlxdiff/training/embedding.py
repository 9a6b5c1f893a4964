"""Train a word of one's own: textual inversion (Gal et al. 2022)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdiff.adapters.textual_inversion import TextualInversion
from mlxdiff.errors import UsageError
from mlxdiff.machine.temporary import temporary_file
from mlxdiff.run.additions.word_vectors import WordVectors
from mlxdiff.run.latent_model import LatentModel
from mlxdiff.training import folders, networks
from mlxdiff.training.data import Batch
from mlxdiff.weights.tensors import write_safetensors

_PARTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def first_vectors(
    model: LatentModel, start: str | None, count: int, seed: int
) -> dict[str, np.ndarray]:
    """Return what the word means before training: text encoder -> (count, D) float32.

    Args:
        start: words with a like meaning: their vectors, repeated. None: random vectors with mean
            and deviation of the vocabulary's.
        count: vectors of the word.
        seed: of the random vectors.
    Raises: UsageError if ``start`` is no text.
    """
    found: dict[str, np.ndarray] = {}
    for name in model.texts.names:
        tensors = model.source.tensors(name)
        (key,) = (k for k in tensors if k.endswith("token_embedding.weight"))
        table = np.asarray(tensors[key].read(), np.float32)
        if start is None:
            rng = np.random.default_rng((seed, len(found)))
            rows = table.mean(0) + table.std(0) * rng.standard_normal((count, table.shape[1]))
        else:
            tokenizer = model.source.tokenizer(name.replace("text_encoder", "tokenizer"))
            ids = tokenizer.encode(start, pad=False)
            if not ids:
                raise UsageError(f"init_word is {start!r}; expected a word of the model's language")
            rows = table[[ids[i % len(ids)] for i in range(count)]]
        found[name] = rows.astype(np.float32)
    return found


def with_word(model: LatentModel, word: str, vectors: Mapping[str, np.ndarray]) -> LatentModel:
    """Return the model with a word that stands for vectors.

    Raises: UsageError if the word is a token of the model already.
    """
    return model.with_additions(
        model.additions.replaced(WordVectors, [WordVectors(_inversion(word, vectors))])
    )


def check_captions(captions: Sequence[str], word: str) -> None:
    """Check that each caption has the word. Raises: UsageError that counts those without."""
    without = [caption for caption in captions if word not in caption]
    if without:
        raise UsageError(
            f"{len(without)} of {len(captions)} captions do not have the word {word!r} "
            f"({without[0]!r}, for example); write it into each, or leave captions out "
            f"and give one for all (--caption 'a picture of {word}')"
        )


class Embedding:
    """The task of training the vectors of a word; no network changes.

    Args:
        model: with the word (``with_word``).
        word: as prompts have it.
        vectors: what it means before training.
        form: diffusers: the tensor is named after the word; a1111: it is ``emb_params``, and the
            name of the file is the word. SDXL's ``clip_l`` and ``clip_g`` are the same in both.
    """

    kind = "embedding"

    def __init__(
        self, model: LatentModel, word: str, vectors: Mapping[str, np.ndarray], form: str
    ) -> None:
        self._source, self._word, self._form = model.source, word, form
        self._vectors = dict(vectors)
        self._unet = networks.load(model, "unet")
        self._encoders = {name: networks.load(model, name) for name in model.texts.names}

    def parameters(self) -> dict[str, mx.array]:
        """Return the vectors before training."""
        return {name: mx.array(rows) for name, rows in self._vectors.items()}

    def predict(
        self, parameters: Mapping[str, mx.array], batch: Batch, noisy: mx.array, timesteps: mx.array
    ) -> mx.array:
        """Read the captions with these vectors, then run the U-Net."""
        text = networks.encode(self._source, self._encoders, batch.tokens or {}, parameters)
        found: mx.array = self._unet(noisy, timesteps, **networks.conditions(batch, text))
        return found

    def save(
        self, parameters: Mapping[str, np.ndarray], path: Path, facts: Mapping[str, Any]
    ) -> list[Path]:
        """Write a file that mlxdiff, diffusers, A1111 and ComfyUI read."""
        place = path.with_name(f"{path.name}.safetensors")
        if len(parameters) > 1:
            named = {_PARTS[name]: rows for name, rows in parameters.items()}
        else:
            (rows,) = parameters.values()
            named = {self._word if self._form == "diffusers" else "emb_params": rows}
        told = {"format": "pt", "modelspec.title": self._word, **networks.strings(facts)}
        with temporary_file(place.parent) as (temporary, _):
            write_safetensors(temporary, folders.lazy(named), "float32", metadata=told)
            os.replace(temporary, place)
        return [place]

    def identity(self) -> dict[str, Any]:
        """Return what must not change when a run goes on."""
        shapes = {name: list(rows.shape) for name, rows in self._vectors.items()}
        return {"model": networks.digest(self._source), "word": self._word, "vectors": shapes}


def _inversion(word: str, vectors: Mapping[str, np.ndarray]) -> TextualInversion:
    parts = {_PARTS[name] if len(vectors) > 1 else "": rows for name, rows in vectors.items()}
    return TextualInversion(Path(word), word, (), parts, "")
