"""Convert pictures between files, Pillow images and arrays; write PNG files atomically.

A picture is uint8 (H, W, 3) RGB. A network reads and writes float32 (1, H, W, 3) in [-1, 1].
Rounding follows diffusers' image_processor.py, so that equal latents give equal files.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from mlxdiff.errors import MlxdiffError, UsageError, argument, one_line
from mlxdiff.machine.disk import open_regular
from mlxdiff.machine.temporary import temporary_file

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

ImageLike = Union[str, "os.PathLike[str]", "Image.Image", np.ndarray, Any]
"""A picture as users give it: a path, a Pillow image, or an array (NumPy's or MLX's)."""

_TRIAL = 65536  # bytes that are written to find out if a folder can be written to

_OTHER_FORMATS = frozenset(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .heic .jxl".split())
PNG = (".png",)


FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM", "HEIF")
"""Pillow's names of the formats that are read, whatever a file is called. Pillow knows more, and
hands some of them to interpreters (PostScript) or to readers that few people test. AVIF is read
where Pillow was built with it, HEIF where the package pillow-heif is installed."""

MAX_PIXELS = 50_000_000
"""Largest picture that is read. Cameras and phones write up to 50 megapixels; a run uses a few."""

_HEAVY = ("WEBP", "AVIF", "HEIF", "GIF")
"""Formats whose readers make several copies of a picture. Half as many pixels are read."""

_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
"""Kinds of HEIF: bytes 8 to 11 of the file."""


def load_image(source: ImageLike) -> np.ndarray:
    """Load a picture as uint8 (H, W, 3) RGB.

    For files and Pillow images, apply the EXIF orientation, then Pillow's `convert("RGB")`, which
    drops alpha without blending. Colours of another space than sRGB (cameras and phones write
    Display P3, Adobe RGB) are converted by the profile in the file. Grey of more than 8 bits is
    read by its range: 16 bits keep their high byte, as Pillow does for 16-bit colour; floats are 0
    to 1 or 0 to 255. An animation gives its first frame.

    Args:
        source: a path, a Pillow image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of
            uint8, or of floats in [0, 1].

    Raises:
        UsageError: the file does not exist or is not a picture, or the array has another form.
    """
    with _opened(source) as (picture, what):
        return _from_array(source) if picture is None else _to_rgb(picture, what)


def load_with_alpha(source: ImageLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Load a picture as `load_image` does, and its alpha as uint8 (H, W).

    The alpha is None if there is none, or if it is opaque all over.

    Args, Raises: as for `load_image`.
    """
    alpha = None
    with _opened(source) as (picture, what):
        if picture is not None:
            pixels = _to_rgb(picture, what)
            if "A" in picture.getbands() or "transparency" in picture.info:
                alpha = _by_strips(picture, what, lambda strip: _alpha(strip, picture.info))
        else:
            pixels, array = _from_array(source), np.asarray(source)
            if array.ndim == 3 and array.shape[2] == 4:
                is_float = array.dtype != np.uint8
                alpha = (array[..., 3] * 255).round() if is_float else array[..., 3]
                alpha = alpha.astype(np.uint8)
    return pixels, None if alpha is None or alpha.min() == 255 else alpha


@contextlib.contextmanager
def _opened(source: ImageLike) -> Iterator[tuple[Image.Image | None, str]]:
    """Open a path with Pillow. Yield the Pillow image and its name; None for an array."""
    from PIL import Image

    if isinstance(source, (str, os.PathLike)):
        with open_picture(source) as picture:
            yield picture, str(source)
    else:
        yield (source if isinstance(source, Image.Image) else None), "the image"


def load_alpha(source: ImageLike) -> np.ndarray | None:
    """Load the opacity of a picture as uint8 (H, W), turned as ``load_image`` turns it.

    Returns: 255 where it is opaque; None if the picture has no transparency.
    Raises: UsageError as ``load_image``.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _alpha_of(source, "the image")
    if isinstance(source, (str, os.PathLike)):
        with open_picture(source) as picture:
            return _alpha_of(picture, str(source))
    array = np.asarray(source)
    if array.ndim != 3 or array.shape[2] != 4:
        return None
    return _from_array(np.repeat(array[..., 3:], 3, axis=2))[..., 0]


def _alpha_of(picture: Image.Image, what: str) -> np.ndarray | None:
    if "A" not in picture.getbands() and "a" not in picture.getbands():
        if "transparency" not in picture.info:
            return None
    try:
        alpha = picture.convert("RGBA").getchannel("A")
    except Exception as error:  # as in open_picture
        raise UsageError(f"{what}: cannot be decoded ({_reason(error)})") from error
    turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    pixels = np.array(alpha)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def load_levels(source: ImageLike) -> np.ndarray:
    """Load a map of one number for each pixel, such as a depth map: float32 (H, W).

    Files keep the levels that they hold: 0 to 255, or 0 to 65535 for 16 bits. Arrays (H, W) or
    (H, W, 1) may be of any numbers.

    Raises:
        UsageError: as ``load_image``; or the picture has colours, or values that are not finite.
    """
    from PIL import Image

    if not isinstance(source, (str, os.PathLike, Image.Image)):
        array = np.asarray(source)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if array.ndim == 2 and 0 not in array.shape and array.dtype.kind in "uif":
            return _finite(array, "the map")
    with _opened(source) as (picture, what):
        if picture is not None and (picture.mode[0] == "F" or picture.mode[0] == "I"):
            try:
                picture.load()
            except Exception as error:  # as in open_picture
                raise UsageError(f"{what}: cannot be decoded ({_reason(error)})") from error
            values, turn = np.asarray(picture), _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
            return _finite(values if turn is None else turn(values), what)
    pixels = load_image(source)
    if (pixels != pixels[..., :1]).any():
        raise UsageError(
            f"{what}: has colours; a map has one level for each pixel: give it in grey, not as it "
            "is painted for people"
        )
    return pixels[..., 0].astype(np.float32)


def _finite(array: np.ndarray, what: str) -> np.ndarray:
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise UsageError(f"{what}: holds values that are not finite")
    return values


def is_grey(source: ImageLike) -> bool:
    """Return True if a picture is stored in levels of grey."""
    from PIL import Image

    if isinstance(source, (str, os.PathLike)):
        with open_picture(source) as picture:
            return is_grey(picture)
    if isinstance(source, Image.Image):
        return source.mode in ("1", "L", "LA") or source.mode.startswith("I")
    shape = np.shape(source)
    return len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)


def load_on_white(path: str | os.PathLike[str]) -> np.ndarray:
    """Load a picture file as ``load_image`` does, but lay its transparent parts on white.

    ``load_image`` keeps the colours under them, which are mostly black or stray. A model must not
    learn those: nobody has ever seen them.
    Raises: UsageError.
    """
    from PIL import Image

    with open_picture(path) as picture:
        if not is_transparent(picture):
            return _to_rgb(picture, str(path))
        try:
            layer = picture.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            shown = Image.alpha_composite(white, layer).convert("RGB")
            shown.getexif().update(picture.getexif())
        except Exception as error:  # as in open_picture
            raise UsageError(f"{path}: cannot be decoded ({_reason(error)})") from error
        return _to_rgb(shown, str(path))


def is_transparent(picture: Image.Image) -> bool:
    """Return True if parts of an opened picture are not opaque."""
    if "transparency" in picture.info:
        return True
    if picture.mode not in ("RGBA", "LA", "PA", "RGBa", "La"):
        return False
    try:
        return picture.getchannel("A").getextrema()[0] < 255  # type: ignore[operator]
    except Exception:  # the damage is reported by what loads the picture
        return False


@contextlib.contextmanager
def open_picture(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open a picture file with Pillow.

    Raises:
        UsageError: the file does not exist, or Pillow cannot read it as a picture.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    try:
        file = open(open_regular(path), "rb")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such picture file; check the path") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder; give a picture file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened as a picture ({_reason(error)})") from error
    with file:
        head = file.read(12)
        file.seek(0)
        is_heif = head[4:8] == b"ftyp" and head[8:12] in _BRANDS
        if is_heif:
            _register_heif()
        Image.init()
        try:
            picture = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        except UnidentifiedImageError:
            also = "; it is HEIC: run `pip install pillow-heif` to read it, or save it as PNG"
            raise UsageError(
                f"{path}: is not a picture in a format that Pillow reads for mlxdiff "
                "(PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF, PGM)" + (also if is_heif else "")
            ) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise _too_large(path) from None
        except Exception as error:  # a damaged file can make Pillow's readers raise anything
            raise UsageError(f"{path}: cannot be opened as a picture ({_reason(error)})") from error
        with picture:
            if picture.width * picture.height > _most_pixels(picture):
                raise _too_large(path, picture)
            yield picture


def _register_heif() -> None:
    """Let Pillow read HEIF, if the plug-in is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def _most_pixels(picture: Image.Image) -> int:
    """Return how many pixels are read. A picture then takes less than 500 MB."""
    is_heavy = picture.format in _HEAVY or picture.mode == "CMYK"
    return MAX_PIXELS // 2 if is_heavy else MAX_PIXELS


def _too_large(path: Path, picture: Image.Image | None = None) -> UsageError:
    """Return the error for a picture of more pixels than are read; Pillow may not tell its size."""
    size = "" if picture is None else f", {picture.width}x{picture.height} pixels"
    most = MAX_PIXELS if picture is None else _most_pixels(picture)
    return UsageError(
        f"{path}: is too large{size}; at most {most // 1_000_000} megapixels are read; make it "
        "smaller first"
    )


def to_image(pixels: np.ndarray) -> Image.Image:
    """Return uint8 (H, W, 3) as a Pillow image."""
    from PIL import Image

    return Image.fromarray(pixels)


def to_model(image: np.ndarray) -> np.ndarray:
    """Convert uint8 (H, W, 3) to float32 (1, H, W, 3); 0 becomes -1 and 255 becomes 1."""
    return (image.astype(np.float32) / np.float32(255) * 2 - 1)[None]


def to_pil(image: np.ndarray) -> Image.Image:
    """Convert float (H, W, 3), or grey (H, W, 1), in [-1, 1] to a Pillow image; clip the rest.

    Raises:
        MlxdiffError: the picture contains NaN (it would come out black).
    """
    from PIL import Image

    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"expected a picture (H, W, 3) or (H, W, 1), got {image.shape}")
    if np.isnan(image).any():
        raise MlxdiffError(
            "the decoded picture contains NaN: the weights are damaged, or the computation "
            "overflowed; use dtype float32, or verify the model"
        )
    # Rounds half to even, as torch and NumPy do.
    levels = np.clip(image * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    values = levels.round().astype(np.uint8)
    return Image.fromarray(values[:, :, 0] if image.shape[2] == 1 else values)


CLIP_MEAN = 0.48145466, 0.4578275, 0.40821073
CLIP_STD = 0.26862954, 0.26130258, 0.27577711


def to_clip(
    image: np.ndarray,
    size: int,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> np.ndarray:
    """Prepare a picture for CLIP's image encoder.

    Resize the shorter side to ``size`` (Pillow's bicubic filter), crop the centre and normalize the
    colours.

    Args:
        image: uint8 (H, W, 3).
        size: input side of the encoder, in pixels.
        mean, std: of the colors, in [0, 1].
    Returns: (1, size, size, 3) float32.
    Source: transformers models/clip/image_processing_clip.py.
    """
    from PIL import Image

    rows, columns = image.shape[:2]
    short = min(rows, columns)
    if size * size * max(rows, columns) > MAX_PIXELS * short:
        raise UsageError(
            f"a picture of {columns}x{rows} pixels is too narrow for the image encoder; crop it"
        )
    height, width = int(size * rows / short), int(size * columns / short)
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    pixels = np.array(picture)[top : top + size, left : left + size].astype(np.float32)
    colors = pixels * np.float32(1 / 255)
    return ((colors - np.array(mean, np.float32)) / np.array(std, np.float32))[None]


def to_clip_aligned(image: np.ndarray, size: int) -> np.ndarray:
    """Prepare a picture for CLIP's image encoder as Zero-1-to-3 does.

    Resize the whole to a square by cubic interpolation between the centres of the corner pixels,
    without a filter, and normalize the colours.

    Args:
        image: uint8 (H, W, 3).
        size: input side of the encoder, in pixels.
    Returns: (1, size, size, 3) float32.
    Source: diffusers examples/community/pipeline_zero1to3.py (CLIP_preprocess); PyTorch's bicubic
        interpolation with align_corners.
    """
    rows, columns = (_cubic(side, size) for side in image.shape[:2])
    values = to_model(image)[0]
    values = np.einsum("ih,jw,hwc->ijc", rows, columns, values, optimize=True)
    colors = (values + np.float32(1)) / np.float32(2)
    normal = (colors - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return np.asarray(normal[None], np.float32)


def _cubic(side: int, size: int) -> np.ndarray:
    """Weights of cubic convolution (Keys 1981, a = -0.75): (size, side) float32."""
    places = np.linspace(0, side - 1, size)
    first = np.floor(places).astype(int)
    weights = np.zeros((size, side))
    for tap in range(-1, 3):
        t = np.abs(places - (first + tap))
        near = (1.25 * t - 2.25) * t * t + 1
        far = ((-0.75 * t + 3.75) * t - 6) * t + 3
        index = np.clip(first + tap, 0, side - 1)
        np.add.at(weights, (np.arange(size), index), np.where(t <= 1, near, far))
    return weights.astype(np.float32)


def on_white(pixels: np.ndarray, alpha: np.ndarray | None, width: int, height: int) -> np.ndarray:
    """Lay a picture on white and bring it to a size; if its shape differs, white stands beside it.

    Args:
        pixels: uint8 (H, W, 3).
        alpha: uint8 (H, W), how opaque it is; None: all over.
    Returns: uint8 (height, width, 3).
    """
    if alpha is not None:
        opaque = alpha[..., None].astype(np.float32) / 255
        pixels = (255 - opaque * (255 - pixels.astype(np.float32))).round().astype(np.uint8)
    rows, columns = pixels.shape[:2]
    scale = min(width / columns, height / rows)
    inner = max(1, round(columns * scale)), max(1, round(rows * scale))
    small = resize(pixels, *inner)
    canvas = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - inner[1]) // 2, (width - inner[0]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = small
    return canvas


def resize(image: np.ndarray, width: int, height: int, *, bicubic: bool = False) -> np.ndarray:
    """Resize uint8 (H, W, 3) to (height, width, 3).

    Args:
        image: the picture.
        width, height: new size, in pixels.
        bicubic: use Pillow's bicubic filter, as diffusers' upscaler does; else Lanczos.
    """
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    way = Image.Resampling.BICUBIC if bicubic else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(image).resize((width, height), way))


def resize_values(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize float32 (H, W, C) in [-1, 1] with Pillow's Lanczos filter, without rounding."""
    from PIL import Image

    planes = np.moveaxis(np.asarray(image, np.float32), -1, 0)
    filtered = [
        Image.fromarray(np.ascontiguousarray(plane)).resize(
            (width, height), Image.Resampling.LANCZOS
        )
        for plane in planes
    ]
    return np.clip(np.stack([np.asarray(plane) for plane in filtered], axis=-1), -1.0, 1.0)


def save_png(
    image: Image.Image | np.ndarray,
    path: str | os.PathLike[str],
    text: Mapping[str, str] | None = None,
    overwrite: bool = False,
    compress_level: int = 6,
    icc_profile: bytes | None = None,
) -> None:
    """Write a PNG file atomically: an interruption leaves no partial file.

    Args:
        image: Pillow image or uint8 (H, W, 3).
        path: the file to write; its folder must exist.
        text: text chunks by keyword (tEXt, or iTXt if the text is not Latin-1).
        overwrite: replace an existing file.
        compress_level: zlib level, 0 to 9; level 1 takes a third of the time.
        icc_profile: color profile.

    Raises:
        UsageError: the file exists and `overwrite` is False, its folder is missing, or it cannot be
            written.
    """
    check_writable(path, overwrite)
    try:
        data = png_bytes(image, text, compress_level, icc_profile)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({_reason(error)})") from error
    write_bytes(data, path, overwrite)


def text_chunks(text: Mapping[str, str]) -> PngInfo:
    """Text by keyword as a PNG file takes it (tEXt, or iTXt if it is not Latin-1)."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    return chunks


def png_bytes(
    image: Image.Image | np.ndarray,
    text: Mapping[str, str] | None = None,
    compress_level: int = 6,
    icc_profile: bytes | None = None,
) -> bytes:
    """Encode a picture as PNG; arguments as for `save_png`."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    encoded = io.BytesIO()
    image.save(
        encoded,
        format="PNG",
        pnginfo=text_chunks(text or {}),
        compress_level=compress_level,
        icc_profile=icc_profile,
    )
    return encoded.getvalue()


def _format(ending: str) -> str:
    return ending.removeprefix(".").upper()


def write_bytes(data: bytes, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write the bytes of a picture file atomically, as `save_png` does. Raises: UsageError."""
    path = Path(path)
    check_writable(path, overwrite, (path.suffix.lower(),))
    try:
        with temporary_file(path.parent) as (temporary, file):
            file.write(data)
            file.flush()
            if os.name == "nt":
                file.close()  # an open file cannot be renamed there
            if overwrite:
                os.replace(temporary, path)
            else:
                _rename_new(temporary, path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be written ({_reason(error)})") from error


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Put pictures of one size into rows of at most four."""
    from PIL import Image

    columns = min(4, len(images))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new(images[0].mode, (columns * width, rows * height))
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * width, place // columns * height))
    return sheet


def check_writable(
    path: str | os.PathLike[str], overwrite: bool = False, endings: Sequence[str] = PNG
) -> None:
    """Raise the UsageError that writing would raise, before any work is done.

    Args:
        path, overwrite: as for ``write_bytes``.
        endings: of the formats that are written.
    """
    path = Path(path)
    if path.suffix.lower() in _OTHER_FORMATS.difference(endings):
        *others, last = endings
        raise UsageError(
            f"{path}: pictures are written as {', '.join(_format(one) for one in endings)}; choose "
            f"a name that ends in {', '.join(others)}{' or ' if others else ''}{last}"
        )
    if os.path.isdir(path):
        raise UsageError(f"{path}: is a folder; name a file in it, such as {path / 'picture.png'}")
    if not os.path.isdir(path.parent):
        raise UsageError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not overwrite and os.path.lexists(path):
        raise _exists(path)


def require_right_to_write(folder: str | os.PathLike[str]) -> None:
    """Write a file into a folder and delete it. Raises: UsageError if that fails."""
    try:
        with temporary_file(Path(folder)) as (_, file):
            file.write(bytes(_TRIAL))
    except (OSError, ValueError) as error:
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        raise UsageError(
            f"{Path(folder).absolute()}: cannot be written to ({_reason(error)}); "
            f"{'make room or ' if is_full else ''}choose another folder"
        ) from error


def _rename_new(source: Path, path: Path) -> None:
    """Rename `source` to `path`; fail if `path` exists, even if another process just made it."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # no hard links here: create an empty file to claim the name, then replace it
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise _exists(path) from None
        try:
            os.replace(source, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _exists(path: Path) -> UsageError:
    overwrite = argument("overwrite", True)
    return UsageError(f"{path}: already exists; choose another name, or give {overwrite}")


def _to_rgb(picture: Image.Image, what: str) -> np.ndarray:
    """Decode a picture to uint8 (H, W, 3)."""
    try:
        picture.load()
        if picture.mode in ("I", "F"):
            convert = _wide(picture)
        else:
            convert = _from_profile(picture) or _strip_to_rgb
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
    except Exception as error:  # as in open_picture
        raise UsageError(f"{what}: cannot be decoded ({_reason(error)})") from error
    return _by_strips(picture, what, convert)


def _by_strips(
    picture: Image.Image, what: str, convert: Callable[[Image.Image], np.ndarray]
) -> np.ndarray:
    """Decode a picture to uint8, strip by strip: a second copy of it is never made."""
    try:
        picture.load()
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
        width, height = picture.size
        pixels: np.ndarray | None = None
        rows = max(1, _STRIP // width)
        for top in range(0, height, rows):
            strip = convert(picture.crop((0, top, width, min(top + rows, height))))
            if pixels is None:
                pixels = np.empty((height, *strip.shape[1:]), np.uint8)
            pixels[top : top + rows] = strip
        assert pixels is not None, "Pillow opens no picture without rows"
        return pixels if turn is None else np.ascontiguousarray(turn(pixels))
    except Exception as error:  # as in open_picture
        raise UsageError(f"{what}: cannot be decoded ({_reason(error)})") from error


_STRIP = 1 << 20  # pixels that are converted at a time
_ORIENTATION = 0x0112  # EXIF tag
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
"""EXIF orientation -> what turns the stored pixels the right way."""


def _strip_to_rgb(strip: Image.Image) -> np.ndarray:
    if strip.mode.startswith("I;16"):
        return _grey((np.asarray(strip) >> 8).astype(np.uint8))
    return np.asarray(strip.convert("RGB"))


def _grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, axis=2)


def _alpha(strip: Image.Image, info: Mapping[Any, Any]) -> np.ndarray:
    """The alpha of a strip, uint8 (h, w)."""
    if "transparency" in info:
        strip.info["transparency"] = info["transparency"]
    return np.asarray(strip.convert("RGBA").getchannel("A"))


def _wide(picture: Image.Image) -> Callable[[Image.Image], np.ndarray]:
    """Return what converts strips of 32-bit grey, by the range of the whole picture.

    Raises: UsageError for values that no range of grey levels holds.
    """
    if picture.mode == "F" and not np.isfinite(np.asarray(picture)).all():
        raise UsageError("holds values that are not finite; save it as 8-bit or 16-bit grey")
    extrema: Any = picture.getextrema()  # a pair, for pictures of one band
    low, high = extrema
    if picture.mode == "I" and (high > 255 or picture.format == "PPM") and 0 <= low <= high < 65536:
        return lambda strip: _grey((np.asarray(strip) >> 8).astype(np.uint8))
    if picture.mode == "F" and 0 <= low <= high <= 1:
        return lambda strip: _grey((np.asarray(strip) * 255).round().astype(np.uint8))
    if 0 <= low <= high <= 255:
        return _strip_to_rgb
    ranges = "0 to 255 or 65535" if picture.mode == "I" else "0 to 1 or 255"
    raise UsageError(
        f"holds grey levels from {low:g} to {high:g}; expected {ranges}; save it as 8-bit or "
        "16-bit grey"
    )


def _from_profile(picture: Image.Image) -> Callable[[Image.Image], np.ndarray] | None:
    """Return what converts strips to sRGB by the picture's colour profile.

    None: there is no profile, it is sRGB's, it is damaged, or this Pillow has no Little CMS. Grey
    stays as it is: it can be a mask or a depth map.
    """
    data = picture.info.get("icc_profile")
    mode = "CMYK" if picture.mode == "CMYK" else "RGB"
    if not data or picture.mode not in ("RGB", "RGBA", "P", "CMYK"):
        return None
    try:
        from PIL import ImageCms

        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        said = profile.profile
        if said.xcolor_space.strip() != mode or "sRGB" in (said.profile_description or ""):
            return None
        to_srgb = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # as in open_picture; viewers ignore such a profile, too
        return None

    def convert(strip: Image.Image) -> np.ndarray:
        strip = strip if strip.mode == mode else strip.convert(mode)
        return np.asarray(ImageCms.applyTransform(strip, to_srgb))

    return convert


def _from_array(source: Any) -> np.ndarray:
    array = np.asarray(source)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise UsageError(
            "an image array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"not {np.shape(source)}"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise UsageError("an image array of floats must hold values in [0, 1]; or give uint8")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise UsageError(f"an image array must be uint8 or floats in [0, 1], not {array.dtype}")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.array(array[..., :3])


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)
