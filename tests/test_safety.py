"""Nobody in: what a hostile hub, file, picture or fellow user tries, and what becomes of it.

SECURITY.md says what mlxdiff promises. What a parser does with thousands of damaged files is in
test_fuzz.py.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_hub import Hub, serve
from folders import VOCAB, diffusers_folder, write_json
from hub_files import SD15
from PIL import Image
from safetensors.numpy import save_file

from mlxdiff import library
from mlxdiff.cli import main
from mlxdiff.convert import convert, open_source
from mlxdiff.errors import CheckpointError, ConfigError, HubError, MlxdiffError, UsageError
from mlxdiff.machine import disk
from mlxdiff.pictures import image
from mlxdiff.pictures.image import load_image, save_png
from mlxdiff.pictures.metadata import Metadata
from mlxdiff.store import hub
from mlxdiff.store.folder import open_folder
from mlxdiff.text import a1111
from mlxdiff.tokenizer import Tokenizer
from mlxdiff.weights.tensors import TensorFile

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    for key in list(os.environ):
        if key.startswith(("HF_", "HUGGINGFACE_")) or key == "TRANSFORMERS_OFFLINE":
            monkeypatch.delenv(key)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serve(dict(SD15), monkeypatch) as handler:
        yield handler


def files_outside(tmp_path: Path) -> dict[str, bytes]:
    """Return all files beside the cache."""
    cache = tmp_path / "home"
    return {
        str(p): p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.is_file() and not p.is_relative_to(cache)
    }


def test_an_etag_never_names_a_file(server: type[Hub], tmp_path: Path) -> None:
    """A hub could delete, overwrite or make any file: ETags named blobs."""
    victim = tmp_path / "precious.txt"
    victim.write_text("the user's own\n")
    before = files_outside(tmp_path)
    for place in (victim, tmp_path / "new.txt"):
        server.etag = os.path.relpath(place, tmp_path / "home/hub/models--org--name/blobs")
        folder = hub.resolve("org/name")
        assert (folder / "model_index.json").read_text() == SD15["model_index.json"]
        assert files_outside(tmp_path) == before


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets a value in a listing."""

    def lie(info: dict[str, Any]) -> None:
        where: Any = info
        *keys, last = path.split(".")
        for key in keys:
            where = where[int(key) if key.isdecimal() else key]
        where[last] = value

    return lie


LIES = {
    "sha": "../../../../x",
    "siblings.0.rfilename": "../../../../model_index.json",
    "siblings.1.rfilename": "/etc/passwd",
    "siblings.2.rfilename": "a\\..\\..\\b",
    "siblings.0.blobId": "../../../../precious.txt",
    "siblings.3.size": -1,
    "siblings.4.size": 1 << 60,
    "siblings.5.lfs": {"sha256": "../x", "size": 1, "pointerSize": 1},
}


@pytest.mark.parametrize("path, value", LIES.items(), ids=LIES)
def test_a_listing_is_checked_before_use(
    path: str, value: Any, server: type[Hub], tmp_path: Path
) -> None:
    (tmp_path / "precious.txt").write_text("the user's own\n")
    before = files_outside(tmp_path)
    server.lie = staticmethod(change(path, value))  # type: ignore[assignment]
    with pytest.raises(HubError, match="the hub's answer is malformed"):
        hub.resolve("org/name")
    assert server.got == [] and files_outside(tmp_path) == before


@pytest.mark.parametrize("value", [None, {}, [1], 3, "x", "A" * 40])
@pytest.mark.parametrize("key", ["sha", "siblings.0.blobId", "siblings.0.size", "siblings"])
def test_a_listing_of_other_types_is_an_error(key: str, value: Any, server: type[Hub]) -> None:
    server.lie = staticmethod(change(key, value))  # type: ignore[assignment]
    with pytest.raises(HubError):
        hub.resolve("org/name")


def test_a_listing_has_an_end(server: type[Hub]) -> None:
    server.lie = staticmethod(change("more", "x" * disk.MAX_DOCUMENT))  # type: ignore[assignment]
    with pytest.raises(
        HubError, match=f"it has more than {disk.MAX_DOCUMENT} bytes; check HF_ENDPOINT"
    ):
        hub.resolve("org/name")
    assert server.got == []


def test_a_file_without_a_digest_is_not_taken(server: type[Hub]) -> None:
    server.lie = staticmethod(change("siblings.0.blobId", None))  # type: ignore[assignment]
    with pytest.raises(HubError, match="gives no size and digest for model_index"):
        hub.resolve("org/name")


@pytest.mark.parametrize("more", [b"!", None], ids=["longer", "endless"])
def test_a_body_ends_at_the_listed_size(
    more: bytes | None, server: type[Hub], tmp_path: Path
) -> None:
    server.more = more
    with pytest.raises(HubError, match="arrived damaged twice"):
        hub.resolve("org/name")
    kept = [p.stat().st_size for p in (tmp_path / "home").rglob("*") if p.is_file()]
    assert sum(kept) < 20_000
    server.more = b""  # one more run is enough
    assert (hub.resolve("org/name") / "model_index.json").is_file()


def test_a_manifest_names_files_of_its_folder_only(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "made")
    manifest = json.loads((tmp_path / "made/mlxdiff.json").read_text())
    (tmp_path / "x").write_text("12")
    manifest["files"]["../x"] = {"bytes": 2, "sha256": "0" * 64}
    (tmp_path / "made/mlxdiff.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="malformed"):
        open_folder(tmp_path / "made")


def test_a_token_that_expired_is_named(server: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    server.fault = "401 InvalidToken"
    with pytest.raises(HubError, match="HF_TOKEN"):
        hub.resolve("org/name")


# ----------------------------------------------------------------------------------------- pictures

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_interpreter_runs_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    (tmp_path / "bin").mkdir()
    script = f'#!/bin/sh\necho ran >> {tmp_path}/RAN\n[ "$1" = --version ] && echo 10.0\n'
    (tmp_path / "bin/gs").write_text(script)
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "evil.png").write_bytes(EPS)
    with pytest.raises(UsageError, match="is not a picture in a format"):
        load_image(tmp_path / "evil.png")
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO", "SGI", "DDS", "PDF", "EPS"])
def test_other_formats_are_not_opened(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a", kind)
    (tmp_path / "a").rename(tmp_path / "a.png")
    with pytest.raises(UsageError, match="is not a picture in a format"):
        load_image(tmp_path / "a.png")


KINDS = ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM"]


@pytest.mark.parametrize("kind", KINDS)
def test_named_formats_are_opened_whatever_the_name(kind: str, tmp_path: Path) -> None:
    if kind == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (8, 8)).save(tmp_path / "a", kind)
    assert load_image(tmp_path / "a").shape == (8, 8, 3)


def png(path: Path, width: int, height: int) -> Path:
    """Write a small PNG file of many black pixels."""
    from hostile import _chunk

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.mark.parametrize("side", [7200, 10_000])
def test_a_picture_of_too_many_pixels_is_refused(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "MAX_PIXELS", 100 * side)
    path = png(tmp_path / "bomb.png", side, 101)
    with pytest.raises(UsageError, match=rf"bomb\.png: is too large, {side}x101 pixels; at most"):
        load_image(path)
    assert load_image(png(tmp_path / "good.png", side, 100)).shape == (100, side, 3)


def test_no_warning_of_pillow_comes_through(tmp_path: Path) -> None:
    """Pillow warns of pictures above 89 megapixels."""
    png(tmp_path / "large.png", 100_000, 900)
    command = [sys.executable, "-m", "mlxdiff", "generate", "a", "-i", "large.png", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: large.png: is too large, 100000x900 pixels; at most 50 mega")


def test_narrow_pictures_do_not_grow(tmp_path: Path) -> None:
    """The shorter side becomes 224 pixels: one of 1x50,000 became 224x11,200,000."""
    with pytest.raises(UsageError, match="too narrow"):
        image.to_clip(np.zeros((50_000, 1, 3), np.uint8), 224)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_only_files_are_read(tmp_path: Path) -> None:
    """A FIFO would block for ever, a device might never end."""
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        if path.name == "fifo":
            os.mkfifo(path)
        with pytest.raises(UsageError, match="device, pipe or socket"):
            load_image(path)
        with pytest.raises(CheckpointError, match="device, pipe or socket"):
            TensorFile(path)
        with pytest.raises(ConfigError, match="device, pipe or socket"):
            disk.read_json(path)


def test_large_documents_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 33)  # a hole takes no room
    with pytest.raises(ConfigError, match=r"config\.json: not readable .*has 8589934592 bytes"):
        disk.read_json(tmp_path / "config.json")


# --------------------------------------------------------------------------------------- tokenizers


def with_vocabulary(path: Path, change: Callable[[dict[str, int]], None]) -> Path:
    """Write a model whose tokenizer is changed; its text encoder knows the ids 0 to 59."""
    diffusers_folder(path)
    vocabulary = {token: i for i, token in enumerate(VOCAB)}
    change(vocabulary)
    write_json(path / "tokenizer/vocab.json", vocabulary)
    return path


@pytest.mark.parametrize("index", [60, 1020, 500_000, 2**31])
def test_an_id_without_a_row_is_refused(index: int, tmp_path: Path) -> None:
    """MLX would read foreign memory."""
    model = with_vocabulary(tmp_path / "model", lambda v: v.update({"a</w>": index}))
    with pytest.raises(CheckpointError, match=r"tokenizer.*(the id|not a vocabulary)"):
        open_source(model)
    with pytest.raises(CheckpointError):
        convert(model, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_converted_folder_is_checked_too(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "made")
    file = tmp_path / "made/tokenizer/vocab.json"
    text = file.read_text().replace('"a</w>": 3', '"a</w>": 9999999')
    text = text.replace('"a</w>": 9999999', '"a</w>": 60')
    file.write_text(text)
    manifest = json.loads((tmp_path / "made/mlxdiff.json").read_text())
    manifest["files"]["tokenizer/vocab.json"]["bytes"] = file.stat().st_size
    (tmp_path / "made/mlxdiff.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"has the id 60, but the encoder knows .* 0 to 59"):
        open_folder(tmp_path / "made")


def test_two_tokens_of_one_id_are_refused(tmp_path: Path) -> None:
    model = with_vocabulary(tmp_path / "model", lambda v: v.update({"a</w>": 4}))
    with pytest.raises(CheckpointError, match="have the same id 4"):
        Tokenizer.from_folder(model / "tokenizer")


def test_a_longer_input_than_the_encoder_takes_is_refused(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "model")
    write_json(tmp_path / "model/tokenizer/tokenizer_config.json", {"model_max_length": 400})
    with pytest.raises(CheckpointError, match="model_max_length is 400, but the encoder takes 77"):
        open_source(tmp_path / "model")


# ------------------------------------------------------------------------------- pictures of others


def replay(folder: Path, said: dict[str, Any], *options: str) -> str:
    """Draw again a picture with this metadata. Return the error."""
    text = json.dumps({"schema": "mlxdiff.image/1", "prompt": "a", "steps": 1} | said)
    save_png(np.zeros((8, 8, 3), np.uint8), folder / "p.png", {"mlxdiff": text}, overwrite=True)
    arguments = ["generate", "--from-image", "p.png", "-o", "o.png", *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MLXDIFF_HOME", str(tmp_path / "lib"))
    return tmp_path / "here"


PLACES = ["/etc/x", "../x", "a/../../x", "~/x", "C:\\x", "\\\\host\\share", "c:x", "..\\x"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", ["vae", "controlnet", "refiner", "image_encoder"])
def test_a_picture_chooses_no_file_elsewhere(key: str, place: str, here: Path) -> None:
    message = replay(here, {key: [place] if key == "controlnet" else place})
    assert "outside this folder" in message and "--trust-image" in message, message
    assert "outside this folder" not in replay(
        here, {key: [place] if key == "controlnet" else place}, "--trust-image"
    )


@pytest.mark.parametrize("key", ["model", "vae", "controlnet"])
def test_a_picture_asks_no_hub(key: str, here: Path, server: type[Hub]) -> None:
    said = {key: ["org/name"] if key == "controlnet" else "org/name"}
    message = replay(here, said)
    assert "org/name" in message and "--trust-image" in message
    assert server.asked == [] and server.got == []
    replay(here, said, "--trust-image")
    assert server.asked != []


def test_a_picture_may_name_what_is_here(here: Path, server: type[Hub]) -> None:
    commit = hub.resolve("org/name").name
    server.asked.clear()
    assert library.without_hub("org/name") == f"org/name@{commit}"
    (here / "org").mkdir()
    (here / "org/name").mkdir()
    assert library.without_hub("org/name") == "org/name"
    assert library.without_hub("org/other") is None and server.asked == []


# ----------------------------------------------------------------------------------- shared folders


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    """The file at the end of the link would be emptied."""
    (tmp_path / "precious.txt").write_text("the user's own")
    (tmp_path / "a.lock").symlink_to("precious.txt")
    with (
        pytest.raises(UsageError, match=r"a\.lock: is a symbolic link"),
        disk.exclusive(tmp_path / "a.lock"),
    ):
        pass
    assert (tmp_path / "precious.txt").read_text() == "the user's own"


def test_a_partial_download_follows_no_link(server: type[Hub], tmp_path: Path) -> None:
    from fake_hub import digest_of

    (tmp_path / "precious.txt").write_text("the user's own")
    body = SD15["unet/diffusion_pytorch_model.fp16.safetensors"].encode()
    partial = f"home/hub/models--org--name/blobs/{digest_of(body)}.mlxdiff.incomplete"
    (tmp_path / partial).parent.mkdir(parents=True)
    (tmp_path / partial).symlink_to(tmp_path / "precious.txt")
    with pytest.raises(HubError):
        hub.resolve("org/name")
    assert (tmp_path / "precious.txt").read_text() == "the user's own"


def test_a_lock_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that this user can only read works; where none can be made, the error has advice."""
    opened = os.open

    def denied(path: Any, flags: int, *mode: int) -> int:
        if str(path).endswith(".lock") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(UsageError, match=r"a\.lock: the lock file cannot be opened .*MLXDIFF_HOME"):
        with disk.exclusive(tmp_path / "a.lock"):
            pass
    (tmp_path / "a.lock").write_text("1")
    with disk.exclusive(tmp_path / "a.lock") as held:
        assert held
    assert (tmp_path / "a.lock").read_text() == "1"


# ----------------------------------------------------------------------------------- time and depth

N = 20_000
SLOW: dict[str, Callable[[], object]] = {
    "nested weights": lambda: a1111.weigh("(a" * N + ")" * N),
    "blanks": lambda: a1111.weigh("a" + " " * 4 * N + "b"),
    "escapes": lambda: a1111.weigh("\\(" * N),
    "open brackets": lambda: a1111.edits("(" * N + "a", 20),
    "brackets": lambda: a1111.edits("(" * 600 + "a" + ")" * 600, 20),
    "groups": lambda: a1111.edits(("(" * 50 + "a" + ")" * 49) * 100, 20),
    "digits": lambda: a1111.edits("[a:" + "1" * 4 * N, 20),
    "tags": lambda: a1111.networks("<lora:" * (N // 2)),
    "long": lambda: a1111.weigh("a" * 10**7),
    "no colon": lambda: Metadata.from_parameters("x\n" + "ab " * 2 * N),
    "quotes": lambda: Metadata.from_parameters("x\n" + 'ab:"' * 2 * N),
    "JSON": lambda: Metadata.from_json("[" * 100_000),
}


@pytest.mark.parametrize("run", SLOW.values(), ids=SLOW)
def test_time_is_linear_and_depth_has_an_end(run: Callable[[], object]) -> None:
    start = time.process_time()
    try:
        run()
    except MlxdiffError as error:
        assert len(str(error)) < 500
    assert time.process_time() - start < 2


def test_combining_marks_take_no_time() -> None:
    tokenizer = Tokenizer.from_folder(ROOT / "mlxdiff/builtin/tokenizer")
    start = time.process_time()
    tokenizer.unknown_words("a" + "\u0301\u0323" * N)
    assert time.process_time() - start < 2


def test_weights_are_finite() -> None:
    for text in ("(a:" + "9" * 400 + ")", "(" * 8000 + "a" + ")" * 8000):
        with pytest.raises(UsageError, match=r"is not a number|multiply to infinity"):
            a1111.weigh(text)


def test_errors_are_one_short_line_that_cannot_steer_a_terminal() -> None:
    text = str(UsageError("a\nb \x1b[2J\x07 \u202e \ud800 " + "x" * 10**6 + " the way out"))
    assert text.isprintable() and len(text) == 2000
    assert text.startswith(r"a b \x1b[2J\x07 \u202e \ud800 xxx") and text.endswith(" the way out")


# ----------------------------------------------------------------------------------------- tensors


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """A mapped file would kill the process (SIGBUS)."""
    save_file({"w": np.ones(100_000, np.float32)}, tmp_path / "w.safetensors")
    tensor = TensorFile(tmp_path / "w.safetensors").tensors["w"]
    values = tensor.read()
    os.truncate(tmp_path / "w.safetensors", 5000)
    assert values.sum() == 100_000
    with pytest.raises(CheckpointError, match="'w' cannot be read"):
        tensor.read()


def test_a_file_that_is_replaced_stays_the_one_that_was_opened(tmp_path: Path) -> None:
    for value, name in ((1, "w"), (2, "new")):
        save_file({"w": np.full(1000, value, np.float32)}, tmp_path / name)
    tensor = TensorFile(tmp_path / "w").tensors["w"]
    (tmp_path / "new").replace(tmp_path / "w")
    assert (tensor.read() == 1).all()


def test_nothing_is_mapped_and_safetensors_is_used() -> None:
    sources = {
        p: p.read_text() for p in [*ROOT.glob("mlxdiff/**/*.py"), *ROOT.glob("convert/*.py")]
    }
    names = [
        alias.name if isinstance(node, ast.Import) else node.module
        for source in sources.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert "mmap" not in names and "safetensors" in names


# ------------------------------------------------------------------------------------ dependencies


def test_the_policy_is_published() -> None:
    policy = (ROOT / "SECURITY.md").read_text()
    assert re.search(r"[Rr]eport", policy) and "pickle" in policy
    assert "make audit" in (ROOT / ".github/workflows/tests.yml").read_text()
    assert "pip-audit" in (ROOT / ".ci/audit").read_text()
