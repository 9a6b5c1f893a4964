"""A judge: CLIP compares pictures with texts, and with each other (Radford et al. 2021).

A score is what transformers calls ``logits_per_image``: the cosine of picture and text, times the
model's own scale (100 in OpenAI's models).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mlxdiff.convert.clip import Clip
from mlxdiff.errors import MlxdiffError, UsageError, argument
from mlxdiff.pictures.image import ImageLike, load_image, to_clip

logger = logging.getLogger("mlxdiff")

TEMPLATE = "a picture of {}"
"""What a label is put into: CLIP was trained on captions."""
SAME = 0.97
"""Cosine from which two pictures count as near duplicates."""
BATCH = 16


class Judge:
    """Compares pictures with texts, and with each other.

    Args:
        clip: the model.
        backend: what computes.
        load: returns an encoder, loaded: "judge_text" or "judge_image".
    """

    def __init__(self, clip: Clip, backend: Any, load: Callable[[str], Any]) -> None:
        self.clip, self.backend, self._load = clip, backend, load

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return a vector of length 1 for each text: (N, P) float32. Long texts are cut."""
        if not texts:
            raise UsageError("there is no text to compare with")
        for text in texts:
            if cut := self.clip.tokenizer.truncated(text):
                logger.warning("a text is too long for the judge; this part is cut: %r", cut)
        encoder = self._load("judge_text")

        def encode(some: Sequence[str]) -> Any:
            ids = np.array([self.clip.tokenizer.encode(text) for text in some], np.int32)
            return encoder(self.backend.asarray(ids)).text_embeds

        return self._vectors(list(texts), encode)

    def of_pictures(self, pictures: Iterable[ImageLike]) -> np.ndarray:
        """Return a vector of length 1 for each picture: (N, P) float32."""
        sources = list(pictures)
        if not sources:
            raise UsageError("there is no picture to judge")
        encoder = self._load("judge_image")
        config, (mean, std) = self.clip.image.config, (self.clip.mean, self.clip.std)

        def encode(some: Sequence[ImageLike]) -> Any:
            rows = [to_clip(load_image(one), config.image_size, mean, std) for one in some]
            return encoder(self.backend.asarray(np.concatenate(rows))).image_embeds

        return self._vectors(sources, encode)

    def _vectors(self, sources: list[Any], encode: Callable[[Any], Any]) -> np.ndarray:
        rows = [
            self.backend.to_numpy(encode(sources[i : i + BATCH]))
            for i in range(0, len(sources), BATCH)
        ]
        vectors = np.concatenate(rows)
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        if not np.isfinite(vectors).all() or not lengths.all():
            raise MlxdiffError(
                "the judge gives values that are not finite: its weights are damaged, or the "
                f"computation overflowed; use {argument('dtype', 'float32')}"
            )
        unit: np.ndarray = vectors / lengths
        return unit

    def scores(self, pictures: Iterable[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """Score each picture for each text.

        Returns: float32 (pictures, texts), transformers' ``logits_per_image``.
        Raises: UsageError.
        """
        words = self.of_texts(texts)
        scored: np.ndarray = np.float32(self.clip.scale) * (self.of_pictures(pictures) @ words.T)
        return scored

    def labels(
        self, pictures: Iterable[ImageLike], labels: Sequence[str], template: str = TEMPLATE
    ) -> np.ndarray:
        """Say how probable each label is for each picture, if one of them is right.

        Args:
            labels: at least two.
            template: text with {}, where the label is put.
        Returns: float32 (pictures, labels); each row sums to 1.
        Raises: UsageError.
        """
        if "{}" not in template:
            raise UsageError(f"template is {template!r}; expected a text with {{}} for the label")
        if len(labels) < 2:
            raise UsageError("one label is always right; give at least two")
        logits = self.scores(pictures, [template.replace("{}", label) for label in labels])
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = raised / raised.sum(axis=1, keepdims=True)
        return shares

    def similarities(self, pictures: Iterable[ImageLike]) -> np.ndarray:
        """Return the cosines of all pairs of pictures: float32 (N, N)."""
        vectors = self.of_pictures(pictures)
        cosines: np.ndarray = vectors @ vectors.T
        return cosines


def groups(cosines: np.ndarray, threshold: float = SAME) -> list[list[int]]:
    """Group near duplicates: pictures that are linked by pairs above the threshold.

    Args:
        cosines: (N, N), of all pairs.
    Returns: groups of at least two, each in order; the largest first.
    """
    count = len(cosines)
    label = list(range(count))
    for i in range(count):
        for j in range(i + 1, count):
            if cosines[i, j] >= threshold:
                old, new = label[j], label[i]
                label = [new if one == old else one for one in label]
    found = [[i for i in range(count) if label[i] == first] for first in dict.fromkeys(label)]
    return sorted((one for one in found if len(one) > 1), key=lambda one: (-len(one), one[0]))
