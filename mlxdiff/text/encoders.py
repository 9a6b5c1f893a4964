"""The text encoders of a model: prompts -> what its U-Net is told.

Which layer is read, and how much of it, is what diffusers' pipelines do (plain syntax) or
AUTOMATIC1111's web UI does (a1111); see ``prompt``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mlxdiff.adapters.textual_inversion import Embedding, match
from mlxdiff.errors import UsageError
from mlxdiff.store.folder import ModelSource
from mlxdiff.text import a1111
from mlxdiff.text.prompt import Chunk, Vocabulary, Word, emphasize
from mlxdiff.tokenizer import Tokenizer

logger = logging.getLogger("mlxdiff")


class Encoded(NamedTuple):
    """A prompt, encoded: embeds (1, T, D) and pooled (1, P), or None where the U-Net takes none."""

    embeds: np.ndarray
    pooled: np.ndarray | None

    def zeros(self) -> Encoded:
        """Zeros of the same shapes."""
        pooled = None if self.pooled is None else np.zeros_like(self.pooled)
        return Encoded(np.zeros_like(self.embeds), pooled)


T = TypeVar("T")
Timeline = list[tuple[int, T]]
"""(last, what) in order: it counts for every step, from 0, up to and with ``last``."""


def merged(timelines: Sequence[Timeline[T]]) -> Timeline[tuple[T, ...]]:
    """What several timelines say together. Each of them counts to its end and beyond."""

    def at(timeline: Timeline[T], step: int) -> T:
        return next((what for last, what in timeline if step <= last), timeline[-1][1])

    lasts = sorted({last for timeline in timelines for last, _ in timeline})
    return [(last, tuple(at(timeline, last) for timeline in timelines)) for last in lasts]


class TextEncoders:
    """The text encoders of a model.

    Args:
        source: the opened model.
        component: gives a network of it, loaded.
        backend: what it computes on.
        penultimate: whether the layer before the last is read, without the final norm, and the
            pooled output of the last encoder (SDXL).
    Attributes:
        names: of the encoders' components, in order.
        embeddings: words with vectors of their own.
    """

    def __init__(
        self,
        source: ModelSource,
        component: Callable[[str], Any],
        backend: Any,
        penultimate: bool,
    ) -> None:
        self.source, self.component, self.backend = source, component, backend
        self.penultimate = penultimate
        self.names = tuple(c for c in source.components if c.startswith("text_encoder"))
        self.embeddings: tuple[Embedding, ...] = ()
        self._words: dict[str, tuple[Word, ...]] = dict.fromkeys(self.names, ())
        self._vectors: dict[str, np.ndarray] = {}

    def set_embeddings(self, embeddings: Sequence[Embedding]) -> None:
        """Let these words, and no others, stand for vectors of their own.

        Raises: UsageError where one is made for another kind of model, or is a token already.
        """
        configs = {name: self.source.config(name) for name in self.names}
        matched = [match(one, configs) for one in embeddings]
        words: dict[str, tuple[Word, ...]] = {}
        vectors: dict[str, np.ndarray] = {}
        for name in self.names:
            own = [
                (e, found[name])
                for e, found in zip(embeddings, matched, strict=True)
                if name in found
            ]
            firsts = np.cumsum([0, *(len(rows) for _, rows in own)]).tolist()
            words[name] = tuple(
                Word(e.token, e.names, first, len(rows))
                for (e, rows), first in zip(own, firsts, strict=False)
            )
            if own:
                vectors[name] = np.concatenate([rows for _, rows in own])
            self._vocabulary(name, words[name])  # refuses what is a token already
        self.embeddings, self._words, self._vectors = tuple(embeddings), words, vectors

    def unused(self, texts: Sequence[Sequence[str]], syntax: str) -> list[str]:
        """Words with vectors that stand in none of the texts, which are given for each encoder."""
        if not self.embeddings:
            return []
        missing = [
            self._vocabulary(name).missing(own, syntax)
            for name, own in zip(self.names, texts, strict=False)
        ]
        lacks = [
            set(absent)
            | ({e.token for e in self.embeddings} - {w.token for w in self._words[name]})
            for name, absent in zip(self.names, missing, strict=True)
        ]
        return [e.token for e in self.embeddings if all(e.token in absent for absent in lacks)]

    def check_clip_skip(self, clip_skip: int | None) -> None:
        """Raise UsageError unless so many layers can be skipped."""
        if clip_skip is None:
            return
        layers = min(self.source.config(name).num_hidden_layers for name in self.names)
        most = layers - 1 if self.penultimate else layers
        if not isinstance(clip_skip, int) or isinstance(clip_skip, bool):
            raise UsageError(f"clip_skip is {clip_skip!r}; expected a whole number, 0 to {most}")
        if not 0 <= clip_skip <= most:
            raise UsageError(
                f"clip_skip is {clip_skip}; expected 0 to {most} for this model (0 skips nothing; "
                "A1111 counts from 1)"
            )

    def timeline(
        self, texts: Sequence[str], clip_skip: int | None, syntax: str, steps: int
    ) -> Timeline[Encoded]:
        """All that a prompt, given once for each encoder, is in the course of a run.

        Args:
            texts: in the given syntax.
            clip_skip: layers left out at the encoders' end.
            syntax: one of prompt.SYNTAXES.
            steps: of the run.
        """
        if syntax == "plain":
            return [(steps, self.plain(texts, clip_skip))]
        edits = merged([a1111.edits(a1111.networks(text)[0], steps) for text in texts])
        encoded = self.a1111(list(zip(*(own for _, own in edits), strict=True)), clip_skip)
        return [(last, one) for (last, _), one in zip(edits, encoded, strict=True)]

    def plain(self, texts: Sequence[str], clip_skip: int | None = None) -> Encoded:
        """A plain prompt, given once for each encoder; what does not fit is cut, with a warning."""
        embeds: list[np.ndarray] = []
        pooled: np.ndarray | None = None
        for name, text in zip(self.names, texts, strict=False):
            vocabulary = self._vocabulary(name)
            chunk, cut = vocabulary.plain(text)
            if cut:
                logger.warning(
                    "the prompt is longer than %d tokens; this part is cut: %r (the a1111 syntax "
                    "takes prompts of any length)",
                    len(chunk.ids),
                    cut,
                )
            _note_unknown_words(vocabulary.tokenizer, text)
            state, pooled = self._run(name, chunk, clip_skip)
            embeds.append(state)
        return Encoded(np.concatenate(embeds, axis=-1), pooled)

    def a1111(self, texts: Sequence[Sequence[str]], clip_skip: int | None = None) -> list[Encoded]:
        """A prompt in A1111's syntax.

        Args:
            texts: for each encoder: what the prompt is, one text after another (prompt editing);
                each encoder has as many.
        Returns: one for each of these, all of the same length.
        """
        vocabularies = [self._vocabulary(name) for name in self.names]
        for vocabulary, own in zip(vocabularies, texts, strict=False):
            for text in own:
                words = " ".join(piece.text or "" for piece in a1111.weigh(text))
                _note_unknown_words(vocabulary.tokenizer, words)
        chunks = [
            [vocabulary.a1111(text) for text in own]
            for vocabulary, own in zip(vocabularies, texts, strict=False)
        ]
        length = max(len(one) for own in chunks for one in own)
        embeds: list[list[np.ndarray]] = []
        pooled: list[np.ndarray | None] = []
        for name, vocabulary, split in zip(self.names, vocabularies, chunks, strict=True):
            padded = [one + [vocabulary.empty()] * (length - len(one)) for one in split]
            columns: list[list[np.ndarray]] = []
            for column in zip(*padded, strict=True):
                runs = {chunk: self._run(name, chunk, clip_skip) for chunk in column}
                if not columns:  # the first chunk of a text is what it is as a whole
                    pooled = [runs[chunk][1] for chunk in column]
                columns.append(emphasize([runs[chunk][0] for chunk in column], column))
            embeds.append([np.concatenate(row, axis=1) for row in zip(*columns, strict=True)])
        return [
            Encoded(np.concatenate(row, axis=-1), one)
            for row, one in zip(zip(*embeds, strict=True), pooled, strict=True)
        ]

    def lengthen(self, encoded: Encoded, tokens: int, clip_skip: int | None = None) -> Encoded:
        """The same prompt, with chunks of the empty text after it."""
        missing = (tokens - encoded.embeds.shape[1]) // self._vocabulary(self.names[0]).length
        if missing <= 0:
            return encoded
        states = [
            self._run(name, self._vocabulary(name).empty(), clip_skip)[0] for name in self.names
        ]
        empty = np.concatenate(states, axis=-1)
        return encoded._replace(embeds=np.concatenate([encoded.embeds, *[empty] * missing], axis=1))

    def _vocabulary(self, name: str, words: tuple[Word, ...] | None = None) -> Vocabulary:
        tokenizer = self.source.tokenizer(name.replace("text_encoder", "tokenizer"))
        size = self.source.config(name).vocab_size
        return Vocabulary(tokenizer, size, self._words[name] if words is None else words)

    def _run(
        self, name: str, chunk: Chunk, clip_skip: int | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """State (1, T, D) of a chunk at the layer that is read, unweighted; pooled (1, P)."""
        ids = self.backend.asarray(np.array([chunk.ids], np.int32))
        vectors = self._vectors.get(name)
        encoder = self.component(name)
        out = encoder(ids, None if vectors is None else self.backend.asarray(vectors))
        skip = clip_skip or 0
        if self.penultimate:
            state = out.hidden_states[-2 - skip]
        elif skip:
            state = encoder.text_model.final_layer_norm(out.hidden_states[-1 - skip])
        else:
            state = out.last_hidden_state
        pooled = out.text_embeds if self.penultimate else None
        return (
            self.backend.to_numpy(state),
            None if pooled is None else self.backend.to_numpy(pooled),
        )


def _note_unknown_words(tokenizer: Tokenizer, text: str) -> None:
    """Warn of words that a model of a small world (the built-in one) was never taught."""
    unknown = dict.fromkeys(tokenizer.unknown_words(text))
    if not unknown:
        return
    logger.warning(
        "the model does not know %s: the picture will hardly follow the prompt there",
        ", ".join(map(repr, unknown)),
    )
    # The same text each time: whoever shows notes can show it once.
    logger.warning(
        "this model knows only these words: %s. For anything else take a real model: "
        '-m sd15 on the command line, load("sd15") in Python, or another of '
        "`mlxdiff models --known`",
        ", ".join(tokenizer.known_words or ()),
    )
