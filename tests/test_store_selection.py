"""Selection of the files that a model needs, from all files of a repo."""

from __future__ import annotations

import pytest
from hub_files import HALF, PLAIN, SD15, UNET, UNWANTED

from mlxdiff.errors import HubError
from mlxdiff.store.selection import needed_files


def test_needed_files_only() -> None:
    everything = [*SD15, *UNWANTED]
    assert needed_files(everything) == HALF
    assert needed_files(everything, "fp16") == HALF
    assert needed_files(everything, "") == PLAIN
    assert f"{UNET}.non_ema.safetensors" in needed_files(everything, "non_ema")
    assert needed_files(everything, components=("vae",)) == [
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        (".safetensors.index.json", "-0000{}-of-00002.safetensors"),
        (".safetensors.index.fp16.json", ".fp16-0000{}-of-00002.safetensors"),
        (".safetensors.index.fp16.json", "-0000{}-of-00002.fp16.safetensors"),
        (".safetensors.fp16.index.json", "-0000{}-of-00002.fp16.safetensors"),
        (".fp16.safetensors.index.json", ".fp16-0000{}-of-00002.safetensors"),
    ],
)
def test_shards_come_with_their_index(index: str, shards: str) -> None:
    sharded = {UNET + index, *(UNET + shards.format(i) for i in (1, 2))}
    files = {f for f in PLAIN if not f.startswith(UNET)} | sharded
    assert sharded <= set(needed_files(files))
    with pytest.raises(HubError, match="unet/ has no safetensors weights"):
        needed_files(files - {UNET + index})


def test_tokenizer_json_alone_suffices() -> None:
    files = [f for f in PLAIN if "vocab" not in f and "merges" not in f]
    assert "tokenizer/tokenizer.json" in needed_files([*files, "tokenizer/tokenizer.json"])
    with pytest.raises(
        HubError, match=r"tokenizer/ has no tokenizer\.json or merges.txt and vocab"
    ):
        needed_files(files)


def test_repos_that_cannot_be_used() -> None:
    for files, variant, message in (
        (
            ["a.safetensors", "README.md"],
            None,
            "no model_index.json",
        ),
        (
            [f for f in PLAIN if f != f"{UNET}.safetensors"],
            None,
            "unet/ has no safetensors weights",
        ),
        ([f for f in PLAIN if f != "vae/config.json"], None, "vae/ has no config.json"),
        ([*SD15], "bf16", r"no variant 'bf16' \(its variants: fp16\)"),
    ):
        with pytest.raises(HubError, match=message) as error:
            needed_files(files, variant)
        assert "\n" not in str(error.value)
