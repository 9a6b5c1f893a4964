"""How pictures are prepared for CLIP's image encoder: preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxdiff.errors import ConfigError
from mlxdiff.machine.disk import read_json
from mlxdiff.pictures.image import CLIP_MEAN, CLIP_STD

_STEPS = ("do_resize", "do_center_crop", "do_normalize", "do_rescale", "do_convert_rgb")


def read_colors(path: Path, side: int) -> tuple[Any, Any]:
    """Read how pictures are prepared for CLIP: mean and deviation of the colors, in [0, 1].

    Args:
        path: a preprocessor_config.json; if there is none, CLIP's own values count.
        side: of the pictures that the encoder takes, in pixels.
    Raises: ConfigError if they are prepared in another way than CLIP's.
    """
    if not path.is_file():
        return CLIP_MEAN, CLIP_STD
    data = read_json(path)

    def only(key: str, value: Any, *allowed: Any) -> None:
        if value not in allowed:
            raise ConfigError(
                f"{path}: {key} = {value!r} is not supported; expected "
                f"{' or '.join(map(repr, allowed))}"
            )

    for key in _STEPS:
        only(key, data.get(key, True), True)
    only("resample", data.get("resample", 3), 3)
    factor = data.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        only("rescale_factor", factor, 1 / 255)
    only("size", _side(data.get("size", side)), side)
    only("crop_size", _side(data.get("crop_size", side)), side)
    mean = _three(path, data, "image_mean", CLIP_MEAN)
    return mean, _three(path, data, "image_std", CLIP_STD)


def _side(value: Any) -> Any:
    """The side of a square, in whichever way it is written."""
    if isinstance(value, dict):
        sides = set(value.values())
        return sides.pop() if len(sides) == 1 else value
    return value


def _three(
    path: Path, data: Mapping[str, Any], key: str, default: tuple[float, float, float]
) -> tuple[float, ...]:
    value = data.get(key, default)
    sound = isinstance(value, (list, tuple)) and len(value) == 3
    if not sound or not all(isinstance(v, (int, float)) and abs(v) <= 10 for v in value):
        raise ConfigError(f"{path}: {key} = {value!r} is not supported; expected three numbers")
    if key == "image_std" and not all(v > 0 for v in value):
        raise ConfigError(f"{path}: {key} = {value!r} is not supported; expected numbers above 0")
    return tuple(map(float, value))


def check_preparation(path: Path, side: int) -> None:
    """Raise ConfigError unless pictures are prepared as ``pictures.image.to_clip`` does."""
    if read_colors(path, side) != (CLIP_MEAN, CLIP_STD):
        raise ConfigError(
            f"{path}: image_mean and image_std are not those of CLIP, which is not supported"
        )


def preparation(side: int) -> dict[str, Any]:
    """Return the preprocessor_config.json of CLIP for pictures of this side, in pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        **dict.fromkeys(_STEPS, True),
        "crop_size": {"height": side, "width": side},
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
