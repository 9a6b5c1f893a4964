"""Pictures as JPEG, WebP and AVIF with their settings; animations of previews."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from golden_data import checkpoint, photo
from PIL import Image, features
from test_cli import QUICK, error_of, generate, pixels

from mlxdiff.errors import UsageError
from mlxdiff.pictures import formats, metadata
from mlxdiff.pictures.metadata import Metadata

SAID = Metadata(
    prompt="a café, 日本の城 😺\ntwo lines",
    negative_prompt="",
    seed=7,
    steps=4,
    width=32,
    height=32,
    guidance=7.5,
    sampler="euler",
    schedule="karras",
    version="0",
    extra={"eta": 0.5, "loras": [{"name": "a.safetensors", "scale": 0.5}]},
)
LOSSY = [name for name in formats.ENDINGS if name != ".png"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _avif(request: pytest.FixtureRequest) -> None:
    if ".avif" in request.node.name and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")


def picture() -> Image.Image:
    return Image.fromarray(np.asarray(photo(32, 32)))


@pytest.mark.parametrize("name", formats.ENDINGS)
def test_settings_go_round(name: str) -> None:
    data = formats.encode(picture(), name, SAID)
    with Image.open(io.BytesIO(data)) as found:
        assert found.format == formats.ENDINGS[name] and found.size == (32, 32)
        assert metadata.of_picture(found, "x") == SAID
        if name != ".png":  # where A1111 puts its text, and in its encoding
            comment = found.getexif().get_ifd(0x8769)[0x9286]
            assert comment.startswith(b"UNICODE\0")
            assert comment[8:].decode("utf-16-be") == SAID.to_parameters()
    silent = formats.encode(picture(), name)
    with Image.open(io.BytesIO(silent)) as found, pytest.raises(UsageError, match="says nothing"):
        metadata.of_picture(found, "x")


@pytest.mark.parametrize("name", LOSSY)
def test_quality(name: str) -> None:
    sizes = [len(formats.encode(picture(), name, quality=quality)) for quality in (10, None, 99)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_webp_is_lossless_at_100() -> None:
    data = formats.encode(picture(), ".webp", quality=100)
    with Image.open(io.BytesIO(data)) as found:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(picture()))


@pytest.mark.parametrize(
    ("size", "lost"), [(25_000, "a part of the settings"), (40_000, "the settings")]
)
def test_what_a_jpeg_cannot_hold_is_said(
    size: int, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    long = Metadata(prompt="x" * size, seed=1, steps=2, sampler="euler", version="0")
    with caplog.at_level(logging.WARNING, "mlxdiff"):
        data = formats.encode(picture(), ".jpg", long)
    assert f"{lost} did not fit" in caplog.text
    with Image.open(io.BytesIO(data)) as found:
        if size == 25_000:  # A1111's text is there
            assert metadata.of_picture(found, "x").prompt == long.prompt
    with Image.open(io.BytesIO(formats.encode(picture(), ".webp", long))) as found:
        assert metadata.of_picture(found, "x") == long


def test_a_note_of_another_maker_is_nothing_of_ours() -> None:
    made = Image.Exif()
    made.get_ifd(0x8769)[0x927C] = b"Canon\0{}"
    data = io.BytesIO()
    picture().save(data, "JPEG", exif=made.tobytes())
    with Image.open(data) as found, pytest.raises(UsageError, match="says nothing"):
        metadata.of_picture(found, "x")


@pytest.mark.parametrize("name", formats.ANIMATIONS)
def test_an_animation(name: str) -> None:
    frames = [picture().rotate(90 * i) for i in range(4)]
    with Image.open(io.BytesIO(formats.animation(frames, name))) as found:
        assert found.n_frames == 4 and found.size == (32, 32)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", LOSSY)
def test_the_command_writes_them_and_reads_them_back(here: Path, name: str) -> None:
    assert generate("a", "-s", "1", *QUICK, "-o", f"a{name}", "--quality", "95").exit_code == 0
    again = generate("--from-image", f"a{name}", "-o", "again.png")
    assert again.exit_code == 0, again.output
    assert generate("a", "-s", "1", *QUICK, "-o", "a.png").exit_code == 0
    np.testing.assert_array_equal(pixels(here / "again.png"), pixels(here / "a.png"))


def test_a_result_writes_them(tmp_path: Path) -> None:
    import mlxdiff

    pipe = mlxdiff.load(checkpoint("sd15"), backend="numpy")
    result = pipe.generate("a", seed=1, steps=1, width=32, height=32)
    (path,) = result.save(tmp_path / "{seed}.webp", quality=100)
    assert path.name == "1.webp" and metadata.read(path) == result.metadata[0]
    np.testing.assert_array_equal(pixels(path), np.asarray(result.images[0]))
    with pytest.raises(UsageError, match="already exists"):
        result.save(path)


def test_what_cannot_be_written_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ".webp" in error_of(generate("a", *QUICK, "-o", "a.heic"))
    assert "1 to 100" in generate("a", *QUICK, "--quality", "0").stderr
    result = generate("a", "-s", "1", *QUICK, "-o", "a.png", "--quality", "50")
    assert "quality has no effect" in result.stderr
    own = features.check
    monkeypatch.setattr(features, "check", lambda what: what != "avif" and own(what))
    assert "built without it" in error_of(generate("a", *QUICK, "-o", "a.avif"))
    assert not (here / "a.avif").exists()


def test_previews_as_one_animation(here: Path) -> None:
    how = ("-o", "a.png", "--preview-file", "run.gif")
    result = generate("a", "-s", "1", "--steps", "3", "-W", "32", "-H", "32", *how)
    assert result.exit_code == 0, result.output
    with Image.open(here / "run.gif") as found:
        assert found.n_frames == 3  # type: ignore[attr-defined]
    assert "already exists" in error_of(
        generate("a", *QUICK, "-o", "b.png", "--preview-file", "run.gif")
    )
