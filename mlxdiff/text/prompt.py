"""Prompts as token chunks: weights, long prompts, words that stand for vectors of their own.

``plain`` is what diffusers makes of a text: one chunk, what does not fit is cut. ``a1111`` is what
AUTOMATIC1111's web UI makes of it: each token has a weight, and as many chunks of 75 tokens as the
text takes, each with start and end.

Ids below 0 or beyond the vocabulary stand for vectors that a text encoder is given beside the text
(textual inversion): ``vocab_size + k`` and ``-1 - k`` both for row ``k``. The two differ in what
CLIP's older rule, which takes the largest id for the end of the text, makes of them; each syntax
has the one that its reference tool has.

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
"""Tokens after a comma that may move to the next chunk with what follows; A1111's default."""


class Word(NamedTuple):
    """A word that stands for vectors.

    Attributes:
        token: how it is written in a prompt.
        names: other ways to write it, in A1111's syntax.
        first: its first row among all the vectors of the text encoder.
        size: how many rows.
    """

    token: str
    names: tuple[str, ...]
    first: int
    size: int


class Chunk(NamedTuple):
    """What a text encoder is given at a time: ids and weights, start, end and padding included."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


# -------------------------------------------------------------------------------------------- plain


class Vocabulary:
    """A tokenizer and the words beside its vocabulary, for one text encoder.

    Args:
        tokenizer: the encoder's.
        vocab_size: rows of the encoder's table of vectors.
        words: that stand for vectors.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, words: Sequence[Word] = ()) -> None:
        self.tokenizer, self.words, self.vocab_size = tokenizer, tuple(words), vocab_size
        self.length = tokenizer.model_max_length
        # As diffusers registers them: a word of several vectors is "word word_1 word_2 ...".
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
        # A1111 looks for the tokens of a word's name, the longest first.
        found = [
            (tuple(tokenizer.encode(name, pad=False)), word)
            for word in words
            for name in dict.fromkeys((word.token, *word.names))
        ]
        self._sequences = sorted(found, key=lambda pair: -len(pair[0]))

    def plain(self, text: str) -> tuple[Chunk, str]:
        """One chunk of a plain text, and the end of the text that was cut off."""
        spelled = self._spell(text)
        ids = self._extended.encode(spelled)
        mapped = tuple(self._ids.get(i, i) for i in ids)
        return Chunk(mapped, (1.0,) * len(mapped)), self._extended.truncated(spelled)

    def _spell(self, text: str) -> str:
        """A text with words of several vectors written out."""
        found = set(self._extended.encode(text, pad=False)) if self.words else set()
        for token, spelled in self._spelled.items():
            if len(spelled) > 1 and self._extended.token_id(token) in found:
                text = text.replace(token, " ".join(spelled))
        return text

    def a1111(self, text: str) -> list[Chunk]:
        """The chunks of a text in A1111's syntax (without what ``a1111.networks`` takes out)."""
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
        """The chunk of an empty text."""
        return self.a1111("")[0]

    def missing(self, texts: Sequence[str], syntax: str) -> list[str]:
        """The words that stand in none of the texts."""
        used: set[int] = set()
        for text in texts:
            chunks = [self.plain(text)[0]] if syntax == "plain" else self.a1111(text)
            used.update(i for chunk in chunks for i in chunk.ids)
        size = self.vocab_size
        return [w.token for w in self.words if not {size + w.first, -1 - w.first} & used]


# -------------------------------------------------------------------------------------------- a1111


class _Chunks:
    """Tokens, filled into chunk after chunk."""

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
        """Add a word's vectors, all of them to one chunk where they fit into one."""
        self._make_room(token)
        if len(self.ids) + word.size > self.room:
            self.end()
        self.ids += [-1 - (word.first + i) for i in range(word.size)]
        self.weights += [weight] * word.size

    def _make_room(self, token: int) -> None:
        """End the chunk if it is full; what stands after a comma nearby goes to the next."""
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
        # Where padding is not the end's own token, it follows the first end.
        if self.tokenizer.pad_token_id != end:
            first = ids.index(end) + 1
            ids[first:] = [self.tokenizer.pad_token_id] * (len(ids) - first)
        self.done.append(Chunk(tuple(ids), (1.0, *self.weights, *[1.0] * pad, 1.0)))
        self.ids, self.weights, self.last_comma = [], [], None

    def finish(self) -> list[Chunk]:
        """All chunks."""
        if self.ids or not self.done:
            self.end()
        return self.done


def emphasize(states: Sequence[np.ndarray], chunks: Sequence[Chunk]) -> list[np.ndarray]:
    """Weigh the states of chunks that belong together, and bring their mean back to what it was.

    Args:
        states: (1, T, D) each, of the same place in all texts of an edited prompt, or one.
        chunks: their chunks.
    Returns: the same, weighted. The web UI takes the mean over all of them, and so do we.
    """
    if all(weight == 1.0 for chunk in chunks for weight in chunk.weights):
        return list(states)
    before = np.concatenate(states).astype(np.float64).mean()
    weights = [np.array(chunk.weights, np.float32)[None, :, None] for chunk in chunks]
    weighted = [state * weight for state, weight in zip(states, weights, strict=True)]
    ratio = before / np.concatenate(weighted).astype(np.float64).mean()
    return [(state * np.float32(ratio)).astype(np.float32) for state in weighted]
