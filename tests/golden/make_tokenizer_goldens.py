"""Makes tests/golden/tokenizer/: what transformers' CLIPTokenizer makes of difficult texts.

    python tests/golden/make_tokenizer_goldens.py [FOLDER]

FOLDER holds CLIP's vocab.json.gz and merges.txt.gz (default: ../shared/clip beside the repository).
Needs transformers (`pip install -e .[parity]`). It writes:

small/vocab.json, small/merges.txt: the first merges of CLIP's vocabulary (MIT licence), with the
    same byte alphabet and special tokens, so that the tests have a real one at hand.
goldens.json: for each vocabulary ("small", "clip") and each of FOLDERS the pad id and, text by
    text, the ids without start, end and padding. That the 77 ids follow from them is asserted here.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = HERE / "tokenizer"
MERGES = 700
START, END = "<|startoftext|>", "<|endoftext|>"


def token(content: str, **more: Any) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": content, **flags, **more}


TYPED = {"__type": "AddedToken"}
FOLDERS: dict[str, dict[str, Any]] = {
    "bare": {},
    # runwayml/stable-diffusion-v1-5, tokenizer/
    "sd15": {
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "bos_token": {**TYPED, **token(START)},
            "do_lower_case": True,
            "eos_token": {**TYPED, **token(END)},
            "errors": "replace",
            "model_max_length": 77,
            "pad_token": END,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": {**TYPED, **token(END)},
        },
        "special_tokens_map.json": {
            "bos_token": token(START),
            "eos_token": token(END),
            "pad_token": END,
            "unk_token": token(END),
        },
    },
    # stabilityai/stable-diffusion-2-1, tokenizer/
    "sd21": {
        "tokenizer_config.json": {
            "bos_token": {**TYPED, **token(START)},
            "eos_token": {**TYPED, **token(END)},
            "model_max_length": 77,
            "pad_token": END,
            "unk_token": {**TYPED, **token(END)},
        },
        "special_tokens_map.json": {
            "bos_token": token(START),
            "eos_token": token(END),
            "pad_token": "!",
            "unk_token": token(END),
        },
    },
    # stabilityai/stable-diffusion-xl-base-1.0, tokenizer_2/ (the ids of START and END are filled
    # in)
    "sdxl-2": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "0": token("!", normalized=False, special=True),
                "-2": token(START, special=True),
                "-1": token(END, special=True),
            },
            "bos_token": START,
            "clean_up_tokenization_spaces": True,
            "eos_token": END,
            "model_max_length": 77,
            "pad_token": "!",
            "unk_token": END,
        },
    },
    # a textual inversion saved with its tokenizer
    "inversion": {
        "tokenizer_config.json": {"model_max_length": 77, "bos_token": {**TYPED, **token(START)}},
        "special_tokens_map.json": {"eos_token": token(END)},
        "added_tokens.json": {"<cat-toy>": -3, "HUGE": -4},
    },
}

TEXTS = [
    "",
    " ",
    "a photo of an astronaut riding a horse on mars",
    "A Photo  of\tan\nASTRONAUT,\r\nriding\u00a0a\u3000horse!",
    "it's we'll I'm you've they're don't she'd IT'S WE'LL rock'n'roll 'tis ''s",
    "3 cats, 42 dogs and 1000000 birds; 3.14 2nd 1st",
    "½ ² ① Ⅷ १२३ ٤٥٦ 四",
    "hello!!! what?! (yes) [no] {maybe} --- ... ,;:",
    "wow! great!",
    "under_score hash#tag e-mail@example.com https://example.com/?q=1&r=2",
    "naïve café e\u0301cole A\u030angstro\u0308m Å ÅNGSTRÖM",
    "\u1100\u1161\u11a8 \uac01 \ud55c\uad6d\uc5b4",
    "İstanbul ISTANBUL ıstanbul ß ẞ ﬁ ǆ Ǆ ǅ ΣΊΣΥΦΟΣ ς",
    "漢字かな交じり文、テスト。 中文测试",
    "مرحبا بالعالم ‏שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇪🇺 ❤️",
    "a\u0000b \u0001\u0007\u001b[31mred\u001b[0m \u007f \u0085 \u009f",
    "zero\u200bwidth\u200d\u2060\ufeff soft\u00adhyphen \u2028 \u2029 \u180e",
    "\ufffd \ufffe \uffff \U0001f600 \U0010ffff \ue000 \U000e0041",
    "Z̸̧̛̠͔̎͋ä̷́l̶g̵o̸",
    "<|endoftext|>",
    "a <|endoftext|> in the middle<|startoftext|>and no space",
    "<|ENDOFTEXT|> <|EndOfText|> <|startoftext |> <|end oftext|> <| |>",
    "</w> <w> cat</w> cat </w>dog",
    "a <cat-toy> on a <CAT-TOY>, huge HUGE Huge",
    "(masterpiece:1.2), ((best quality)), [blurry|sharp:0.5], <lora:x:0.8> BREAK 8k uhd",
    '"quotes" “curly” ‘single’ «angle» \\ / | ~ ` ^ $ % & * + = < >',
    "a" * 300,
    "word " * 75,
    "word " * 76,
    "cat, " * 200,
    "😀" * 40,
    "the quick brown fox jumps over the lazy dog " * 12 + "<|endoftext|> end!",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "'",
    "!",
    "'S 'LL",
    "\n\n\n",
    "ends with space ",
]


def write_small(vocab: dict[str, int], merges: list[str]) -> None:
    """A vocabulary of the 512 symbols of the byte alphabet, the first merges, and the specials."""
    names = [*sorted(vocab, key=vocab.__getitem__)[: 512 + MERGES], START, END]
    small = OUT / "small"
    small.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: i for i, name in enumerate(names)}, ensure_ascii=False)
    (small / "vocab.json").write_text(text + "\n", encoding="utf-8")
    (small / "merges.txt").write_text("\n".join(merges[: MERGES + 1]) + "\n", encoding="utf-8")


def write_folder(folder: Path, vocab: str, merges: str, files: dict[str, Any]) -> Path:
    """A tokenizer folder. Ids -2 and -1 are the last of the vocabulary, -3 and -4 come after."""
    size = len(json.loads(vocab))

    def actual(i: int) -> int:
        return i if i >= 0 else size + i if i >= -2 else size - i - 3

    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    for name, value in files.items():
        if name == "added_tokens.json":
            value = {key: actual(i) for key, i in value.items()}
        if "added_tokens_decoder" in value:
            entries = {str(actual(int(i))): t for i, t in value["added_tokens_decoder"].items()}
            value = {**value, "added_tokens_decoder": entries}
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def rows(folder: Path) -> dict[str, Any]:
    """What the reference makes of the texts."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    result = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        padded = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
        expected = [tokenizer.bos_token_id, *ids[:75], tokenizer.eos_token_id]
        assert padded == expected + [tokenizer.pad_token_id] * (77 - len(expected)), text
        result.append(ids)
    return {"pad": tokenizer.pad_token_id, "ids": result}


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[2] / "shared" / "clip"
    vocab = gzip.decompress((source / "vocab.json.gz").read_bytes()).decode()
    merges = gzip.decompress((source / "merges.txt.gz").read_bytes()).decode()
    write_small(json.loads(vocab), merges.split("\n"))
    vocabularies = {
        "small": tuple(
            (OUT / "small" / f).read_text("utf-8") for f in ("vocab.json", "merges.txt")
        ),
        "clip": (vocab, merges),
    }
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (names, pairs) in vocabularies.items():
            found = []
            for kind, files in FOLDERS.items():
                folder = Path(scratch) / name / kind
                write_folder(folder, names, pairs, files)
                row = rows(folder)
                ids = ",\n".join(json.dumps(i, separators=(",", ":")) for i in row["ids"])
                found.append(f'"{kind}": {{"pad": {row["pad"]}, "ids": [\n{ids}\n]}}')
            lines.append(f'"{name}": {{\n' + ",\n".join(found) + "\n}")
    (OUT / "goldens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
