"""Encode prompts with a model's text encoders, as conditioning for its U-Net.

The plain syntax reads the same layers as diffusers' pipelines; the a1111 syntax reads the same
layers as AUTOMATIC1111's web UI. See ``prompt``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mlxdiff.adapters.textual_inversion import TextualInversion, match
from mlxdiff.errors import UsageError, argument
from mlxdiff.store.folder import ModelSource
from mlxdiff.text import a1111
from mlxdiff.text.prompt import Chunk, Vocabulary, Word, emphasize
from mlxdiff.tokenizer import Tokenizer

logger = logging.getLogger("mlxdiff")


class Encoded(NamedTuple):
    """An encoded prompt: embeds (1, T, D); pooled (1, P), or None if the U-Net takes none."""

    embeds: np.ndarray
    pooled: np.ndarray | None

    def zeros(self) -> Encoded:
        """Return zeros of the same shapes."""
        pooled = None if self.pooled is None else np.zeros_like(self.pooled)
        return Encoded(np.zeros_like(self.embeds), pooled)


T = TypeVar("T")
Timeline = list[tuple[int, T]]
"""(last, value) in order; each value applies up to and including step ``last``, from 0."""


def merged(timelines: Sequence[Timeline[T]]) -> Timeline[tuple[T, ...]]:
    """Merge timelines into one of tuples; the last value of each one holds beyond its end."""

    def at(timeline: Timeline[T], step: int) -> T:
        return next((what for last, what in timeline if step <= last), timeline[-1][1])

    lasts = sorted({last for timeline in timelines for last, _ in timeline})
    return [(last, tuple(at(timeline, last) for timeline in timelines)) for last in lasts]


class TextEncoders:
    """Encode prompts with all text encoders of a model.

    Args:
        source: the opened model.
        component: returns a loaded network of the model by name.
        backend: the backend that computes.
        penultimate: if True (SDXL), read the layer before the last, without the final norm, and
            the pooled output of the last encoder.
    Attributes:
        names: names of the encoder components, in order.
        embeddings: textual inversions in use.
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
        self.embeddings: tuple[TextualInversion, ...] = ()
        self._words: dict[str, tuple[Word, ...]] = dict.fromkeys(self.names, ())
        self._vectors: dict[str, np.ndarray] = {}

    def set_embeddings(self, embeddings: Sequence[TextualInversion]) -> None:
        """Use these textual inversions; they replace all earlier ones.

        Raises: UsageError if one is made for another kind of model, or its word is already a
            token.
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
            self._vocabulary(name, words[name])  # refuses a word that is already a token
        self.embeddings, self._words, self._vectors = tuple(embeddings), words, vectors

    def unused(self, texts: Sequence[Sequence[str]], syntax: str) -> list[str]:
        """List the words of textual inversions that no text contains.

        Args:
            texts: the texts for each encoder.
            syntax: one of prompt.SYNTAXES.
        """
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
        """Raise UsageError if the encoders cannot skip this number of layers."""
        if clip_skip is None:
            return
        layers = min(self.source.config(name).num_hidden_layers for name in self.names)
        most = layers - 1 if self.penultimate else layers
        if not isinstance(clip_skip, int) or isinstance(clip_skip, bool):
            raise UsageError(
                f"{argument('clip_skip')} is {clip_skip!r}; expected a whole number, 0 to {most}"
            )
        if not 0 <= clip_skip <= most:
            raise UsageError(
                f"{argument('clip_skip')} is {clip_skip}; expected 0 to {most} for this model (0 "
                "skips nothing; A1111 counts from 1)"
            )

    def timeline(
        self, texts: Sequence[str], clip_skip: int | None, syntax: str, steps: int
    ) -> Timeline[Encoded]:
        """Encode a prompt for every step of a run.

        Args:
            texts: the prompt for each encoder, in the given syntax.
            clip_skip: number of layers to skip at the end of each encoder.
            syntax: one of prompt.SYNTAXES.
            steps: number of steps in the run.
        """
        if syntax == "plain":
            return [(steps, self.plain(texts, clip_skip))]
        edits = merged([a1111.edits(a1111.networks(text)[0], steps) for text in texts])
        encoded = self.a1111(list(zip(*(own for _, own in edits), strict=True)), clip_skip)
        return [(last, one) for (last, _), one in zip(edits, encoded, strict=True)]

    def plain(self, texts: Sequence[str], clip_skip: int | None = None) -> Encoded:
        """Encode a plain prompt, one text per encoder; cut text that does not fit and warn."""
        embeds: list[np.ndarray] = []
        pooled: np.ndarray | None = None
        for name, text in zip(self.names, texts, strict=False):
            vocabulary = self._vocabulary(name)
            chunk, cut = vocabulary.plain(text)
            if cut:
                logger.warning(
                    "the prompt is longer than %d tokens; this part is cut: %r (the a1111 syntax "
                    "accepts prompts of any length)",
                    len(chunk.ids),
                    cut,
                )
            _note_unknown_words(vocabulary.tokenizer, text)
            state, pooled = self._run(name, chunk, clip_skip)
            embeds.append(state)
        return Encoded(np.concatenate(embeds, axis=-1), pooled)

    def unpadded(self, text: str) -> Encoded:
        """Encode a plain text without padding: start, its tokens, end."""
        embeds: list[np.ndarray] = []
        pooled: np.ndarray | None = None
        for name in self.names:
            tokenizer = self._vocabulary(name).tokenizer
            inner = tokenizer.encode(text, pad=False)
            ids = (tokenizer.bos_token_id, *inner, tokenizer.eos_token_id)
            state, pooled = self._run(name, Chunk(ids, (1.0,) * len(ids)), None)
            embeds.append(state)
        return Encoded(np.concatenate(embeds, axis=-1), pooled)

    def token_ids(self, text: str) -> dict[str, tuple[int, ...]]:
        """Return the tokens of a plain text for each encoder, padded and cut, without a warning.

        Ids from the size of the vocabulary on stand for the vectors of textual inversions.
        """
        return {name: self._vocabulary(name).plain(text)[0].ids for name in self.names}

    def a1111(self, texts: Sequence[Sequence[str]], clip_skip: int | None = None) -> list[Encoded]:
        """Encode the texts of a prompt in A1111's syntax.

        Args:
            texts: for each encoder, the texts that prompt editing yields, in order; the same
                number for every encoder.
            clip_skip: number of layers to skip at the end of each encoder.
        Returns: one encoding per text, all of the same length.
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
                if not columns:  # the first chunk gives the pooled output of the whole text
                    pooled = [runs[chunk][1] for chunk in column]
                columns.append(emphasize([runs[chunk][0] for chunk in column], column))
            embeds.append([np.concatenate(row, axis=1) for row in zip(*columns, strict=True)])
        return [
            Encoded(np.concatenate(row, axis=-1), one)
            for row, one in zip(zip(*embeds, strict=True), pooled, strict=True)
        ]

    def lengthen(self, encoded: Encoded, tokens: int, clip_skip: int | None = None) -> Encoded:
        """Pad an encoded prompt to ``tokens`` tokens with chunks of the empty text."""
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
        """Encode one chunk: unweighted state (1, T, D) of the layer to read, pooled (1, P)."""
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
    """Warn about words outside a model's small vocabulary (the built-in model has one)."""
    unknown = dict.fromkeys(tokenizer.unknown_words(text))
    if not unknown:
        return
    logger.warning(
        "the model does not know %s; the picture will not follow the prompt there",
        ", ".join(map(repr, unknown)),
    )
    # The text is always the same, so that a handler can show it once.
    logger.warning(
        "this model knows only these words: %s. For anything else use a full model: %s, or "
        "another of `mlxdiff models --known`",
        ", ".join(tokenizer.known_words or ()),
        argument("model", "sd15"),
    )
