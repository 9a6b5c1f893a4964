"""CLIP's byte-pair tokenizer: text -> the token ids that the text encoders expect.

Normalization: Unicode NFC, one space for each run of white space, lower case. A pattern then splits
the text into words, single digits, English contractions and runs of signs. The UTF-8 bytes of each
piece are merged by rank, and the last symbol gets the mark `</w>`. Special tokens are recognised
inside text, as the reference does: `<|endoftext|>` in a prompt is the token, and so is `!` if `!`
is the pad token (SD 2.x).

Source: Radford et al. 2021 (github.com/openai/CLIP, simple_tokenizer.py) as implemented in
    transformers 5 (models/clip/tokenization_clip.py). This module gives the same ids for every
    text. The `tokenizers` package does the merging.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxdiff.errors import CheckpointError, UsageError, one_line, quoted
from mlxdiff.machine.disk import read_document

if TYPE_CHECKING:
    import os

    import tokenizers

CONTEXT_LENGTH = 77
"""Length of the input of every CLIP text encoder that Stable Diffusion uses."""

MAX_LENGTH = 100_000
"""Longest prompt, in characters: some 400 times what a text encoder takes at once."""

MAX_ID = 1 << 20
"""Ids are below this. CLIP has 49408; the largest vocabularies of other models have 262144."""

_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_WORD = "[^\\W_]+|[\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]"  # or an emoji
_WORD_END = "</w>"
_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# Special tokens are registered in this order. The order matters, see _special_tokens.
_SPECIAL_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """The tokenizer of one text encoder. Immutable and safe to share between threads.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id: ids of start, end and padding.
        model_max_length: number of ids in an encoded text, start and end included (77).
        known_words: all words in the model's training texts, in lower case, or None if the model
            has no such list.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int,
        eos_token_id: int,
        pad_token_id: int,
        model_max_length: int = CONTEXT_LENGTH,
        known_words: tuple[str, ...] | None = None,
    ) -> None:
        self._backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.model_max_length = model_max_length
        self.known_words = known_words

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str], pad_token: str | None = None) -> Tokenizer:
        """Read a diffusers `tokenizer/` folder.

        The vocabulary comes from `tokenizer.json`, or from `vocab.json` and `merges.txt`. Special
        tokens and the length come from `tokenizer_config.json`, `special_tokens_map.json` and
        `added_tokens.json` if these files exist. A model with a small vocabulary lists its words in
        `tokenizer_config.json` under `known_words`.

        Args:
            path: the folder.
            pad_token: overrides the pad token of the folder. If neither gives one, the pad is
                end-of-text. SD 1.x pads with end-of-text; SD 2.x and the second tokenizer of SDXL
                pad with "!" (id 0).

        Raises:
            CheckpointError: a file is missing or damaged, or is not from a CLIP tokenizer.
        """
        folder = Path(path)
        if not os.path.isdir(folder):
            raise CheckpointError(f"{folder}: no such tokenizer folder")
        written = _read_object(folder / "tokenizer_config.json")
        config = {**_DEFAULTS, **{k: v for k, v in written.items() if v is not None}}
        saved = _read_object(folder / "tokenizer.json")
        if saved:
            vocab, merges = _check_saved(saved, folder / "tokenizer.json")
        else:
            vocab, merges = _read_vocabulary(folder)
        added = _added_tokens(folder, config, saved)
        if pad_token is not None:
            config["pad_token"] = pad_token
        try:
            backend = _build(vocab, merges, config, added)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # `tokenizers` raises bare Exceptions, and panics
            raise CheckpointError(
                f"{folder}: not a usable CLIP tokenizer ({one_line(error)}); fetch the folder again"
            ) from error
        _check_ids(backend, added, str(folder))

        def id_of(key: str) -> int:
            token = str(_content(config[key]))
            index = backend.token_to_id(token)
            if index is None or not (token in vocab or token in _contents(added.values())):
                raise CheckpointError(
                    f"{folder}: {key} {quoted(token)} is not in its vocabulary of {len(vocab)} "
                    "entries; fetch the folder again or correct tokenizer_config.json"
                )
            return int(index)

        return cls(
            backend,
            bos_token_id=id_of("bos_token"),
            eos_token_id=id_of("eos_token"),
            pad_token_id=id_of("pad_token"),
            model_max_length=_max_length(config, folder),
            known_words=_known_words(config, folder),
        )

    def with_tokens(self, tokens: Iterable[str]) -> Tokenizer:
        """Return a copy of this tokenizer with more tokens.

        Each new token is found in any case and also inside other words, as the reference's
        ``add_tokens`` does. The new ids follow the existing ones.

        Raises:
            UsageError: a token is empty or already exists.
        """
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        for token in tokens:
            _check_unicode(token, "the word")
            if not token.strip() or backend.token_to_id(token) is not None:
                raise UsageError(
                    f"{token!r} cannot be a new token: it is empty, or the tokenizer has it "
                    "already; give it another name"
                )
            backend.add_tokens([token])
        _check_ids(backend, {}, "the tokenizer")
        return Tokenizer(
            backend,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
            model_max_length=self.model_max_length,
            known_words=self.known_words,
        )

    def token_id(self, token: str) -> int | None:
        """Return the id of a token in the vocabulary's spelling (",</w>"), or None."""
        index: int | None = self._backend.token_to_id(token)
        return index

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._backend.get_vocab_size())

    def check_fits(self, rows: int, positions: int, where: str) -> None:
        """Check that a text encoder has an embedding for each id and each position.

        MLX does not check an index: an id without a row would read foreign memory.

        Args:
            rows: ids that the encoder knows (its vocab_size).
            positions: longest input of the encoder (its max_position_embeddings).
            where: folder of the tokenizer, for the message.
        Raises: CheckpointError.
        """
        token, largest = max(self._backend.get_vocab().items(), key=lambda item: item[1])
        if largest >= rows:
            raise CheckpointError(
                f"{where}: does not belong to this text encoder: its token {quoted(token)} has the "
                f"id {largest}, but the encoder knows the ids 0 to {rows - 1}; use the tokenizer "
                "that was published with the model"
            )
        if self.model_max_length > positions:
            raise CheckpointError(
                f"{where}: does not belong to this text encoder: model_max_length is "
                f"{self.model_max_length}, but the encoder takes {positions} tokens; use the "
                "tokenizer that was published with the model"
            )

    def encode(self, text: str, pad: bool = True) -> list[int]:
        """Encode a text.

        Args:
            text: any Unicode text; may be empty.
            pad: True gives the input of a text encoder: start, the ids of the text, end, padding.
                These are exactly `model_max_length` ids; a long text is cut. False gives all ids of
                the text without start, end, padding or cut.

        Raises:
            UsageError: the text holds half of a surrogate pair, which has no valid Unicode
                encoding.
        """
        ids = list(self._encode(text).ids)
        if not pad:
            return ids
        ids = [self.bos_token_id, *ids[: self.model_max_length - 2], self.eos_token_id]
        return ids + [self.pad_token_id] * (self.model_max_length - len(ids))

    def truncated(self, text: str) -> str:
        """Return the end of the text that `encode` cuts off, or "" if the whole text fits."""
        encoding = self._encode(text)
        room = self.model_max_length - 2
        if len(encoding.ids) <= room:
            return ""
        return text[encoding.offsets[room][0] :].strip()

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of the text that are not in `known_words`, with repetitions.

        A word is a run of letters and digits, in lower case, or an emoji. Other signs and special
        tokens are not words. The result is [] if the model has no word list.
        """
        if self.known_words is None:
            return []
        for token in self._backend.get_added_tokens_decoder().values():
            text = text.replace(token.content, " ")
        _check_unicode(text, "the prompt")
        check_length(text)
        # Not unicodedata: a row of combining marks takes it quadratic time.
        words = re.findall(_WORD, self._backend.normalizer.normalize_str(text))
        return [word for word in words if word not in self.known_words]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of some ids: in lower case, with a space after each word."""
        text = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return str(text.replace(_WORD_END, " ").strip())

    def _encode(self, text: str) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise UsageError(f"a prompt must be text, not {type(text).__name__}")
        _check_unicode(text, "the prompt")
        check_length(text)
        return self._backend.encode(text, add_special_tokens=False)


def check_length(text: str) -> None:
    """Raise UsageError if a prompt has more than MAX_LENGTH characters."""
    if len(text) > MAX_LENGTH:
        raise UsageError(
            f"the prompt has {len(text)} characters; at most {MAX_LENGTH} are read; shorten it"
        )


def _check_unicode(text: str, what: str) -> None:
    """Raise UsageError if a text holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is not valid Unicode: character {error.start + 1} is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}); write {what} in valid UTF-8"
        ) from None


def _build(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    config: Mapping[str, Any],
    added: Mapping[int, Any],
) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=_WORD_END,
            fuse_unk=False,
            unk_token=str(_content(config["unk_token"])),
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(_special_tokens(config, list(added.values())))
    return backend


def _check_ids(backend: tokenizers.Tokenizer, added: Mapping[int, Any], where: str) -> None:
    """Check that all tokens have different ids, and added tokens the ids in the files.

    The backend numbers added tokens itself, from the size of the vocabulary on. In a vocabulary
    with gaps such a number can be taken.

    Raises: CheckpointError.
    """
    owner: dict[int, str] = {}
    for token, index in backend.get_vocab().items():
        if owner.setdefault(index, token) != token:
            raise CheckpointError(
                f"{where}: the tokens {quoted(owner[index])} and {quoted(token)} have the same id "
                f"{index}; fetch the tokenizer again"
            )
    for index, entry in added.items():
        found = backend.token_to_id(entry["content"])
        if found != index:
            raise CheckpointError(
                f"{where}: the added token {quoted(entry['content'])} has the id {index} in its "
                f"file, but {found} in the vocabulary; fetch the tokenizer again"
            )


# Files


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    if not vocab_file.is_file() and not merges_file.is_file():
        raise CheckpointError(
            f"{folder}: holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt"
        )
    for file in (vocab_file, merges_file):
        if not file.is_file():
            raise CheckpointError(f"{folder}: {file.name} is missing; fetch the folder again")
    merges = []
    # Split at "\n" only: splitlines also splits at some characters of the byte alphabet.
    for number, line in enumerate(_read_text(merges_file).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise CheckpointError(
                f"{merges_file}: line {number} is not a merge (two symbols with a space between); "
                "fetch the file again"
            )
        merges.append((pair[0], pair[1]))
    return _check_vocab(_read_object(vocab_file), vocab_file), merges


def _check_saved(
    saved: Mapping[str, Any], file: Path
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a `tokenizer.json`, which must describe CLIP's procedure.

    The steps in the file are checked but not run: old files spell them differently, and the
    reference builds its own steps too.
    """

    def not_clip(what: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: {what}; expected CLIP's tokenizer (lower-casing, byte-level BPE with "
            f"word end {_WORD_END})"
        )

    model = saved.get("model")
    if not isinstance(model, dict) or "merges" not in model or "vocab" not in model:
        raise not_clip("holds no byte-pair model")
    if model.get("type", "BPE") != "BPE":
        raise not_clip(f"its model is {model['type']}")
    if model.get("end_of_word_suffix") != _WORD_END:
        raise not_clip(f"its model's end_of_word_suffix is {model.get('end_of_word_suffix')!r}")
    normalizers = _step_types(saved.get("normalizer"), "normalizers")
    if "Lowercase" not in normalizers or not normalizers <= {"NFC", "Replace", "Lowercase"}:
        raise not_clip(f"its normalizer is {sorted(normalizers) or 'empty'}")
    splitters = _step_types(saved.get("pre_tokenizer"), "pretokenizers")
    if "ByteLevel" not in splitters or not splitters <= {"Split", "ByteLevel"}:
        raise not_clip(f"its pre-tokenizer is {sorted(splitters) or 'empty'}")

    merges = []
    for merge in model["merges"] if isinstance(model["merges"], list) else [None]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            raise CheckpointError(f"{file}: {quoted(merge)} is not a merge; fetch the file again")
        merges.append((pair[0], pair[1]))
    return _check_vocab(model["vocab"], file), merges


def _step_types(step: Any, list_key: str) -> set[str]:
    if not isinstance(step, dict):
        return set()
    if step.get("type") != "Sequence":
        return {str(step.get("type"))}
    steps = step.get(list_key)
    found = steps if isinstance(steps, list) else []
    return {str(s.get("type")) for s in found if isinstance(s, dict)}


def _check_vocab(vocab: Any, file: Path) -> dict[str, int]:
    if (
        not isinstance(vocab, dict)
        or not vocab
        or not all(type(i) is int and 0 <= i < MAX_ID for i in vocab.values())
    ):
        raise CheckpointError(f"{file}: not a vocabulary (token -> id); fetch the file again")
    return vocab


def _read_text(file: Path) -> str:
    try:
        return read_document(file).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as UTF-8 text ({one_line(error)}); fetch the file again"
        ) from error


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object. Return {} if the file does not exist."""
    if not file.exists():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not readable as JSON ({one_line(error)}); fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object; fetch the file again")
    return value


def _max_length(config: Mapping[str, Any], folder: Path) -> int:
    length = config.get("model_max_length", CONTEXT_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 2:
        raise CheckpointError(
            f"{folder}/tokenizer_config.json: model_max_length is {quoted(length)}; "
            f"expected {CONTEXT_LENGTH}"
        )
    # transformers writes 1e30 if the length is unknown.
    return CONTEXT_LENGTH if length > 1e6 else int(length)


def _known_words(config: Mapping[str, Any], folder: Path) -> tuple[str, ...] | None:
    words = config.get("known_words")
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CheckpointError(
            f"{folder}/tokenizer_config.json: known_words is not a list of words; correct it or "
            "remove it"
        )
    return tuple(words)


# Special and added tokens. A token in a file is a string or a dict {"content", "normalized",
# "special", ...}. The flags apply as in transformers' PreTrainedTokenizerBase._from_pretrained.


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _contents(tokens: Iterable[Any]) -> set[str]:
    return {str(_content(token)) for token in tokens}


def _added_tokens(folder: Path, config: dict[str, Any], saved: Mapping[str, Any]) -> dict[int, Any]:
    """Return the tokens beside the vocabulary by id, in order. Put them into `config` too."""
    added: dict[int, Any] = {}
    if "added_tokens_decoder" in config:
        where = folder / "tokenizer_config.json"
        entries = config["added_tokens_decoder"]
        pairs: list[tuple[Any, Any]] = [(None, None)]
        if isinstance(entries, dict):
            pairs = list(entries.items())
    else:
        special_map = _read_object(folder / "special_tokens_map.json")
        for key, value in special_map.items():
            if value is not None:
                config[key] = {**value, "special": True} if isinstance(value, dict) else value
        where = folder / "tokenizer.json"
        specials = _contents(config[key] for key in _SPECIAL_KEYS if config.get(key))
        pairs = [
            (i, {"content": content, "special": content in specials})
            for content, i in _read_object(folder / "added_tokens.json").items()
        ]
        entries = saved.get("added_tokens") or []
        pairs += [
            (e.get("id"), {k: v for k, v in e.items() if k != "id"})
            if isinstance(e, dict)
            else (None, None)
            for e in (entries if isinstance(entries, list) else [None])
        ]
    for index, token in pairs:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise CheckpointError(
                f"{where}: {quoted(token)} is not an added token; fetch the file again"
            )
        if not re.fullmatch("[0-9]{1,7}", str(index), re.ASCII) or int(index) >= MAX_ID:
            raise CheckpointError(
                f"{where}: added token {quoted(token['content'])} has id {quoted(index)}; "
                "fetch the file again"
            )
        added[int(index)] = token
    by_content = {token["content"]: token for token in added.values()}
    for key in _SPECIAL_KEYS:
        if config.get(key) is not None:
            content = _content(config[key])
            if not isinstance(content, str):
                raise CheckpointError(
                    f"{folder}: {key} is {quoted(config[key])}; expected a token; "
                    "fetch the folder again"
                )
            config[key] = by_content.get(content, config[key])
    return dict(sorted(added.items()))


def _special_tokens(config: Mapping[str, Any], added: list[Any]) -> list[tokenizers.AddedToken]:
    """Return the tokens that the backend must recognise inside text.

    If a token occurs twice with different flags, the last one counts. SD 1.x has end-of-text as
    "eos_token" (found in normalized text) and then as a plain "pad_token" (found in raw text).
    """
    specials = [config[key] for key in _SPECIAL_KEYS if config.get(key) is not None]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    known, named = _contents(added), _contents(specials)
    more = [*specials, *(extra if isinstance(extra, list) else [])]
    tokens = added + [token for token in more if _content(token) not in known]
    unique = {str(_content(token)): token for token in tokens}
    return [_added_token(token, special=content in named) for content, token in unique.items()]


def _added_token(token: Any, special: bool) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    result = AddedToken(token["content"], **{k: bool(token[k]) for k in flags if k in token})
    if special:
        result.special = True
    return result
