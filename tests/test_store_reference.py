"""References to models on the hub: repo ids, single files and web addresses."""

from __future__ import annotations

import pytest
from fake_hub import COMMIT

from mlxdiff.errors import HubError
from mlxdiff.store.hub import resolve
from mlxdiff.store.reference import Reference, is_repo_id, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("stabilityai/stable-diffusion-xl-base-1.0@refs/pr/1", True),
        ("org/name@" + COMMIT, True),
        ("o/n@v1.0-rc_2", True),
        ("name", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./models/x", False),
        ("~/x", False),
        ("../x", False),
        ("org/name.", False),
        ("org/-x", False),
        ("org/a--b", False),
        ("org/a..b", False),
        ("org/name@", False),
        ("org/name@../../x", False),
        ("org/name@a//b", False),
        ("org/name@/etc", False),
        ("org/na me", False),
        ("org/näme", False),
        ("org/name\n", False),
        ("", False),
    ],
)
def test_is_repo_id(text: str, expected: bool) -> None:
    assert is_repo_id(text) is expected
    if not expected:
        with pytest.raises(HubError, match="is not a model on the hub; expected org/name"):
            resolve(text)


def test_names_of_files_and_addresses() -> None:
    page = "https://huggingface.co/org/name"
    for text, revision, file in (
        ("org/name/a.safetensors", "main", "a.safetensors"),
        ("org/name/sub/a b (1).ckpt@v1", "v1", "sub/a b (1).ckpt"),
        (page, "main", ""),
        (f"{page}/tree/v1", "v1", ""),
        (f"{page}/blob/main/a.safetensors?download=true", "main", "a.safetensors"),
        ("https://hf.co/org/name/resolve/refs%2Fpr%2F1/x/a.ckpt", "refs/pr/1", "x/a.ckpt"),
    ):
        assert parse(text) == Reference("org/name", revision, file), text
        assert parse(str(parse(text))) == parse(text)
    for text in ("models/a.safetensors", "org/name/a.txt", "https://a.org/org/name", "/a/b.ckpt"):
        assert parse(text) is None, text
    assert parse("org/name", "v2") == Reference("org/name", "v2")
    with pytest.raises(HubError, match="revision 'v1', but revision 'v2' is given too"):
        parse("org/name@v1", "v2")
