"""Split prompts into token chunks, with weights and textual inversions.

``plain`` follows diffusers: one chunk; text that does not fit is cut. ``a1111`` follows
AUTOMATIC1111's web UI: each token has a weight, and a long text fills several chunks of 75 tokens,
each with its own start and end token.

Ids below 0 or beyond the vocabulary stand for vectors of textual inversions: both
``vocab_size + k`` and ``-1 - k`` mean row ``k``. They differ under CLIP's older rule, which takes
the largest id as the end of the text. Each syntax uses the form that matches its reference tool.

Source: diffusers loaders/textual_inversion.py (maybe_convert_prompt); stable-diffusion-webui
modules/sd_hijack_clip.py (tokenize_line) and modules/sd_emphasis.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlxdiff.text import a1111
from mlxdiff.tokenizer import Tokenizer

SYNTAXES = ("plain", "a1111")
BACKTRACK = 20
"""Maximum number of tokens after a comma that move to the next chunk; A1111's default."""


class Word(NamedTuple):
    """A word that stands for vectors of a textual inversion.

    Attributes:
        token: the word as written in a prompt.
        names: other spellings, in A1111's syntax.
        first: index of its first row among all added vectors of the text encoder.
        size: number of rows.
    """

    token: str
    names: tuple[str, ...]
    first: int
    size: int


class Chunk(NamedTuple):
    """The input of one text encoder call: ids and weights, with start, end and padding."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


# -------------------------------------------------------------------------------------------- plain


class Vocabulary:
    """Tokenize prompts for one text encoder, with added words.

    Args:
        tokenizer: tokenizer of the encoder.
        vocab_size: number of rows in the encoder's token embedding.
        words: added words that stand for vectors.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, words: Sequence[Word] = ()) -> None:
        self.tokenizer, self.words, self.vocab_size = tokenizer, tuple(words), vocab_size
        self.length = tokenizer.model_max_length
        # diffusers registers a word of several vectors as "word word_1 word_2 ...".
        self._spelled = {
            word.token: [word.token, *(f"{word.token}_{i}" for i in range(1, word.size))]
            for word in words
        }
        names = [name for spelled in self._spelled.values() for name in spelled]
        self._extended = tokenizer.with_tokens(names) if names else tokenizer
        rows = [word.first + i for word in words for i in range(word.size)]
        self._ids = {
            self._extended.token_id(name): vocab_size + row
            for name, row in zip(names, rows, strict=True)
        }
        # A1111 searches for the tokens of each word's names, longest first.
        found = [
            (tuple(tokenizer.encode(name, pad=False)), word)
            for word in words
            for name in dict.fromkeys((word.token, *word.names))
        ]
        self._sequences = sorted(found, key=lambda pair: -len(pair[0]))

    def plain(self, text: str) -> tuple[Chunk, str]:
        """Tokenize plain text; return one chunk and the part of the text that was cut off."""
        spelled = self._spell(text)
        ids = self._extended.encode(spelled)
        mapped = tuple(self._ids.get(i, i) for i in ids)
        return Chunk(mapped, (1.0,) * len(mapped)), self._extended.truncated(spelled)

    def _spell(self, text: str) -> str:
        """Write out words of several vectors as ``word word_1 ...``."""
        found = set(self._extended.encode(text, pad=False)) if self.words else set()
        for token, spelled in self._spelled.items():
            if len(spelled) > 1 and self._extended.token_id(token) in found:
                text = text.replace(token, " ".join(spelled))
        return text

    def a1111(self, text: str) -> list[Chunk]:
        """Tokenize text in A1111's syntax into chunks; ``a1111.networks`` has removed the tags."""
        chunks = _Chunks(self)
        for piece in a1111.weigh(text):
            if piece.text is None:
                chunks.end()
                continue
            ids = self.tokenizer.encode(piece.text, pad=False)
            place = 0
            while place < len(ids):
                word, length = self._word_at(ids, place)
                if word is None:
                    chunks.token(ids[place], piece.weight)
                else:
                    chunks.word(ids[place], word, piece.weight)
                place += length
        return chunks.finish()

    def _word_at(self, ids: Sequence[int], place: int) -> tuple[Word | None, int]:
        for sequence, word in self._sequences:
            if sequence and tuple(ids[place : place + len(sequence)]) == sequence:
                return word, len(sequence)
        return None, 1

    def empty(self) -> Chunk:
        """Return the chunk of an empty text."""
        return self.a1111("")[0]

    def missing(self, texts: Sequence[str], syntax: str) -> list[str]:
        """List the added words that no text contains."""
        used: set[int] = set()
        for text in texts:
            chunks = [self.plain(text)[0]] if syntax == "plain" else self.a1111(text)
            used.update(i for chunk in chunks for i in chunk.ids)
        size = self.vocab_size
        return [w.token for w in self.words if not {size + w.first, -1 - w.first} & used]


# -------------------------------------------------------------------------------------------- a1111


class _Chunks:
    """Collect tokens into chunks."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokenizer = vocabulary.tokenizer
        self.room = vocabulary.length - 2
        self.comma = self.tokenizer.token_id(",</w>")
        self.done: list[Chunk] = []
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.last_comma: int | None = None

    def token(self, token: int, weight: float) -> None:
        """Add a token."""
        self._make_room(token)
        self.ids.append(token)
        self.weights.append(weight)

    def word(self, token: int, word: Word, weight: float) -> None:
        """Add the vectors of a word; keep them in one chunk if they fit."""
        self._make_room(token)
        if len(self.ids) + word.size > self.room:
            self.end()
        self.ids += [-1 - (word.first + i) for i in range(word.size)]
        self.weights += [weight] * word.size

    def _make_room(self, token: int) -> None:
        """End the chunk if it is full; move tokens after a nearby comma to the next chunk."""
        full = len(self.ids) == self.room
        if token == self.comma:
            self.last_comma = len(self.ids)
        elif full and self.last_comma is not None:
            if self.room - self.last_comma <= BACKTRACK:
                split = self.last_comma + 1
                ids, weights = self.ids[split:], self.weights[split:]
                self.ids, self.weights = self.ids[:split], self.weights[:split]
                self.end()
                self.ids, self.weights = ids, weights
        if len(self.ids) == self.room:
            self.end()

    def end(self) -> None:
        """End the chunk, full or not."""
        pad = self.room - len(self.ids)
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [start, *self.ids, *[end] * pad, end]
        # If the pad token differs from the end token, padding starts after the first end.
        if self.tokenizer.pad_token_id != end:
            first = ids.index(end) + 1
            ids[first:] = [self.tokenizer.pad_token_id] * (len(ids) - first)
        self.done.append(Chunk(tuple(ids), (1.0, *self.weights, *[1.0] * pad, 1.0)))
        self.ids, self.weights, self.last_comma = [], [], None

    def finish(self) -> list[Chunk]:
        """Return all chunks."""
        if self.ids or not self.done:
            self.end()
        return self.done


def emphasize(states: Sequence[np.ndarray], chunks: Sequence[Chunk]) -> list[np.ndarray]:
    """Apply token weights to the states of chunks, then restore their mean.

    Args:
        states: (1, T, D) each; the chunks at the same position in all texts of an edited prompt.
        chunks: the chunk of each state.
    Returns: the weighted states. As in the web UI, the mean is taken over all of them together.
    """
    if all(weight == 1.0 for chunk in chunks for weight in chunk.weights):
        return list(states)
    before = np.concatenate(states).astype(np.float64).mean()
    weights = [np.array(chunk.weights, np.float32)[None, :, None] for chunk in chunks]
    weighted = [state * weight for state, weight in zip(states, weights, strict=True)]
    ratio = before / np.concatenate(weighted).astype(np.float64).mean()
    return [(state * np.float32(ratio)).astype(np.float32) for state in weighted]
