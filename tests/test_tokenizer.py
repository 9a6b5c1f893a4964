"""The tokenizer against transformers' CLIPTokenizer: by goldens, and live if it is installed."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxdiff.errors import CheckpointError, MlxdiffError, UsageError
from mlxdiff.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden" / "tokenizer"
SMALL = GOLDEN / "small"
CLIP = HERE.parents[1] / "shared" / "clip"
GOLDENS = json.loads((GOLDEN / "goldens.json").read_text("utf-8"))


def script() -> ModuleType:
    """Import the script that made the goldens. It holds the texts and the folders."""
    path = HERE / "golden" / "make_tokenizer_goldens.py"
    spec = importlib.util.spec_from_file_location("make_tokenizer_goldens", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEXTS, FOLDERS = script().TEXTS, script().FOLDERS
KINDS = sorted(FOLDERS)
write_folder = script().write_folder


def vocabulary(name: str) -> tuple[str, str]:
    """Return vocab.json and merges.txt of "small" or "clip". Skip if the real one is missing."""
    if name == "small":
        return (SMALL / "vocab.json").read_text("utf-8"), (SMALL / "merges.txt").read_text("utf-8")
    if not CLIP.is_dir():
        pytest.skip("CLIP's own vocabulary is not here")
    read = [(CLIP / f"{f}.gz").read_bytes() for f in ("vocab.json", "merges.txt")]
    return gzip.decompress(read[0]).decode(), gzip.decompress(read[1]).decode()


def saved_json(vocab: str, merges: str, **more: Any) -> dict[str, Any]:
    """Make the tokenizer.json that transformers' CLIPTokenizer saves."""
    pairs = [line.split(" ") for line in merges.split("\n")[1:] if line]
    split = {"type": "Split", "pattern": {"Regex": "[\\p{L}]+"}, "behavior": "Removed"}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst"},
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]},
        "model": {
            "type": "BPE",
            "end_of_word_suffix": "</w>",
            "vocab": json.loads(vocab),
            "merges": pairs,
        },
        **more,
    }


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(SMALL)


@pytest.fixture
def small() -> Tokenizer:
    return small_tokenizer()


# Goldens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["small", "clip"])
def test_ids_are_those_of_the_reference(name: str, kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", *vocabulary(name), FOLDERS[kind])
    golden = GOLDENS[name][kind]
    tokenizer = Tokenizer.from_folder(folder)
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, golden["pad"]
    assert tokenizer.pad_token_id == pad
    for text, ids in zip(TEXTS, golden["ids"], strict=True):
        assert tokenizer.encode(text, pad=False) == ids, text
        head = [start, *ids[:75], end]
        assert tokenizer.encode(text) == head + [pad] * (77 - len(head)), text
        assert bool(tokenizer.truncated(text)) == (len(ids) > 75), text


def test_the_ids_everyone_knows(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "t", *vocabulary("clip"), {}))
    assert tokenizer.encode("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    assert tokenizer.encode("") == [49406] + [49407] * 76
    assert tokenizer.vocab_size == 49408


def test_tokenizer_json_gives_the_same(small: Tokenizer, tmp_path: Path) -> None:
    """Merges are pairs or, in older files, one string. The folder has no other file."""
    vocab, merges = vocabulary("small")
    saved = saved_json(vocab, merges)
    older = saved_json(vocab, merges)
    older["model"]["merges"] = [" ".join(pair) for pair in older["model"]["merges"]]
    del older["model"]["type"]
    for name, value in (("new", saved), ("old", older)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        for text in TEXTS:
            assert tokenizer.encode(text) == small.encode(text)


# Properties


@settings(deadline=None, max_examples=60)
@given(st.text())
def test_any_text_gives_77_ids(text: str) -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    bare = tokenizer.encode(text, pad=False)
    assert ids[1 : 1 + len(bare)][:75] == bare[:75]
    assert (tokenizer.truncated(text) == "") or len(bare) > 75


def test_truncated_is_the_end_of_the_text_as_written(small: Tokenizer) -> None:
    text = "! " * 74 + "# $ É, Ünder  the BRIDGE 😀"
    assert small.truncated(text) == "$ É, Ünder  the BRIDGE 😀"
    assert small.encode(text)[:76] == small.encode("! " * 74 + "#")[:76]
    assert small.truncated("! " * 75) == ""
    assert small.truncated("😀" * 100).startswith("😀")


def test_decode(small: Tokenizer) -> None:
    text = "A photo of a CAT's 12 😀!"
    assert small.decode(small.encode(text)) == "a photo of a cat 's 1 2 😀!"
    assert small.decode(small.encode("a")[:3], skip_special=False) == (
        "<|startoftext|>a <|endoftext|>"
    )
    assert small.decode([]) == ""


def test_the_pad_token_can_be_given() -> None:
    tokenizer = Tokenizer.from_folder(SMALL, pad_token="!")
    assert tokenizer.encode("a")[3:] == [0] * 74
    assert tokenizer.encode("wow!", pad=False)[-1] == 0  # a special token also inside text


def test_an_unknown_length_is_77(tmp_path: Path) -> None:
    for length, expected in ((10**30, 77), (1e30, 77), (16, 16)):
        config = {"tokenizer_config.json": {"model_max_length": length, "pad_token": None}}
        folder = write_folder(tmp_path / str(length), *vocabulary("small"), config)
        assert len(Tokenizer.from_folder(folder).encode("a b c")) == expected


def test_words_outside_the_list_of_known_ones(tmp_path: Path) -> None:
    config = {"tokenizer_config.json": {"known_words": ["circle", "naïve"]}}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "t", *vocabulary("small"), config))
    assert tokenizer.unknown_words("Circle, CIRCLE! nai\u0308ve... <|endoftext|>") == []
    assert tokenizer.unknown_words("2 circles: circle's horse, horse") == [
        *("2", "circles", "s", "horse", "horse")
    ]


def test_without_such_a_list_no_word_is_unknown(small: Tokenizer) -> None:
    assert small.known_words is None and small.unknown_words("horse") == []


@pytest.mark.parametrize("text", ["a\udc80b", "\ud83d", "a" * 200 + "\udfff"])
def test_half_a_surrogate_pair_is_an_error(small: Tokenizer, text: str) -> None:
    for use in (small.encode, small.truncated):
        with pytest.raises(UsageError, match=f"character {len(text.rstrip('b'))} is a lone"):
            use(text)


def test_something_else_than_text_is_an_error(small: Tokenizer) -> None:
    with pytest.raises(UsageError, match="must be text, not int"):
        small.encode(5)  # type: ignore[arg-type]


# Damaged folders


def damage(folder: Path, what: str) -> None:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if what == "empty":
        vocab.unlink()
        merges.unlink()
    elif what == "no merges":
        merges.unlink()
    elif what == "no vocab":
        vocab.unlink()
    elif what == "cut vocab":
        vocab.write_bytes(vocab.read_bytes()[:100])
    elif what == "vocab is a list":
        vocab.write_text("[1, 2]")
    elif what == "vocab has names":
        vocab.write_text('{"a": "b"}')
    elif what == "cut merges":
        text = merges.read_text("utf-8")
        merges.write_text(text[: text.rindex(" ")], encoding="utf-8")
    elif what == "foreign merge":
        merges.write_text("#version: 0.2\nxx yy\n")
    elif what == "binary merges":
        merges.write_bytes(b"\xff\xfe\x00")
    elif what == "no end token":
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|nowhere|>"}')
    elif what == "bad length":
        (folder / "tokenizer_config.json").write_text('{"model_max_length": "long"}')
    elif what == "bad words":
        (folder / "tokenizer_config.json").write_text('{"known_words": "circle"}')
    elif what == "bad config":
        (folder / "tokenizer_config.json").write_text("{")
    elif what == "bad added":
        (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"0": 5}}')
    elif what == "bad added id":
        (folder / "tokenizer_config.json").write_text(
            '{"added_tokens_decoder": {"x": {"content": "!"}}}'
        )
    elif what == "bad special":
        (folder / "special_tokens_map.json").write_text('{"pad_token": 3}')


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt"),
        ("no merges", "merges.txt is missing"),
        ("no vocab", "vocab.json is missing"),
        ("cut vocab", "vocab.json: not readable as JSON"),
        ("vocab is a list", "vocab.json: not a JSON object"),
        ("vocab has names", "vocab.json: not a vocabulary"),
        ("cut merges", "merges.txt: line 701 is not a merge"),
        ("foreign merge", "not a usable CLIP tokenizer"),
        ("binary merges", "merges.txt: cannot be read as UTF-8"),
        ("no end token", "eos_token '<|nowhere|>' is not in its vocabulary of 1214"),
        ("bad length", "model_max_length is 'long'"),
        ("bad words", "known_words is not a list of words"),
        ("bad config", "tokenizer_config.json: not readable as JSON"),
        ("bad added", "tokenizer_config.json: 5 is not an added token"),
        ("bad added id", "added token '!' has id 'x'"),
        ("bad special", "pad_token is 3; expected a token"),
    ],
)
def test_errors_for_a_damaged_folder(what: str, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tokenizer", *vocabulary("small"), {})
    damage(folder, what)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_folder(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_no_folder() -> None:
    with pytest.raises(CheckpointError, match="/nowhere: no such tokenizer folder"):
        Tokenizer.from_folder("/nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}, "merges": []}}, "its model is WordPiece"),
        ({"model": {"type": "Unigram", "vocab": []}}, "holds no byte-pair model"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "end_of_word_suffix is None"),
        ({"normalizer": None}, "its normalizer is empty"),
        ({"normalizer": {"type": "NFC"}}, r"its normalizer is \['NFC'\]"),
        ({"normalizer": {"type": "BertNormalizer"}}, "its normalizer is"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"its pre-tokenizer is \['Whitespace'\]"),
    ],
)
def test_a_tokenizer_of_another_kind(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved = saved_json(*vocabulary("small"), **change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"tokenizer.json: .*{message}.*expected CLIP's"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("merges", [5, [5], [["a"]], ["a"], [["a", 1]]])
def test_malformed_merges(merges: Any, tmp_path: Path) -> None:
    saved = saved_json(*vocabulary("small"))
    saved["model"]["merges"] = merges
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a merge"):
        Tokenizer.from_folder(tmp_path)


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(
            ["bos_token", "pad_token", "added_tokens_decoder", "model_max_length", "unk_token"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["0", "content", "x"]), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
def test_any_config_is_read_or_refused(tmp_path_factory: Any, config: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("any") / "t"
    write_folder(folder, *vocabulary("small"), {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except MlxdiffError as error:
        assert "\n" not in str(error)
    else:
        assert len(tokenizer.encode("a")) == tokenizer.model_max_length


# The reference itself

SPECIALS = ["<|endoftext|>", "<|ENDOFTEXT|>", "<|startoftext|>", "!", "<cat-toy>", "HUGE", "huge"]
CHARACTERS = [*"\u0301\u0130\u0000\u200d😀\u3000\u0085½\ufeff", "'s", "'LL", "</w>"]
ODD = st.sampled_from(SPECIALS + CHARACTERS)
PROMPTS = st.lists(ODD | st.text(max_size=6) | st.from_regex(r"[a-z ,]{1,12}"), max_size=30)


def reference() -> ModuleType:
    return pytest.importorskip("transformers")


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", [False, True], ids=["as published", "saved again"])
def test_parity_with_transformers(kind: str, saved: bool, tmp_path_factory: Any) -> None:
    """Use CLIP's own vocabulary if it is here, and folders written by transformers itself."""
    theirs_class = reference().CLIPTokenizer
    folder = tmp_path_factory.mktemp("parity") / "t"
    write_folder(folder, *vocabulary("clip" if CLIP.is_dir() else "small"), FOLDERS[kind])
    if saved:
        theirs_class.from_pretrained(folder).save_pretrained(again := folder.parent / "again")
        folder = again
    theirs, ours = theirs_class.from_pretrained(folder), Tokenizer.from_folder(folder)
    assert ours.vocab_size == len(theirs)

    @settings(deadline=None, max_examples=80)
    @given(PROMPTS.map("".join))
    def check(text: str) -> None:
        padded = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(text) == padded
        assert ours.encode(text, pad=False) == theirs(text, add_special_tokens=False).input_ids
        for skip in (False, True):
            assert ours.decode(padded, skip) == theirs.decode(padded, skip_special_tokens=skip)

    check()


@pytest.mark.parity
def test_parity_with_tokenizer_json_alone(tmp_path: Path) -> None:
    theirs_class = reference().CLIPTokenizer
    for kind in KINDS:
        folder = write_folder(tmp_path / kind, *vocabulary("small"), FOLDERS[kind])
        tokenizer = theirs_class.from_pretrained(folder)
        tokenizer("a", padding="max_length", max_length=5, truncation=True)  # is saved with it
        tokenizer.save_pretrained(tmp_path / f"{kind}-saved")
        alone = tmp_path / f"{kind}-alone"
        alone.mkdir()
        shutil.copy(tmp_path / f"{kind}-saved" / "tokenizer.json", alone)
        theirs, ours = theirs_class.from_pretrained(alone), Tokenizer.from_folder(alone)
        for text in TEXTS:
            padded = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
            assert ours.encode(text) == padded


@pytest.mark.parity
def test_the_script_makes_the_goldens(tmp_path: Path, monkeypatch: Any) -> None:
    reference()
    vocabulary("clip")
    maker = script()
    monkeypatch.setattr(maker, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_tokenizer_goldens.py"])
    maker.main()
    for file in ("goldens.json", "small/vocab.json", "small/merges.txt"):
        assert (tmp_path / file).read_bytes() == (GOLDEN / file).read_bytes(), file
