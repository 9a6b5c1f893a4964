"""Videos: frames out of files and into files.

GIF, animated WebP and animated PNG are Pillow's; MP4 and the like are PyAV's (the extra ``video``).
A file says how it was made, as pictures do: an animated PNG in text chunks, a WebP in EXIF, a GIF
and an MP4 in a comment.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxdiff.errors import UsageError, one_line
from mlxdiff.machine.disk import open_regular
from mlxdiff.pictures.formats import LOSSLESS, QUALITY, ending, moving
from mlxdiff.pictures.image import load_image, open_picture, text_chunks
from mlxdiff.pictures.metadata import MAKER, Metadata, exif, read

if TYPE_CHECKING:
    from PIL import Image

ANIMATED = (".gif", ".webp", ".png", ".mp4")
"""Endings of files that hold a whole video."""

FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
"""Endings of files that PyAV reads."""

FPS = 8.0
"""Frames a second, where nothing else is said."""

MOST_FRAMES = 1024
MOST_PIXELS = 500_000_000
"""The longest and the largest video that is read: 1.5 GB."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic")


# ------------------------------------------------------------------------------------------ reading


def load_video(source: Any, most: int | None = None) -> list[np.ndarray]:
    """Load the frames of a video as uint8 (H, W, 3) RGB, each as ``load_image`` loads a picture.

    Args:
        source: a file (GIF, WebP or PNG, animated or not; with the extra ``video`` MP4 and the
            like), a folder of pictures (in the order of their names), a list of pictures, an array
            (F, H, W, 3), or a picture, which is one frame.
        most: read no more frames than this; None: all.
    Raises: UsageError.
    """
    frames: list[np.ndarray] = []
    pixels = 0
    for frame in _frames(source):
        pixels += frame.shape[0] * frame.shape[1]
        if len(frames) == MOST_FRAMES or pixels > MOST_PIXELS:
            raise UsageError(
                f"{_name(source)}: is too long; at most {MOST_FRAMES} frames and "
                f"{MOST_PIXELS // 1_000_000} megapixels in all are read; cut it first"
            )
        frames.append(frame)
        if len(frames) == most:
            break
    if not frames:
        raise UsageError(f"{_name(source)}: holds no frame")
    return frames


def is_video(source: Any) -> bool:
    """Return True for a source that gives several frames by its form alone: list, array, film."""
    if isinstance(source, (list, tuple)):
        return True
    if isinstance(source, (str, os.PathLike)):
        return ending(os.fspath(source)) in FILMS
    return len(np.shape(source)) == 4


def describe(path: Path) -> dict[str, Any]:
    """Describe a picture or a video that was drawn: its metadata; of a video also what its file
    says of ``frames`` and ``fps``.

    Raises: UsageError for a picture that says nothing about how it was made.
    """
    facts, comment = _film_facts(path) if ending(path) in FILMS else (_animation_facts(path), None)
    try:
        said = read(path) if comment is None else Metadata.from_json(comment, str(path))
    except UsageError:
        if not facts:
            raise
        return {"kind": "a video", "path": str(path), **facts}
    return said.to_dict() | facts


def _animation_facts(path: Path) -> dict[str, Any]:
    with open_picture(path) as picture:
        count = _count(picture, path)
        if count < 2:
            return {}
        seen = min(count, MOST_FRAMES)
        try:
            durations = [_duration(picture, index) for index in range(seen)]
        except Exception as error:  # a damaged file can make Pillow's readers raise anything
            raise UsageError(f"{path}: cannot be decoded ({one_line(error)})") from error
        mean = sum(durations) / seen
        facts = {"width": picture.width, "height": picture.height, "frames": count}
        return facts | ({"fps": round(1000 / mean, 2)} if mean > 0 else {})


def _count(picture: Image.Image, path: Path) -> int:
    """The number of frames. Raises: UsageError for a damaged file."""
    try:
        return int(getattr(picture, "n_frames", 1))
    except Exception as error:  # a damaged file can make Pillow's readers raise anything
        raise UsageError(f"{path}: cannot be decoded ({one_line(error)})") from error


def _duration(picture: Image.Image, index: int) -> float:
    picture.seek(index)
    picture.load()
    return float(picture.info.get("duration", 0.0))


def _film_facts(path: Path) -> tuple[dict[str, Any], str]:
    """What a film's container says, and its comment."""
    av = _pyav(path)
    try:
        with open(open_regular(path), "rb") as file, av.open(file, mode="r") as container:
            stream = container.streams.video[0]
            facts = {"width": stream.width, "height": stream.height, "frames": stream.frames}
            facts["fps"] = round(float(stream.average_rate), 2)
            return facts, str(container.metadata.get("comment", ""))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such video file; check the path") from None
    except Exception as error:  # as above
        raise UsageError(f"{path}: cannot be decoded ({one_line(error)})") from error


def _frames(source: Any) -> Iterator[np.ndarray]:
    if isinstance(source, (list, tuple)):
        for one in source:
            yield load_image(one)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if path.is_dir():
            yield from map(load_image, _pictures_of(path))
        elif ending(path) in FILMS:
            yield from _film(path)
        else:
            yield from _animation(path)
    elif len(np.shape(source)) == 4:
        for one in np.asarray(source):
            yield load_image(one)
    else:
        yield load_image(source)


def _pictures_of(folder: Path) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror})") from None
    return [
        path
        for path in inside
        if ending(path) in _PICTURES and not path.name.startswith(".") and path.is_file()
    ]


def _animation(path: Path) -> Iterator[np.ndarray]:
    with open_picture(path) as picture:
        for index in range(_count(picture, path)):
            try:
                picture.seek(index)
                frame = picture.copy() if index else picture
            except Exception as error:  # a damaged file can make Pillow's readers raise anything
                raise UsageError(f"{path}: cannot be decoded ({one_line(error)})") from error
            yield load_image(frame)


def _film(path: Path) -> Iterator[np.ndarray]:
    av = _pyav(path)
    try:
        with open(open_regular(path), "rb") as file, av.open(file, mode="r") as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such video file; check the path") from None
    except UsageError:
        raise
    except Exception as error:  # as above
        raise UsageError(f"{path}: cannot be decoded ({one_line(error)})") from error


def _pyav(what: Any) -> Any:
    try:
        import av
    except ImportError:
        raise UsageError(
            f"{what}: MP4 and other films need PyAV; install it (pip install 'mlxdiff[video]'), or "
            "use GIF, WebP or PNG"
        ) from None
    return av


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "the video"


# ------------------------------------------------------------------------------------------ writing


def require_writer(path: PurePath | str) -> None:
    """Raise UsageError if a video cannot be written under this name."""
    name = ending(path)
    if name not in ANIMATED:
        *others, last = ANIMATED
        raise UsageError(
            f"{path}: a video is written as {', '.join(others)} or {last}, or frame by frame: put "
            "{frame} into the name"
        )
    if name == ".mp4":
        _pyav(path)


def encode_video(
    frames: Sequence[Image.Image],
    name: str,
    fps: float,
    metadata: Metadata | None = None,
    quality: int | None = None,
) -> bytes:
    """Encode a video that runs again and again.

    Args:
        frames: its pictures, all of one size.
        name: the ending of the file (``ANIMATED``).
        fps: frames a second. A GIF counts in hundredths of a second, and rounds.
        metadata: how it was made; None: the file says nothing.
        quality: 1 to 100, for WebP and MP4; None: ``formats.QUALITY``. WebP is lossless at 100.
    Raises: UsageError without what writes this form.
    """
    quality = QUALITY if quality is None else quality
    if name == ".mp4":
        return _mp4(frames, fps, metadata, quality)
    how: dict[str, Any] = {"duration": 1000 / fps, "loop": 0}
    if name == ".gif":
        how["duration"] = max(20, round(100 / fps) * 10)
        if metadata is not None:
            how["comment"] = (MAKER + metadata.to_json()).encode()
    elif name == ".webp":
        how |= {"quality": quality, "lossless": quality == LOSSLESS}
        how["duration"] = round(1000 / fps)
        if metadata is not None:
            how["exif"] = exif(metadata)
    elif metadata is not None:
        how["pnginfo"] = text_chunks(metadata.chunks())
    return moving(frames, name, **how)


def _mp4(
    frames: Sequence[Image.Image], fps: float, metadata: Metadata | None, quality: int
) -> bytes:
    from fractions import Fraction

    av = _pyav("MP4")
    encoded = io.BytesIO()
    with av.open(encoded, mode="w", format="mp4") as container:
        if metadata is not None:
            container.metadata["comment"] = metadata.to_json()
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1000))
        width, height = frames[0].size
        stream.width, stream.height = width + width % 2, height + height % 2  # yuv420p needs even
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(round((LOSSLESS - quality) * 0.5 + 10))}
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))
            pixels = np.pad(pixels, [(0, height % 2), (0, width % 2), (0, 0)], mode="edge")
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return encoded.getvalue()
